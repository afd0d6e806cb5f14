"""Other people's CIFAR-10 speed runs, unchanged, on this machine and the same images: their own clocks and accuracies.

    python bench/peers.py --peers DIR --out peers.jsonl [--data PATH] [--runs 20] [--limit 120]

DIR holds the scripts, fetched from where their authors publish them: cifar10-airbench's airbench94_muon.py and
airbench96_faster.py (KellerJordan/cifar10-airbench) and hiverge's cifar10_speedrun.py (hiverge/cifar10-speedrun). Each
is run as it is, in a temporary folder that has our data set where it looks for one, and stopped after so many trainings
or its share of the limit in seconds; what it has printed by then is read. A line of the file for each script.

A training that a script itself calls "warmup" is no result. A script without one compiles in its first training: that
one's accuracy counts, its seconds are kept apart.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from fastcifar.data import source
from fastcifar.data.dataset import Dataset
from fastcifar.display import Display
from fastcifar.run import write_atomically

SCRIPTS = ("airbench94_muon.py", "airbench96_faster.py", "cifar10_speedrun.py")
COULD_NOT_READ = "could not read: the output has no row with tta_val_acc and time_seconds"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds, for all of them together")
    chosen = parser.parse_args()
    deadline_s = time.monotonic() + chosen.limit
    dataset = source.load("cifar10", chosen.data, Display().work)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_layout(dataset, Path(folder) / "cifar10")
        for number, name in enumerate(SCRIPTS):
            share_s = (deadline_s - time.monotonic()) / (len(SCRIPTS) - number)
            rows.append(measure(chosen.peers / name, Path(folder), chosen.runs, share_s))
            rows[-1]["data_verified"] = dataset.verified
            print(json.dumps({key: value for key, value in rows[-1].items() if key != "trainings"}), flush=True)
            write_atomically(chosen.out, "".join(json.dumps(row) + "\n" for row in rows).encode())


def write_layout(dataset: Dataset, folder: Path) -> None:
    """train.pt and test.pt as these scripts write them: images [N, 32, 32, 3] in uint8, labels, names of classes."""
    folder.mkdir()
    for name in ("train", "test"):
        split = getattr(dataset, name)
        images_NHWC, labels_N = (
            torch.from_numpy(np.array(split.images_NHWC)),
            torch.from_numpy(np.array(split.labels_N)),
        )
        content = {"images": images_NHWC, "labels": labels_N.long(), "classes": list(dataset.class_names)}
        torch.save(content, folder / f"{name}.pt")


def measure(script: Path, folder: Path, runs: int, limit_s: float) -> dict:
    """Run one script there until it has trained so often, or for so long; what it said of itself."""
    if not script.is_file():
        return {"script": script.name, "not_measured": f"there is no {script.name} in --peers"}
    said, ended = run_script(script, folder, runs, limit_s)
    trainings, warmed_up = read_trainings(said)
    if not trainings:
        last = (said.strip().splitlines() or ["nothing"])[-1][:300]
        return {"script": script.name, "not_measured": f"{COULD_NOT_READ} ({ended}); it said last: {last}"}
    trainings = trainings[:runs]
    timed = trainings if warmed_up else trainings[1:]
    accuracies, train_s = [run["accuracy"] for run in trainings], [run["train_s"] for run in timed]
    return {
        "script": script.name,
        "n": len(trainings),
        "accuracy": statistics.mean(accuracies),
        "accuracy_deviation": statistics.stdev(accuracies) if len(trainings) > 1 else None,
        "train_s": statistics.median(train_s) if train_s else None,
        "first_train_s": None if warmed_up else trainings[0]["train_s"],
        "ended": ended,
        "trainings": trainings,
    }


def run_script(script: Path, folder: Path, runs: int, limit_s: float) -> tuple[str, str]:
    """(what it printed, how it ended)"""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # or it keeps to itself what it has printed when we stop it
    command = [sys.executable, str(script.absolute())]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    # With a session of its own, so that what it started to compile ends with it.
    with subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **how) as process:
        stopped = threading.Event()

        def kill() -> None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        def stop() -> None:
            stopped.set()
            kill()

        timer = threading.Timer(max(0.0, limit_s), stop)
        timer.start()
        said, enough = "", False
        assert process.stdout is not None
        for line in process.stdout:
            said += line
            if len(read_trainings(said)[0]) >= runs:
                enough = True
                break
        timer.cancel()
        if enough:
            kill()
        process.wait()
    if enough:
        return said, f"stopped after {runs} trainings"
    return said, f"stopped after {limit_s:.0f} s" if stopped.is_set() else f"exit code {process.returncode}"


def read_trainings(said: str) -> tuple[list[dict], bool]:
    """([accuracy with test-time augmentation and seconds of each training], whether there was one to warm up)

    They print a table whose heading names the columns; a training's last row has "eval" for its epoch, and its number
    stands in its first row only.
    """
    columns: list[str] = []
    trainings, run, warmed_up = [], "", False
    for line in re.split(r"[\r\n]+", said):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if "tta_val_acc" in cells:
            columns = cells
            continue
        if len(cells) != len(columns) or not line.strip().startswith("|"):
            continue
        row = dict(zip(columns, cells, strict=True))
        run = row.get("run") or run
        warmed_up |= run == "warmup"
        if row.get("epoch") != "eval" or run == "warmup":
            continue
        seconds = next((row[name] for name in columns if name.endswith("time_seconds")), "")
        try:
            trainings.append({"run": run, "accuracy": float(row["tta_val_acc"]), "train_s": float(seconds)})
        except ValueError:  # a table, but not of figures
            continue
    return trainings, warmed_up


if __name__ == "__main__":
    main()
