"""`fastcifar bench train` at a small size, and the conclusions it draws."""

import json
import math
import statistics
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from scipy import stats

from fastcifar.benchmarks import energy, seeds
from fastcifar.benchmarks import train as benchmark
from fastcifar.cli import main
from fastcifar.display import Display
from fastcifar.errors import UsageError
from fastcifar.job import Job
from fastcifar.recipes import NAMED, find_recipe
from fastcifar.settings import SpeedNetModel


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(benchmark, "PEAK_SIZES", {"cpu": (64, 128)})
    monkeypatch.setattr(benchmark, "ROUNDS", {"cpu": 2})
    tiny = replace(NAMED["speed"].recipe, batch_size=64, model=SpeedNetModel(widths=(8, 16, 16)))
    monkeypatch.setitem(NAMED, "speed", replace(NAMED["speed"], recipe=tiny))


def plan(folder, **changes) -> seeds.Plan:
    where = {"dataset": "cifar10", "data": None, "device": "cpu"}
    return seeds.Plan(**{"recipes": ["speed"], "seeds": 2, "where": where, "folder": folder} | changes)


def test_each_image_size_is_measured_and_the_figures_agree(small_cifar, tmp_path, capsys):
    words = ["--recipe", "speed", "--device", "cpu", "--data", str(small_cifar), "--out", str(tmp_path / "bench.json")]
    assert main(["bench", "train", *words]) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [row["image_px"] for row in report["rows"]] == [20, 24, 32]
    for row in report["rows"]:
        assert 0 < row["p20_images_per_s"] <= row["images_per_s"] <= row["p80_images_per_s"]
        assert row["tflop_per_s"] == pytest.approx(row["images_per_s"] * row["flop_per_image"] / 1e12)
        assert row["share_of_matrix_peak"] == pytest.approx(row["tflop_per_s"] / row["matrix_peak_tflop_per_s"])
        assert row["joules_per_1000_images"] is None
        assert row["peak_memory_bytes"] is None
    said = capsys.readouterr().out
    assert said.count("| speed |") == 3
    assert "| not measured | not measured |" in said
    assert "Energy: not measured, only a GPU's driver counts energy." in said


def test_flop_of_a_network_counted_by_hand():
    """A 32-pixel image through 8, 16, 16 channels: 31 pixels after whitening, then 15, 7 and 3."""
    recipe = find_recipe("speed")
    whiten = 31**2 * 32 * 12  # its weights are frozen and nothing is before it: forward only
    first = 31**2 * 8 * 32 * 9  # the gradients of weights and of the input, which the whitening's bias waits for
    rest = (15**2 * 8 * 8 + 15**2 * 16 * 8 + 7**2 * 16 * 16 + 7**2 * 16 * 16 + 3**2 * 16 * 16) * 9 + 16 * 10
    assert benchmark.count_flop(recipe, 10, 32) == 2 * (whiten + 3 * (first + rest))


def test_flop_of_dynamic_convolutions_counted_by_hand():
    """As if the four of each block were plain: that is done in blocks, or as matrix products, does not hide it."""
    experts, channels, pixels = 4, (3, 64, 128, 256, 512), (32**2, 32**2, 16**2, 16**2)
    layers = [p * (9 * experts + 1) * c * o for p, c, o in zip(pixels, channels, channels[1:], strict=False)]
    gates, head = 4 * sum(channels[:4]), 512 * 256 + 256 * 128 + 128 * 10
    images_have_no_gradient = layers[0]  # but for the gate's mean, a sum
    counted = benchmark.count_flop(find_recipe("dynamic4"), 10, 32)
    assert counted == pytest.approx(2 * (3 * (sum(layers) + gates + head) - images_have_no_gradient), rel=1e-4)


def test_own_operators_do_not_hide_arithmetic():
    recipe = NAMED["airbench94"].recipe
    assert benchmark.count_flop(recipe, 10, 32) == benchmark.count_flop(
        replace(recipe, model=replace(recipe.model, own_kernels=True)), 10, 32
    )
    published = 0.29e15 / (8 * 50_000)  # FLOP an image, of the paper's run
    assert benchmark.count_flop(recipe, 10, 32) == pytest.approx(published, rel=0.05)


def test_a_recipe_that_cannot_be_set_up_takes_nothing_else_with_it(small_cifar, tmp_path, monkeypatch, capsys):
    from fastcifar.benchmarks.train import set_up

    def refuse(job, display):
        if job.recipe == "mlp":
            raise RuntimeError("no such kernel\nat line 7")
        return set_up(job, display)

    monkeypatch.setattr(benchmark, "set_up", refuse)
    words = ["--recipe", "mlp", "speed", "--device", "cpu", "--data", str(small_cifar)]
    assert main(["bench", "train", *words, "--out", str(tmp_path / "bench.json")]) == 1
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["failed"] == {"mlp": "RuntimeError: no such kernel"}
    assert {row["recipe"] for row in report["rows"]} == {"speed"}
    assert "| mlp | | not measured: RuntimeError: no such kernel |" in capsys.readouterr().out


def test_a_data_set_that_is_not_here_takes_no_other_with_it(small_cifar, tmp_path):
    words = ["--recipe", "mlp", "speed100", "--device", "cpu", "--data", str(small_cifar)]
    assert main(["bench", "train", *words, "--out", str(tmp_path / "bench.json")]) == 1
    report = json.loads((tmp_path / "bench.json").read_text())
    assert {row["dataset"] for row in report["rows"]} == {"cifar10"}
    assert list(report["failed"]) == ["speed100"]
    assert main(["bench", "train", "--recipe", "speed100", *words[3:]]) == 3


def test_steps_whose_loss_is_no_number_are_not_measured(small_cifar):
    job = Job("speed", find_recipe("speed"), data=small_cifar, device="cpu", steps=1)
    course = benchmark.Course(benchmark.set_up(job, Display()), 20)
    with torch.no_grad():
        course.setup.model.head.weight.fill_(math.nan)  # type: ignore[union-attr]
    with pytest.raises(ArithmeticError, match=r"speed, 20 px: the loss became nan"):
        course.sample()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "2"], "--seeds"),
        (["--seeds", "-1", "--out", "x.json"], "--seeds"),
        (["--target", "0.9"], "--seeds"),
        (["--seeds", "2", "--target", "94", "--out", "x.json"], "--target"),
        (["--recipe", "nosuch"], "nosuch"),
    ],
)
def test_wrong_usage_is_named_before_anything_is_measured(words, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "set_up", lambda *_: pytest.fail("measured first"))
    assert main(["bench", "train", *words]) == 2
    assert said in capsys.readouterr().err


# The energy counter


def test_energy_is_read_from_the_driver_by_the_gpus_uuid(monkeypatch):
    class NVMLError(Exception):
        pass

    fake, asked = ModuleType("pynvml"), []
    fake.NVMLError = NVMLError  # type: ignore[attr-defined]
    fake.nvmlInit = lambda: None  # type: ignore[attr-defined]
    fake.nvmlDeviceGetHandleByUUID = lambda uuid: asked.append(uuid) or uuid  # type: ignore[attr-defined]
    fake.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 2500  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    read, why = energy.open_counter(torch.device("cuda"))
    assert read is not None
    assert (read(), why, asked) == (2.5, "", ["GPU-abc"])

    def refuse(handle):
        raise NVMLError("Not Supported")

    fake.nvmlDeviceGetTotalEnergyConsumption = refuse  # type: ignore[attr-defined]
    assert energy.open_counter(torch.device("cuda")) == (None, "the driver does not report it (Not Supported)")


def test_without_pynvml_energy_is_not_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    read, why = energy.open_counter(torch.device("cuda"))
    assert read is None
    assert "fastcifar[gpu]" in why


# Complete trainings


def test_seeds_are_trained_once_and_summarised(small_cifar, tmp_path):
    where = {"dataset": "cifar10", "data": small_cifar, "device": "cpu"}
    asked = plan(tmp_path / "bench-runs", recipes=["mlp"], seeds=1, where=where)
    (first,) = seeds.train_all(asked, Display())
    file = asked.run_folder("mlp", 0) / "result.json"
    assert (first.error, first.result["recipe"], first.result["seed"]) == ("", "mlp", 0)
    # A second one, as another call would have left it.
    asked.run_folder("mlp", 1).mkdir()
    other = first.result | {"seed": 1, "test_acc_tta": first.result["test_acc_tta"] / 2}
    (asked.run_folder("mlp", 1) / "result.json").write_text(json.dumps(other))
    written = file.stat().st_mtime_ns
    asked = replace(asked, seeds=2)
    again = seeds.train_all(asked, Display())
    assert [run.result for run in again] == [first.result, other]
    assert file.stat().st_mtime_ns == written
    summary = seeds.summarise(again, asked, target=0.05)
    (row,) = summary["recipes"]
    accuracies = [run.result["test_acc_tta"] for run in again]
    assert row["accuracy"] == {"mean": statistics.mean(accuracies), "standard_deviation": statistics.stdev(accuracies)}
    assert row["p"] == seeds.p_at_least(accuracies, 0.05)
    assert "| mlp | 2 |" in "\n".join(seeds.table(summary))


def test_a_recipe_trains_on_its_own_data_set(tmp_path):
    asked = plan(tmp_path, where={"dataset": None, "data": None, "device": "cpu"})
    for recipe, dataset in ("speed", "cifar10"), ("speed100", "cifar100"):
        flags = asked.flags(recipe, 0)
        assert flags[flags.index("--dataset") + 1] == dataset


def test_a_training_of_other_code_is_not_counted(tmp_path):
    asked = plan(tmp_path)
    folder = asked.run_folder("speed", 1)
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({"commit": "of yesterday", "dataset": "cifar10"}))
    with pytest.raises(UsageError, match="is of commit of yesterday"):
        seeds.train_all(asked, Display())


def test_a_training_that_fails_is_named_and_not_counted(tmp_path):
    asked = plan(tmp_path, seeds=1, where={"dataset": "cifar10", "data": tmp_path / "nothing", "device": "cpu"})
    (run,) = seeds.train_all(asked, Display())
    assert run.result == {}
    assert str(tmp_path / "nothing") in run.error, "what is wrong, not what to try next"
    summary = seeds.summarise([run], asked, target=0.9)
    assert summary["recipes"][0]["n"] == 0
    assert summary["recipes"][0]["p"] is None
    said = "\n".join(seeds.table(summary))
    assert "| speed | 0 of 1 | not measured | not measured |" in said
    assert run.error in said


def test_every_visible_gpu_is_a_worker(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    own = [("cuda", {"CUDA_VISIBLE_DEVICES": gpu}) for gpu in "01"]
    assert seeds.list_devices("auto") == seeds.list_devices("cuda") == own
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-x")
    assert [given["CUDA_VISIBLE_DEVICES"] for _, given in seeds.list_devices("auto")] == ["5", "GPU-x"]
    assert seeds.list_devices("cuda:1") == [("cuda:1", {})]
    assert seeds.list_devices("cpu") == [("cpu", {})]


def test_p_is_students():
    values = [0.9412, 0.9405, 0.9398, 0.9421, 0.9407]
    for target in (0.93, 0.94, 0.9409, 0.95):
        expected = stats.ttest_1samp(values, target, alternative="greater")[1]
        assert seeds.p_at_least(values, target) == pytest.approx(expected, rel=1e-9)
    for freedom in (1, 2, 19, 199):
        for t in (-3.0, 0.0, 0.5, 4.0):
            assert seeds.t_tail(t, freedom) == pytest.approx(stats.t.sf(t, freedom), rel=1e-9)


@pytest.mark.parametrize("values", [[], [0.94], [0.94, 0.94, 0.94]])
def test_without_spread_there_is_no_p(values):
    assert seeds.p_at_least(values, 0.9) is None
