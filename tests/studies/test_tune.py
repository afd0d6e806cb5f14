"""The learning-rate range test and the batch search."""

import json
import math
import re
import subprocess
import sys

import pytest

from fastcifar.errors import DeviceError, DivergedError, UsageError
from fastcifar.studies import tune, tune_batch, tune_lr
from fastcifar.studies.tune_batch import Measured

WORDS = ["--recipe", "mlp", "--device", "cpu", "--model.hidden", "[32]", "--batch_size", "64"]


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(tune_lr, "STEPS", 60)
    monkeypatch.setattr(tune_batch, "LEAST_S", 0.0)


def report_of(words, out) -> dict:
    assert tune.run([*words, "--out", str(out)]) == 0
    assert (out / "tune.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / "tune.json").read_text())


def test_a_learning_rate_is_found_and_found_again(small_cifar, tmp_path, capsys):
    words = ["lr", *WORDS, "--data", str(small_cifar)]
    first = report_of(words, tmp_path / "first")
    said = capsys.readouterr().out
    assert first["flags"] in said
    assert re.fullmatch(r"--optim\.lr [\d.e-]+", first["flags"])
    assert all(map(math.isfinite, (*first["losses"], first["suggested_factor"])))
    assert first["suggested_factor"] == pytest.approx(first["lowest_factor"] / 3)
    assert len(first["losses"]) == len(first["smoothed"]) == len(first["factors"]) <= 60
    again = report_of(words, tmp_path / "again")
    assert again == first, "the weights start fresh, and a seed gives the same batches"
    other = report_of([*words, "--seed", "1"], tmp_path / "other")
    assert other["losses"] != first["losses"]


def test_all_rates_of_speed_are_multiplied_alike(small_cifar, tmp_path):
    words = ["lr", "--device", "cpu", "--batch_size", "32", "--model.widths", "[8,8,8]", "--data", str(small_cifar)]
    report = report_of(words, tmp_path / "run")
    values = dict(re.findall(r"--optim\.(\w+) (\S+)", report["flags"]))
    assert set(values) == {"muon_lr", "bias_lr", "head_lr"}
    assert float(values["head_lr"]) / float(values["muon_lr"]) == pytest.approx(0.67 / 0.24, rel=0.1)


@pytest.mark.parametrize("worst", [3.0, math.inf, math.nan])
def test_the_end_in_which_it_diverges_is_cut(worst, small_cifar, tmp_path, monkeypatch):
    """A loss that falls until the 40th step and is too high from the 45th on, though lower than ever at the end."""
    losses = [2.3 - 0.02 * max(0, step - 15) for step in range(40)] + [1.9] * 5 + [worst] * 10 + [0.1] * 5
    factors = [10 ** (step / 20 - 3) for step in range(60)]
    monkeypatch.setattr(tune_lr, "rise", lambda setup: zip(factors, losses, strict=True))
    report = report_of(["lr", *WORDS, "--data", str(small_cifar)], tmp_path / "run")
    assert 45 <= len(report["losses"]) <= 55
    assert factors[34] <= report["lowest_factor"] <= factors[44]


def test_a_rate_that_explodes_at_once_is_named(small_cifar, tmp_path):
    words = ["lr", *WORDS, "--optim.name", "sgd", "--data", str(small_cifar), "--out", str(tmp_path / "run")]
    with pytest.raises(DivergedError, match=r"--optim\.lr") as caught:
        tune.run([*words, "--optim.lr", "1e30"])
    assert caught.value.hint == "--optim.lr 1e+25"
    assert not (tmp_path / "run").exists()


def test_batches_double_up_to_the_data_set(small_cifar, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune_batch, "stagnates", lambda rows: False)
    words = ["batch", *WORDS[:-2], "--data", str(small_cifar), "--json"]
    report = report_of(words, tmp_path / "run")
    assert [row["batch_size"] for row in report["batches"]] == [32, 64, 128, 256, 512, 1024]
    assert "2000 training images" in report["end"]
    assert report["largest"] == 1024
    best = max(row["images_per_s"] for row in report["batches"])
    suggested = next(row for row in report["batches"] if row["batch_size"] == report["suggested"])
    assert suggested["images_per_s"] >= best / 1.05
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report
    begun = report_of(["batch", *WORDS[:-1], "700", "--data", str(small_cifar)], tmp_path / "700")
    assert [row["batch_size"] for row in begun["batches"]] == [700, 1400]


def rows(*measured: tuple[float, float]) -> list[Measured]:
    return [Measured(32 * 2**n, rate, int(memory)) for n, (rate, memory) in enumerate(measured)]


def test_it_ends_where_doubling_gains_nothing():
    assert not tune_batch.stagnates(rows((100, 0), (100, 0)))
    assert not tune_batch.stagnates(rows((100, 0), (100, 0), (106, 0)))
    assert not tune_batch.stagnates(rows((100, 0), (200, 0), (201, 0)))
    assert tune_batch.stagnates(rows((100, 0), (200, 0), (201, 0), (209, 0)))


def test_memory_is_foretold(small_cifar, tmp_path, monkeypatch):
    # 1 GB and 10 MB an image: 64 images 1.64, 128 images 2.28, so 256 need 3.56.
    assert tune_batch.foretell(rows((1, 1.64e9), (1, 2.28e9))) == pytest.approx(3.56e9)
    made = []

    def time_batch(setup, batch_size):
        made.append(batch_size)
        return Measured(batch_size, batch_size, 10**9 + 10**7 * batch_size)

    monkeypatch.setattr(tune_batch, "time_batch", time_batch)
    monkeypatch.setattr(tune_batch, "free_bytes", lambda device: 3.9e9)
    words = ["batch", *WORDS, "--data", str(small_cifar)]
    report = report_of(words, tmp_path / "run")
    assert made == [64, 128]
    assert "256 would not fit" in report["end"]


def test_running_out_of_memory_ends_it(small_cifar, tmp_path, monkeypatch):
    def time_batch(setup, batch_size):
        if batch_size > most:
            raise RuntimeError("CUDA error: out of memory")
        return Measured(batch_size, batch_size, 10**9)

    monkeypatch.setattr(tune_batch, "time_batch", time_batch)
    words, most = ["batch", *WORDS, "--data", str(small_cifar)], 256
    report = report_of(words, tmp_path / "run")
    assert report["largest"] == 256
    assert "512 did not fit" in report["end"]
    most = 0
    with pytest.raises(DeviceError, match="batches of 64"):
        tune.run(words)


def test_out_of_memory_in_a_range_test_is_named(small_cifar, tmp_path, monkeypatch):
    def measure(job, setup, display):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(tune_lr, "measure", measure)
    with pytest.raises(DeviceError, match="batches of 64"):
        tune.run(["lr", *WORDS, "--data", str(small_cifar), "--out", str(tmp_path / "run")])


def test_a_folder_that_will_not_do_is_refused_before_measuring(small_cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(tune_lr, "measure", None)
    (tmp_path / "tune.json").write_text("{}")
    for out in (tmp_path, tmp_path / "tune.json"):
        with pytest.raises(UsageError, match="--out"):
            tune.run(["lr", *WORDS, "--data", str(small_cifar), "--out", str(out)])
    assert (tmp_path / "tune.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "lr|batch"),
        (["momentum"], "momentum"),
        (["--recipe", "cnn4", "lr"], "lr|batch, not 0.\n  try: fastcifar tune --help"),
        (["lr", "--bogus", "1"], "--bogus"),
        (["lr", "--recipe", "nosuch"], "nosuch"),
        (["batch", "--batch_size", "0"], "batch_size"),
        (["batch", "--batch_size", "many"], "batch_size"),
        (["lr", "--resume", "runs/x"], "--resume"),
    ],
)
def test_wrong_usage_names_the_flag(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        tune.run(words)
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_batch_larger_than_the_set_ends_with_2(small_cifar, tmp_path):
    words = ["tune", "batch", "--batch-size", "3000", "--data", str(small_cifar)]
    done = subprocess.run(
        [sys.executable, "-m", "fastcifar", *words], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert "--batch_size: 3000" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("runs/*"))
