"""What a training does on a GPU, on one that is imitated: every tensor is there, nothing waits, all learn the same."""

import json
from dataclasses import replace

import pytest
import torch
from imitated_gpu import imitated_gpu

from fastcifar.benchmarks import train as bench_train
from fastcifar.budget import Knot, Pace, Position
from fastcifar.cli import main
from fastcifar.display import Display
from fastcifar.job import Job
from fastcifar.looks import Looks
from fastcifar.recipes import find_recipe
from fastcifar.settings import SpeedNetModel
from fastcifar.setup import set_up
from fastcifar.studies import tune_batch
from fastcifar.train import fit

SMALL = "--model.widths", "[8,8,8]"
BLOCKS = "--model.groups", "[[8,16],[16]]"


@pytest.fixture
def gpu():
    with imitated_gpu() as state:
        yield state


def test_the_imitation_refuses_what_a_gpu_does(gpu):
    here, there = torch.arange(3.0), torch.arange(3.0, device="cuda")
    assert there.is_cuda
    assert there.device == torch.device("cuda:0")
    assert (there + there.new_ones(3) * 2).tolist() == [2, 3, 4]
    assert (there * here.sum()).cpu().tolist() == [0, 3, 6], "a single number may come from anywhere"
    for mixed in (
        lambda: here + there,
        lambda: there.add_(here),
        lambda: torch.cat([there, here]),
        lambda: here[there.long()],
        lambda: there.numpy(),
        lambda: torch.nn.functional.linear(there[None], here[None]),
    ):
        with pytest.raises((RuntimeError, TypeError), match=r"on the CPU|convert cuda:0"):
            mixed()


def test_the_imitation_knows_who_waits(gpu, monkeypatch):
    there = torch.arange(3.0, device="cuda")
    waiting = {
        "item": lambda: there.sum().item(),
        "float": lambda: float(there[1]),
        "cpu": lambda: there.cpu(),
        "copy from the CPU": lambda: torch.ones(3).to("cuda"),
        "as many as there are": lambda: there[there > 1],
        "if": lambda: bool(there[1]),
    }
    for name, wait in waiting.items():
        before = gpu.waits
        wait()
        assert gpu.waits > before, name
    before = gpu.waits
    _ = (there * 2).relu_().max() + there[there.long()].sum()
    assert gpu.waits == before
    monkeypatch.setattr(gpu, "recording", True)
    for wait in waiting.values():
        with pytest.raises(RuntimeError, match="capturing"):
            wait()


@pytest.mark.parametrize(
    "words",
    [
        ("speed", *SMALL),
        ("speed", *SMALL, "--members", "2", "--loader", "torch"),
        ("speed96", *SMALL, "--model.fused_gelu", "true"),
        ("airbench94", *SMALL),
        ("mlp", "--model.dropout", "0"),
        ("cnn2", "--as-reported", "--model.block_dropout", "0"),
        ("cnn4", "--mix", "mixup"),
        ("dynamic11", *BLOCKS),
        ("dynamic4", *BLOCKS, "--as-reported"),
    ],
    ids=" ".join,
)
def test_recipes_train_as_on_the_cpu(words, small_cifar, tmp_path):
    """Six steps, as graphs where those can hold them, and an evaluation; in float32, to compare."""
    words = *words, "--dtype", "float32"
    here = train(small_cifar, tmp_path / "here", *words)
    with imitated_gpu():
        there = train(small_cifar, tmp_path / "there", *words)
    assert len(here) == 6
    assert there[0] == pytest.approx(here[0], rel=1e-4)
    assert there == pytest.approx(here, rel=0.03)  # rounding grows; GELU is a polynomial in one of them


def train(small_cifar, out, *words):
    """The loss of each step."""
    few = "--steps", "6", "--batch_size", "16"
    assert main(["train", "--recipe", *words, *few, *data(small_cifar), "--out", str(out)]) == 0
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def data(small_cifar):
    return "--dataset", "cifar10", "--data", str(small_cifar)


@pytest.mark.parametrize("loader", ["resident", "ffcv"])
def test_nothing_waits_for_the_gpu_but_who_reads_the_loss(loader, gpu, small_cifar):
    """A GPU that is waited for has nothing to do until the next step has been started."""
    recipe = replace(find_recipe("speed"), batch_size=100, min_steps=0, model=SpeedNetModel(widths=(8, 8, 8)))
    if loader == "ffcv":
        pytest.importorskip("ffcv")
    setup = set_up(Job("speed", recipe, data=small_cifar, loader=loader), Display())
    pace = Pace(recipe.stages, [Knot(0, 0.0, 3 * len(setup.loader))])
    found = []
    for rows in fit(setup, recipe, pace, Position(), Looks(None, 100)):
        found.append((len(rows), gpu.waits))
        gpu.waits = 0
    assert found[1:] == [(steps, 1) for steps in (2, 4, 8, 16, 20, 9)]


def test_every_command_knows_a_gpu(gpu, small_cifar, tmp_path, monkeypatch, capsys):
    """Without --device. What they find out is for the tests of their own."""
    monkeypatch.setattr(tune_batch, "LEAST_S", 0.0)
    monkeypatch.setattr(bench_train, "ROUNDS", {"cuda": 2})
    monkeypatch.setattr(bench_train, "STEPS", {"cuda": 1})
    monkeypatch.setattr(bench_train, "PEAK_SIZES", {"cuda": (64,)})
    out, cnn4 = str(tmp_path / "run"), ("--recipe", "cnn4", *data(small_cifar))
    for words in (
        ("train", *cnn4, "--steps", "2", "--out", out),
        ("eval", out, "--data", str(small_cifar)),
        ("tune", "lr", *cnn4, "--batch_size", "16", "--out", str(tmp_path / "lr")),
        ("tune", "batch", *cnn4, "--out", str(tmp_path / "batch")),
        ("bench", "train", *cnn4, "--out", str(tmp_path / "train.json")),
        ("plan", "--budget", "30s"),  # but `bench loaders`: DALI asks the driver itself
    ):
        assert main(list(words)) == 0, words
    for name in "run/result.json", "batch/tune.json", "train.json":
        assert "an imitated GPU" in (tmp_path / name).read_text(), name
