"""Everything worth measuring on a GPU, in one run of less than ten minutes: `make gpu-report`.

    python bench/gpu.py [--out DIR] [--limit 9min] [--only PART ...] [--skip PART ...] [--peers DIR]

The parts run in the order of PARTS, those that an earlier call began in vain last, each in a process of its own that is
killed when its time is over; one that crashes takes nothing else with it. A part that no longer fits is left out.
DIR/report.json and DIR/report.md are written anew after each part, and the same command again measures what is still
missing: with the same DIR, commit and device. What was not measured is there by name, with the reason. Beside them lies
what each part wrote and said.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fastcifar.benchmarks import loaders, train
from fastcifar.budget import parse_duration
from fastcifar.errors import DeviceError, UsageError, UserError, read_error
from fastcifar.run import make_folder, source_commit, write_atomically, write_json

BENCH = Path(__file__).parent
SPEED_RECIPES = {"runs": ("speed94", "airbench94"), "more-runs": ("speed96", "speed95", "speed100", "speed")}
BEST = "best5"
THROUGHPUT = ("speed-narrow", "speed", "speed-wide", "airbench94", "resnet34")  # dynamic ones have a part of their own
RUNS = 20
RESUMED = tuple(SPEED_RECIPES)  # parts that go on with the file of an earlier call
NOT_MEASURED, MEASURED, STOPPED, FAILED = "not measured", "measured", "stopped", "failed"


@dataclass(frozen=True)
class Asked:
    """The arguments."""

    out: Path
    device: str  # "cuda" or "cpu"
    dataset: str
    data: Path | None
    peers: Path | None

    def where(self, *, device: bool = True, dataset: bool = True) -> list[str]:
        """The flags of most parts."""
        words = ["--device", self.device] if device else []
        words += ["--dataset", self.dataset] if dataset else []
        return words + (["--data", str(self.data)] if self.data else [])

    def file(self, name: str) -> Path:
        return self.out / name


@dataclass(frozen=True)
class Part:
    """One thing to measure.

    Args:
        command: what to run, or why that cannot be.
        file: what it writes, in the report's folder; none if what it says is the result.
        least_s, most_s: it is not begun with less time left, and is killed after so much. Guesses: no GPU was at hand.
        cpu_s: the least on a CPU; None needs a GPU.
        show: its figures as lines of Markdown.
    """

    command: Callable[[Asked], list[str] | str]
    file: str
    least_s: float
    most_s: float
    cpu_s: float | None
    show: Callable[[Any], Iterator[str]]


# The parts' commands


def fastcifar(*words: str) -> list[str]:
    return [sys.executable, "-m", "fastcifar", *words]


def script(name: str, *words: str) -> list[str]:
    return [sys.executable, str(BENCH / name), *words]


def throughput_command(asked: Asked) -> list[str]:
    names = THROUGHPUT if asked.device == "cuda" else THROUGHPUT[:1]
    return fastcifar("bench", "train", "--recipe", *names, *asked.where(), "--out", str(asked.file("train.json")))


def runs_command(part: str) -> Callable[[Asked], list[str]]:
    def command(asked: Asked) -> list[str]:
        where = ["--runs", str(RUNS), *asked.where(dataset=False), "--out", str(asked.file(f"{part}.jsonl"))]
        return script("gpu_runs.py", "--recipes", *SPEED_RECIPES[part], *where)

    return command


def peers_command(asked: Asked) -> list[str] | str:
    if asked.peers is None:
        return "no --peers DIR"
    limit = ["--limit", str(PARTS["peers"].most_s - 20)]
    words = ["--peers", str(asked.peers), "--runs", str(RUNS), *limit, *asked.where(device=False, dataset=False)]
    return script("peers.py", *words, "--out", str(asked.file("peers.jsonl")))


def budget_command(asked: Asked) -> list[str]:
    recipe = ["--recipe", BEST] if asked.device == "cuda" else []
    return fastcifar(
        "train", "--budget", "5min", *recipe, *asked.where(), "--json", "--out", tempfile.mkdtemp() + "/run"
    )


# Their figures as Markdown


def show_environment(facts: dict) -> Iterator[str]:
    yield f"- {facts['machine']}; " + ("; ".join(f"{gpu['name']}, sm_{gpu['sm']}" for gpu in facts["gpus"]) or "no GPU")
    smi = facts["nvidia_smi"]
    for gpu in smi if isinstance(smi, list) else [{"driver": smi}]:
        yield "- " + ", ".join(f"{name} {value}" for name, value in gpu.items())
    yield f"- Python {facts['python']}, CUDA {facts['cuda_of_torch']}, " + ", ".join(
        f"{name} {version or 'not installed'}" for name, version in facts["versions"].items()
    )
    yield f"- commit {facts['commit']}"


def show_verdicts(said: str) -> Iterator[str]:
    lines = said.splitlines()
    yield from (f"- {line}" for line in lines if line.endswith("passed."))
    yield from (f"- `{' '.join(line.split())}`" for line in lines if " MISS " in line)


def show_kernels(rows: list[dict]) -> Iterator[str]:
    yield "| operator | pass | N, K, C, H, W | kernel | eager | compiled | of copy bandwidth |"
    yield "|---|---|---|---:|---:|---:|---:|"
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["pass"], *row["shape_NKCHW"]), {})[row["candidate"]] = row
    for (op, direction, *shape), of in groups.items():
        times = (f"{of[name]['median_s'] * 1e3:.3f} ms" if name in of else NOT_MEASURED for name in CANDIDATES)
        kernel = of["kernel"]
        share = kernel["bytes"] / kernel["median_s"] / 1e9 / kernel["copy_gb_per_s"]
        yield f"| {op} | {direction} | {', '.join(map(str, shape))} | {' | '.join(times)} | {share:.0%} |"


CANDIDATES = ("kernel", "eager", "compiled")


def show_runs(rows: list[dict]) -> Iterator[str]:
    yield "| recipe | n | accuracy with TTA, mean ± deviation | training, median | with evaluation |"
    yield "|---|---:|---:|---:|---:|"
    for name in dict.fromkeys(row["recipe"] for row in rows):
        runs = [row for row in rows if row["recipe"] == name and "train_s" in row]
        for row in rows:
            if row["recipe"] == name and "not_measured" in row:
                yield f"| {name}, seed {row['seed']} | | {NOT_MEASURED}: {row['not_measured']} | | |"
        if runs:
            train_s = statistics.median(row["train_s"] for row in runs)
            both_s = statistics.median(row["train_s"] + row["eval_s"] for row in runs)
            accuracies = spread([row["accuracy_tta"] for row in runs])
            yield f"| {name} | {len(runs)} | {accuracies} | {train_s:.3f} s | {both_s:.3f} s |"


def spread(shares: list[float]) -> str:
    return f"{statistics.mean(shares):.2%}" + (f" ± {statistics.stdev(shares):.2%}" if len(shares) > 1 else "")


def show_peers(rows: list[dict]) -> Iterator[str]:
    yield "| script, unchanged | n | its accuracy, mean ± deviation | its clock, median | ended |"
    yield "|---|---:|---:|---:|---|"
    for row in rows:
        if "not_measured" in row:
            yield f"| {row['script']} | | {NOT_MEASURED}: {row['not_measured']} | | |"
            continue
        clock = NOT_MEASURED if row["train_s"] is None else f"{row['train_s']:.3f} s"
        accuracies = spread([run["accuracy"] for run in row["trainings"]])
        yield f"| {row['script']} | {row['n']} | {accuracies} | {clock} | {row['ended']} |"


def show_dynamic(report: dict) -> Iterator[str]:
    yield f"| recipe, {report['image_px']} pixels, images/s | eager | compiled | with our operators |"
    yield "|---|---:|---:|---:|"
    for name, rates in report["recipes"].items():
        cells = (f"{rates[way]:,.0f}" if way in rates else NOT_MEASURED for way in ("eager", "compiled", "kernels"))
        yield f"| {name} | {' | '.join(cells)} |"
    yield from (f"\n{name}: {NOT_MEASURED}, {why}" for name, why in report["failed"].items())


def show_choices(report: dict) -> Iterator[str]:
    yield f"| speed, {report['image_px']} pixels | images/s |"
    yield "|---|---:|"
    yield from (f"| {name} | {rate:,.0f} |" for name, rate in report["images_per_s"].items())
    yield from (f"\n{name}: {NOT_MEASURED}, {why}" for name, why in report["failed"].items())


def show_budget(said: str) -> Iterator[str]:
    result = json.loads(said.strip().splitlines()[-1])
    yield f"- {result['recipe']} on {result['dataset']}: {result['test_acc_tta']:.2%} after {result['wall_s']:.1f} s"


# By what they are worth; a second call takes up what was not begun before what was killed.
PARTS: dict[str, Part] = {
    "environment": Part(
        lambda asked: script("gpu_environment.py", "--out", str(asked.file("environment.json"))),
        "environment.json", 5, 30, 5, show_environment,
    ),
    "throughput": Part(throughput_command, "train.json", 60, 200, 60, train.table),
    "runs": Part(runs_command("runs"), "runs.jsonl", 100, 300, None, show_runs),
    "kernels": Part(
        lambda asked: fastcifar("bench", "kernels", "--out", str(asked.file("kernels.jsonl"))),
        "kernels.jsonl", 40, 250, 400, show_kernels,
    ),
    "verify": Part(
        lambda asked: script("gpu_verify.py") if asked.device == "cuda" else fastcifar("verify-kernels"),
        "", 60, 250, 600, show_verdicts,
    ),
    "more-runs": Part(runs_command("more-runs"), "more-runs.jsonl", 120, 500, None, show_runs),
    "dynamic": Part(
        lambda asked: script("gpu_dynamic.py", *asked.where(), "--out", str(asked.file("dynamic.json"))),
        "dynamic.json", 70, 180, None, show_dynamic,
    ),
    "loaders": Part(
        lambda asked: fastcifar("bench", "loaders", *asked.where(), "--out", str(asked.file("loaders.json"))),
        "loaders.json", 100, 180, 120, loaders.table,
    ),
    "choices": Part(
        lambda asked: script("gpu_choices.py", *asked.where(), "--out", str(asked.file("choices.json"))),
        "choices.json", 120, 250, None, show_choices,
    ),
    "peers": Part(peers_command, "peers.jsonl", 300, 500, None, show_peers),
    "budget": Part(budget_command, "", 310, 330, 310, show_budget),
}  # fmt: skip


# Running them


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: bench/records/DATE-gpu")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--peers", type=Path, help="the folder of the scripts that bench/peers.py names")
    parser.add_argument("--limit", default="9min", help="wall-clock for all parts")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    choice.add_argument("--skip", nargs="+", choices=PARTS, default=[])
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and so through every `finally`
    try:
        deadline_s = time.monotonic() + parse_duration(chosen.limit)
        out = chosen.out or BENCH / "records" / f"{date.today()}-gpu"
        device = pick_kind(chosen.device)
        data = chosen.data.expanduser().absolute() if chosen.data else None
        asked = Asked(out.absolute(), device, chosen.dataset, data, chosen.peers)
        report = open_report(asked)
    except UserError as error:
        print(f"bench/gpu.py: {error}", file=sys.stderr)
        return error.exit_code
    parts = {name: report["parts"].get(name, left_out("not begun")) for name in PARTS}
    for name, before in sorted(parts.items(), key=lambda part: part[1]["status"] in (STOPPED, FAILED)):
        part, wanted = PARTS[name], name in chosen.only and name not in chosen.skip
        if before["status"] == MEASURED:
            continue
        print(f"{name} ...", flush=True)
        found = measure(name, part, asked, deadline_s) if wanted else left_out("not asked for")
        report["parts"][name] = keep(before, found)
        print(f"{name}: {report['parts'][name]['status']} {report['parts'][name]['why']}", flush=True)
        write_report(asked, report)
    print(f"The report: {asked.file('report.md')}")
    return int(any(part["status"] == FAILED for part in report["parts"].values()))


def pick_kind(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"--device: no GPU can be used by torch {torch.__version__} here.", "--device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def open_report(asked: Asked) -> dict:
    """A new one, or that of an earlier call. Raises UsageError: it is of another commit or device."""
    gpu = torch.cuda.get_device_name() if asked.device == "cuda" else None
    fresh = {"commit": source_commit(), "device": gpu or "cpu", "dataset": asked.dataset, "parts": {}}
    make_folder(asked.out)
    file = asked.file("report.json")
    if not file.exists():
        return fresh
    report = json.loads(file.read_text())
    for key in ("commit", "device", "dataset"):
        if report[key] != fresh[key]:
            raise UsageError(f"--out: {file} is of {key} {report[key]}, this is {fresh[key]}.", "another --out DIR")
    return report


def left_out(why: str) -> dict:
    return {"status": NOT_MEASURED, "why": why, "seconds": 0.0, "figures": None}


def keep(before: dict, found: dict) -> dict:
    """What a part that was killed or crashed in an earlier call has left stands until it is begun again."""
    return before if found["status"] == NOT_MEASURED and before["status"] in (STOPPED, FAILED) else found


def measure(name: str, part: Part, asked: Asked, deadline_s: float) -> dict:
    """Run one part, if it can be and there is time; what came of it."""
    if asked.device == "cpu" and part.cpu_s is None:
        return left_out("needs a GPU")
    command = part.command(asked)
    if isinstance(command, str):
        return left_out(command)
    least_s = part.least_s if asked.device == "cuda" or part.cpu_s is None else part.cpu_s
    left_s = deadline_s - time.monotonic()
    if left_s < least_s:
        return left_out(f"no time left: {max(0, left_s):.0f} s of the {least_s:.0f} s that it needs at least")
    # A CPU takes its time; nothing else is waiting for it there.
    limit_s = min(left_s, part.most_s) if asked.device == "cuda" else left_s
    if part.file and name not in RESUMED:
        asked.file(part.file).unlink(missing_ok=True)  # of an earlier call that failed
    began_s = time.monotonic()
    log = asked.file(f"{name}.log")
    code = run(command, log, limit_s, asked.device)
    status, why = {0: (MEASURED, ""), None: (STOPPED, f"killed after {limit_s:.0f} s")}.get(
        code, (FAILED, f"exit code {code}: {read_error(log.read_text(errors='replace'))[0][:300]}")
    )
    figures = read_figures(part, asked, name)
    if figures is None and status == MEASURED:
        status, why = FAILED, "it ended well but left no figures"
    return {"status": status, "why": why, "seconds": time.monotonic() - began_s, "figures": figures}


def run(command: list[str], log: Path, limit_s: float, device: str) -> int | None:
    """The exit code, or None if it was killed for taking too long."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}  # some parts take a GPU wherever there is one
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **hidden}
    how = {"stderr": subprocess.STDOUT, "start_new_session": True, "env": environment}
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, **how) as process:
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):  # with everything that it started
                os.killpg(process.pid, signal.SIGKILL)


def read_figures(part: Part, asked: Asked, name: str) -> object:
    """What the part wrote, or said if it writes nothing; None if that is not there, or half a file."""
    file = asked.file(part.file or f"{name}.log")
    if not file.is_file():
        return None
    text = file.read_text(errors="replace")
    if file.suffix == ".log":
        return text
    with suppress(json.JSONDecodeError):
        return [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)
    return None


def write_report(asked: Asked, report: dict) -> None:
    write_json(asked.file("report.json"), report)
    write_atomically(asked.file("report.md"), ("\n".join(render(report)) + "\n").encode())


def render(report: dict) -> Iterator[str]:
    """The report as Markdown: a section for each part."""
    yield f"# {report['device']}, {report['dataset']}, commit {report['commit']}"
    for name in PARTS:
        found = report["parts"].get(name) or left_out("not begun")
        yield f"\n## {name}\n"
        if found["status"] != MEASURED:
            yield f"{found['status']}: {found['why']}\n" if found["why"] else f"{found['status']}\n"
        if found["figures"] is not None:
            yield from show(name, found["figures"])


def show(name: str, figures: object) -> Iterator[str]:
    """A part's own lines; figures that an interrupted part left unfinished are in report.json only."""
    try:
        yield from list(PARTS[name].show(figures))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        yield f"What it left cannot be shown ({type(error).__name__}: {error}); it is in report.json."


if __name__ == "__main__":
    sys.exit(main())
