"""The run folder: everything a training leaves behind, each file whole or absent.

config.yaml              the arguments that repeat the run step by step (--config)
metrics.jsonl            a line a step
checkpoint.safetensors   the newest complete checkpoint, while training
model.safetensors        the trained weights
report.html              curves, confusion matrix, mistakes
result.json              written last: a folder that has it is complete
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path

import yaml

from fastcifar.budget import Knot
from fastcifar.errors import UsageError


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, flush to disk, then rename: a reader, or a crash, sees the old file or the new one.

    Raises UsageError if the disk is full or does not let us.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> UsageError:
    return UsageError(f"--out: cannot write {path}: {error.strerror}.", "make room, or --out DIR on another disk")


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def make_folder(path: Path) -> None:
    """Raises UsageError if that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: cannot make the folder {path}: {error.strerror}.", "another --out DIR") from error


def pick_folder(name: str) -> Path:
    """A new one in runs/, not made yet."""
    return Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{name}-{os.getpid()}"


def dump_yaml(config: dict) -> str:
    """Tuples become lists and paths strings on the way."""
    return yaml.safe_dump(json.loads(json.dumps(config, default=str)), sort_keys=False)


def source_commit() -> str | None:
    """The commit of the checkout this package runs from, "-dirty" if it was changed since; None outside a checkout.

    $FASTCIFAR_COMMIT goes before it: a container has no checkout, but whoever builds it does.
    """
    if named := os.environ.get("FASTCIFAR_COMMIT"):
        return named
    here = Path(__file__)

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    with suppress(OSError, subprocess.SubprocessError):
        # A virtual environment may lie in somebody else's checkout, which knows nothing of this file.
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--abbrev=40")
    return None


@dataclass(frozen=True)
class Checkpoint:
    """A training halted after `step` steps. Tensors are named `model.*`, `optimizer.*` and `best.*`."""

    tensors: dict
    step: int
    spent_s: float  # wall-clock used so far, from process start
    train_s: float
    knots: list[Knot]
    looks: dict = field(default_factory=dict)  # at the held-out images: `Looks.facts`
    scaler: dict = field(default_factory=dict)  # float16's


class RunFolder:
    """One run's files. `create` makes a new folder, `open` takes one that holds a run."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(cls, out: Path | None, recipe: str) -> "RunFolder":
        """Make the folder: `out`, or a new one under runs/. Raises UsageError if it holds a run already."""
        path = out or pick_folder(recipe)
        for name, verb in ("result.json", "eval"), ("checkpoint.safetensors", "train --resume"):
            if os.path.exists(path / name):  # unlike Path.exists, it never raises
                hint = f"fastcifar {verb} {shlex.quote(str(path))}, or another --out"
                raise UsageError(f"--out: {path} already holds a run.", hint)
        make_folder(path)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        if not os.path.isfile(path / "config.yaml"):  # unlike Path.is_file, it never raises
            raise UsageError(f"{path} holds no run: there is no config.yaml in it.", "ls runs")
        return cls(path)

    @classmethod
    def scratch(cls, resumed: Path | None) -> "RunFolder":
        """For a process that keeps nothing: a temporary folder, with the checkpoint of the run that it resumes."""
        path = Path(tempfile.mkdtemp(prefix="fastcifar-"))
        if resumed is not None and (resumed / "checkpoint.safetensors").exists():
            shutil.copy(resumed / "checkpoint.safetensors", path)
        return cls(path)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else trains in this folder meanwhile. Raises UsageError: somebody does.

        It is the kernel's lock on a file: after a kill -9 it is gone.
        """
        from filelock import FileLock, Timeout

        file = self.path / ".lock"
        lock = FileLock(file, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            hint = "the same once it has ended; a new run: another --out DIR"
            raise UsageError(f"{self.path}: another process is training in this folder.", hint) from error
        except OSError as error:
            raise cannot_write(file, error) from error
        try:
            yield
        finally:
            file.unlink(missing_ok=True)  # while it is locked: no other process can have it yet
            lock.release()

    def write_config(self, config: dict) -> None:
        write_atomically(self.path / "config.yaml", dump_yaml(config).encode())

    def write_model(self, state: dict) -> None:
        from safetensors.torch import save

        write_atomically(self.path / "model.safetensors", save({name: t.contiguous() for name, t in state.items()}))

    def read_model(self) -> dict:
        """The trained weights by name. Raises UsageError if there are none, or they are damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path / "model.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            hint = f"fastcifar train --resume {shlex.quote(str(self.path))}"
            raise UsageError(f"{path}: no trained model can be read ({error}).", hint) from error

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        from safetensors.torch import save

        facts = asdict(replace(checkpoint, tensors={}))  # it copies what it is given, deeply
        del facts["tensors"]
        tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
        write_atomically(self.path / "checkpoint.safetensors", save(tensors, {"facts": json.dumps(facts)}))

    def read_checkpoint(self) -> Checkpoint:
        """The newest checkpoint. Raises UsageError if the run has none: finished, or stopped before its first one."""
        from safetensors import SafetensorError, safe_open

        path, here = self.path / "checkpoint.safetensors", shlex.quote(str(self.path))
        again = f"fastcifar train --config {here}/config.yaml"
        if (self.path / "result.json").exists():
            raise UsageError(f"{self.path}: this run is finished.", f"fastcifar eval {here}")
        if not path.exists():
            raise UsageError(f"{self.path}: stopped before its first checkpoint, nothing to resume.", again)
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()["facts"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts["knots"] = [Knot(**knot) for knot in facts["knots"]]
            return Checkpoint(tensors=tensors, **facts)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path}: damaged ({error}).", again) from error

    def finish(self, result: dict) -> None:
        """Write result.json, after which the run is complete and the checkpoint goes."""
        write_json(self.path / "result.json", result)
        for file in self.path.glob("*checkpoint.safetensors*"):  # also the halves that a kill -9 left
            file.unlink(missing_ok=True)


class Metrics:
    """metrics.jsonl, a line a step, each written in one call so that a reader never sees half of one."""

    def __init__(self, folder: RunFolder, steps_done: int = 0):
        """Open for appending; lines of steps after `steps_done` were made past the checkpoint and are dropped."""
        self.path = folder.path / "metrics.jsonl"
        self.rows: list[dict] = []
        if steps_done and self.path.exists():
            complete = re.findall(r"^\{.*\}$", self.path.read_text(), flags=re.MULTILINE)
            self.rows = [row for row in map(json.loads, complete) if row["step"] <= steps_done]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        self.file = self.path.open("ab", buffering=0)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        try:
            self.file.write((json.dumps(row) + "\n").encode())
        except OSError as error:
            raise cannot_write(self.path, error) from error
