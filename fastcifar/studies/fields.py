"""The fields of a recipe by dotted name, and their values as they are typed."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass

from fastcifar.settings import Recipe


def has_field(recipe: Recipe, name: str) -> bool:
    try:
        read_field(recipe, name)
    except KeyError:
        return False
    return True


def read_field(recipe: Recipe, name: str) -> object:
    """The value at a dotted name. Raises KeyError: there is no such field."""
    value: object = recipe
    for part in name.split("."):
        if not is_dataclass(value) or part not in [field.name for field in fields(value)]:
            raise KeyError(name)
        value = getattr(value, part)
    return value


def split_values(text: str) -> list[str]:
    """At the commas outside brackets: "[64,256],[32,64]" are two."""
    values, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            values.append("")
        else:
            values[-1] += letter
    return [value.strip() for value in values]


def write_flags(values: Mapping[str, str]) -> list[str]:
    """Fields and their values as words of `train`."""
    return [f"--{name}={value}" for name, value in values.items()]
