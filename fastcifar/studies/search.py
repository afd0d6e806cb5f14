"""What a sweep searches: fields of the recipe, and the values that each may take."""

import math
from dataclasses import dataclass

from fastcifar.errors import UsageError
from fastcifar.settings import Recipe
from fastcifar.studies.fields import has_field, read_field, split_values

HINT = "--search optim.lr=1e-4..1e-1, or --search optim.lr=0.01,0.1"
LOG_FROM = 10.0  # a range whose ends differ by this factor is searched on a logarithmic scale


@dataclass(frozen=True)
class Searched:
    """One field and its choices, or else the ends of its range."""

    field: str
    choices: tuple[str, ...] = ()  # as they were typed
    low: float = 0.0
    high: float = 0.0
    whole: bool = False  # numbers only

    @property
    def log(self) -> bool:
        return self.low > 0 and self.high >= LOG_FROM * self.low

    def samples(self) -> tuple[str, ...]:
        """The values to try on the parser before any training: every choice, or both ends."""
        return self.choices or (typed(self.low), typed(self.high))

    def text(self) -> str:
        """As it is typed after --search."""
        spec = ",".join(self.choices) if self.choices else f"{typed(self.low)}..{typed(self.high)}"
        return f"{self.field}={spec}"


def typed(value: float | str) -> str:
    """A value as it stands on the command line, exact."""
    return value if isinstance(value, str) else repr(value)


def read_search(words: list[str], name: str, recipe: Recipe) -> list[Searched]:
    """From FIELD=SPEC to what is searched of the recipe with this name. Raises UsageError naming the field."""
    found = [read_one(word, name, recipe) for word in words]
    names = [one.field for one in found]
    for one in names:
        if names.count(one) > 1:
            raise UsageError(f"--search: {one} is there twice.", HINT)
    return found


def read_one(word: str, name: str, recipe: Recipe) -> Searched:
    field, _, spec = word.partition("=")
    field = field.removeprefix("--").replace("-", "_")
    if not field or not spec:
        raise UsageError(f"--search: {word!r} is not FIELD=VALUES.", HINT)
    if not has_field(recipe, field):
        raise UsageError(f"--search: recipe {name} has no field {field}.", f"fastcifar recipes show {name}")
    if ".." in spec:
        return read_range(field, spec, read_field(recipe, field))
    choices = split_values(spec)
    if "" in choices or len(set(choices)) < len(choices):
        raise UsageError(f"--search {field}: the choices {spec!r} are not different values between commas.", HINT)
    return Searched(field, tuple(choices))


def read_range(name: str, spec: str, value: object) -> Searched:
    """`value` is what the recipe has in that field: its kind is that of the range."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"--search {name}: has no range, it is no number.", f"--search {name}=VALUE,VALUE")
    whole = isinstance(value, int)
    try:
        low, high = [(int if whole else float)(end) for end in spec.split("..")]
    except ValueError as error:
        kind = "whole numbers" if whole else "numbers"
        raise UsageError(f"--search {name}: {spec!r} is not a range between two {kind}.", HINT) from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UsageError(f"--search {name}: the range {spec!r} does not rise.", HINT)
    return Searched(name, low=low, high=high, whole=whole)
