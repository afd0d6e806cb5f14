"""Several processes under torchrun, talking over gloo, beside one process that does the same alone."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastcifar.data import shapes10
from fastcifar.loaders.resident import ResidentLoader
from fastcifar.settings import Augment

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]  # at a free port
RECIPES = {
    # Classic optimizers pass a rounding on as they get it. BatchNorm inside a fused operator, and of vectors.
    "cnn4": ["--recipe", "cnn4", "--model.blocks", "[[8],[16]]", "--model.dropout", "0", "--batch-size", "64"],
    "mlp": ["--recipe", "mlp", "--model.hidden", "[32]", "--model.dropout", "0", "--batch-size", "64"],
}


def command(processes: int, data: Path, *words: str) -> list[str]:
    start = [*TORCHRUN, str(processes)] if processes > 1 else [sys.executable]
    return [*start, "-m", "fastcifar", "train", "--data", str(data), "--device", "cpu", *words]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(folder: Path, processes: int, data: Path, *words: str) -> tuple[list[dict], dict]:
    """(metrics, result) of a training; the result as it was printed, on the last line of stdout."""
    done = subprocess.run(
        command(processes, data, *words, "--json", "--out", str(folder)), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1, "rank 0 alone speaks"
    return rows(folder), json.loads(lines[0])


@pytest.mark.parametrize(("name", "processes"), [("cnn4", 4), ("mlp", 2)])
def test_processes_train_as_one_does(name, processes, small_cifar, tmp_path):
    words = [*RECIPES[name], "--dtype", "float32", "--steps", "12"]
    (alone, result), (together, result_together) = (
        train(tmp_path / f"{n}", n, small_cifar, *words) for n in (1, processes)
    )
    assert [row["loss"] for row in together] == pytest.approx([row["loss"] for row in alone], rel=1e-3)
    assert [row["lr"] for row in together] == [row["lr"] for row in alone]
    for key in ("steps", "epochs", "params", "recipe"):
        assert result_together[key] == result[key]
    assert (result["processes"], result_together["processes"]) == (1, processes)
    assert result_together["test_acc"] == pytest.approx(result["test_acc"], abs=0.02)


def test_speed_on_two_processes_begins_as_one_does(small_cifar, tmp_path):
    """Muon makes much of a rounding, so the curves part after some steps; the first gradient differs by no more."""
    words = ["--batch-size", "128", "--model.widths", "[16,32,32]", "--dtype", "float32", "--steps", "3"]
    (alone, _), (together, _) = (train(tmp_path / f"{n}", n, small_cifar, *words) for n in (1, 2))
    losses = [[row["loss"] for row in some] for some in (alone, together)]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)
    assert losses[1][1] == pytest.approx(losses[0][1], rel=1e-3)


@pytest.mark.clock
def test_a_budget_is_kept_by_two_processes(small_cifar, tmp_path):
    """They measure different times and yet must agree on every step."""
    words = ["--recipe", "speed", "--model.widths", "[16,32,32]", "--batch-size", "128"]
    out, budget_s = tmp_path / "run", 40
    for _ in range(3):
        words_now = [*words, "--budget", f"{budget_s}s", "--out", str(out)]
        done = subprocess.run(command(2, small_cifar, *words_now), capture_output=True, text=True)
        if not (asked := re.search(r"try: --budget (\d+)s", done.stderr)):
            break
        budget_s = int(asked[1])  # which this machine needs
    assert done.returncode == 0, done.stderr
    metrics, result = rows(out), json.loads((out / "result.json").read_text())
    assert metrics[-1]["progress"] == 1
    assert 0.9 * budget_s <= result["wall_s"] <= budget_s + max(1, 0.02 * budget_s)
    assert result["steps"] == len(metrics)


def test_an_interrupted_training_goes_on_with_two_processes(small_cifar, tmp_path):
    words = [*RECIPES["mlp"], "--dtype", "float32", "--steps", "500"]
    out = tmp_path / "run"
    process = subprocess.Popen(command(2, small_cifar, *words, "--out", str(out)), stderr=subprocess.PIPE, text=True)
    while not ((out / "metrics.jsonl").exists() and len(rows(out)) > 20):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    done = len(rows(out))
    assert done < 500
    assert (out / "checkpoint.safetensors").exists()
    start = [*TORCHRUN, "2", "-m", "fastcifar", "train", "--resume", str(out)]
    resumed = subprocess.run(start, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert [row["step"] for row in rows(out)] == list(range(1, 501))


@pytest.mark.parametrize("mistake", ["none", "made"])
def test_one_process_goes_before_the_others(mistake, tmp_path):
    """As when data are downloaded and written: once, and whole before anybody else looks."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from fastcifar.errors import UserError\n"
        "from fastcifar.ranks import joined\n"
        "file = Path(sys.argv[1])\n"
        "with joined('cpu') as ranks:\n"
        "    try:\n"
        "        with ranks.first_here():\n"
        "            found = file.read_text() if file.exists() else ''\n"
        "            time.sleep(0.5)\n"
        "            file.write_text(found + str(ranks.rank))\n"
        "            if sys.argv[2] == 'made': raise UserError('mistake')\n"
        "    except UserError:\n"
        "        Path(f'{file}-{ranks.rank}').touch()\n"
    )
    done = subprocess.run([*TORCHRUN, "2", str(script), str(tmp_path / "log"), mistake], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log").read_text() == "01"
    assert len(list(tmp_path.glob("log-*"))) == (2 if mistake == "made" else 0)


def test_a_batch_that_cannot_be_divided_is_refused(small_cifar, tmp_path):
    words = [*RECIPES["mlp"], "--steps", "2", "--out", str(tmp_path / "run")]
    done = subprocess.run(command(2, small_cifar, *words, "--batch-size", "63"), capture_output=True, text=True)
    assert done.returncode != 0
    assert "63 images cannot be divided among 2 processes" in done.stderr
    assert "try: --batch_size 62" in done.stderr


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_image_goes_to_one_rank(ranks):
    split = shapes10.generate(200, 10).train
    how = {"dtype": torch.float32, "device": torch.device("cpu"), "augment": Augment(), "shuffle": True}
    whole = ResidentLoader(split, batch_size=40, **how)
    parts = [ResidentLoader(split, batch_size=40 // ranks, part=(rank, ranks), **how) for rank in range(ranks)]
    assert {len(part) for part in parts} == {len(whole)}
    for first_batch in (0, 3):
        batches = [list(loader.epoch(1, first_batch)) for loader in (whole, *parts)]
        assert len(batches[0]) == 5 - first_batch
        for (x_BCHW, y_B), *some in zip(*batches, strict=True):
            assert torch.equal(torch.cat([y for _, y in some]), y_B)
            assert torch.equal(torch.cat([x for x, _ in some]), x_BCHW)


def test_cores_are_shared(monkeypatch):
    from fastcifar.process import physical_cores

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    cores = physical_cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert physical_cores() == max(1, cores // 2)
