"""bench/gpu.py, the report of a GPU, where there is none: what it runs, leaves out, survives and writes."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastcifar.recipes import NAMED

BENCH = Path(__file__).parents[2] / "bench"
PEER = """
import sys, time
import torch
assert torch.load("cifar10/train.pt")["images"].shape[1:] == (32, 32, 3)
assert torch.load("cifar10/test.pt")["labels"].dtype == torch.int64
print("|  run     |  epoch  |  train_acc  |  val_acc  |  tta_val_acc  |  time_seconds  |")
print("-----")
WARM_UP
for run in range(1, 200):
    print("|       %d  |      0  |     0.5000  |   0.4000  |               |        1.0000  |" % run)
    print("|          |   eval  |     0.9800  |   0.9300  |       0.94%02d  |        2.%02d00  |" % (run, run))
    print("Mean accuracy so far: 0.9", end="\\r", flush=True)
    time.sleep(TAKES_S)
"""
WARM_UP = 'print("|  warmup  |   eval  |     0.1000  |   0.1000  |       0.1000  |       70.8453  |")'


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


gpu, peers = load("gpu"), load("peers")


def write_peer(folder: Path, name: str = "airbench94_muon.py", warm_up: str = WARM_UP, takes_s: float = 0) -> Path:
    (folder / name).write_text(PEER.replace("WARM_UP", warm_up).replace("TAKES_S", str(takes_s)))
    return folder / name


# Other people's scripts


def test_peers_are_run_unchanged_on_our_data_and_read(small_cifar, tmp_path, monkeypatch):
    script = write_peer(tmp_path)
    written = script.read_bytes()
    (tmp_path / "airbench96_faster.py").write_text("print('no table')")
    out = tmp_path / "peers.jsonl"
    words = ["--peers", str(tmp_path), "--out", str(out), "--data", str(small_cifar), "--runs", "3", "--limit", "60"]
    monkeypatch.setattr(sys, "argv", ["peers.py", *words])
    peers.main()
    muon, faster, hiverge = (json.loads(line) for line in out.read_text().splitlines())
    assert [run["accuracy"] for run in muon["trainings"]] == [0.9401, 0.9402, 0.9403]
    assert (muon["n"], muon["accuracy"], muon["train_s"]) == (3, pytest.approx(0.9402), pytest.approx(2.02))
    assert (muon["ended"], muon["first_train_s"], muon["data_verified"]) == ("stopped after 3 trainings", None, False)
    assert faster["not_measured"].startswith("could not read")
    assert faster["not_measured"].endswith("it said last: no table")
    assert hiverge["not_measured"] == "there is no cifar10_speedrun.py in --peers"
    assert script.read_bytes() == written
    said = "\n".join(gpu.show_peers([muon, faster, hiverge]))
    assert "| airbench94_muon.py | 3 | 94.02% ± 0.01% | 2.020 s |" in said
    assert said.count("not measured") == 2


def test_a_script_that_does_not_warm_up_compiles_in_its_first_training(small_cifar, tmp_path):
    peers.write_layout(peers.source.load("cifar10", small_cifar), tmp_path / "cifar10")
    row = peers.measure(write_peer(tmp_path, warm_up=""), tmp_path, runs=3, limit_s=60)
    assert row["first_train_s"] == 2.01
    assert (row["n"], row["train_s"]) == (3, pytest.approx(2.025))


def test_a_script_that_takes_too_long_is_stopped_and_what_it_said_is_read(tmp_path):
    script = write_peer(tmp_path, takes_s=600)
    script.write_text("\n".join(line for line in script.read_text().splitlines() if "torch" not in line))
    row = peers.measure(script, tmp_path, runs=20, limit_s=5)
    assert (row["n"], row["train_s"], row["ended"]) == (1, 2.01, "stopped after 5 s")


@pytest.mark.parametrize(
    "said",
    ["", "Traceback: no CUDA", "|  run  |  epoch  |  tta_val_acc  |  time_seconds  |\n|  1  |  eval  |  nan?  |    |"],
)
def test_what_is_no_figure_is_not_read(said):
    assert peers.read_trainings(said) == ([], False)


def test_columns_are_found_by_name():
    """airbench96_faster has others than airbench94_muon."""
    said = (
        "|  run   |  epoch  |  train_loss  |  val_acc  |  tta_val_acc  |  total_time_seconds  |\n"
        "|     0  |      1  |      2.5000  |   0.5000  |               |             30.0000  |\n"
        "|        |   eval  |      1.5000  |   0.9550  |       0.9603  |             41.5000  |\n"
    )
    assert peers.read_trainings(said) == ([{"run": "0", "accuracy": 0.9603, "train_s": 41.5}], False)


# The report


@pytest.fixture
def asked(tmp_path):
    return gpu.Asked(tmp_path, "cpu", "shapes10", None, None)


def part(code: str, **changes):
    """One that runs this Python; its file is figures.json."""
    plain = gpu.Part(
        lambda asked: [sys.executable, "-c", code], "figures.json", 0, 60, 0, lambda figures: iter(["shown"])
    )
    return replace(plain, **changes)


def test_a_part_that_crashes_is_named(asked):
    found = gpu.measure("crashes", part("raise SystemExit('no such kernel')"), asked, time.monotonic() + 60)
    assert (found["status"], found["why"]) == ("failed", "exit code 1: no such kernel")
    assert found["figures"] is None


def test_a_part_that_ends_well_without_figures_has_failed(asked):
    found = gpu.measure("silent", part("pass"), asked, time.monotonic() + 60)
    assert (found["status"], found["why"]) == ("failed", "it ended well but left no figures")


def test_figures_of_an_earlier_call_are_not_taken_for_those_of_a_crash(asked):
    asked.file("figures.json").write_text("[1]")
    assert gpu.measure("crashes", part("exit(3)"), asked, time.monotonic() + 60)["figures"] is None


def test_a_part_that_takes_too_long_is_killed_with_what_it_started_and_keeps_its_figures(asked):
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(asked.file('figures.json'))!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)"
    )
    found = gpu.measure("slow", part(code), asked, time.monotonic() + 5)
    assert found["status"] == "stopped"
    assert found["why"].startswith("killed after ")
    assert isinstance(found["figures"], int)
    for _ in range(100):
        state = Path(f"/proc/{found['figures']}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(found["figures"], signal.SIGKILL)
    pytest.fail("what the part had started lives on")


def test_what_does_not_fit_or_needs_a_gpu_is_left_out(asked):
    late = gpu.measure("late", part("exit(9)", cpu_s=100), asked, time.monotonic() + 50)
    assert late["status"] == "not measured"
    assert late["why"].startswith("no time left")
    needs = gpu.measure("needs", part("exit(9)", cpu_s=None), asked, time.monotonic() + 50)
    assert (needs["status"], needs["why"]) == ("not measured", "needs a GPU")
    alone = replace(asked, device="cuda")
    assert gpu.measure("peers", gpu.PARTS["peers"], alone, time.monotonic() + 500)["why"] == "no --peers DIR"


def test_the_report_goes_on_and_is_whole(tmp_path):
    words = ["--device", "cpu", "--dataset", "shapes10", "--out", str(tmp_path), "--limit", "2min"]
    command = [sys.executable, str(BENCH / "gpu.py"), *words]
    done = subprocess.run([*command, "--only", "environment", "runs", "budget"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["parts"]) == list(gpu.PARTS)
    whys = {name: found["why"] for name, found in report["parts"].items() if found["status"] == "not measured"}
    assert whys.pop("runs") == "needs a GPU"
    assert whys.pop("budget").startswith("no time left")
    assert set(whys.values()) == {"not asked for"}
    assert report["parts"]["environment"]["figures"]["versions"]["torch"]
    said = (tmp_path / "report.md").read_text()
    no_driver = not isinstance(report["parts"]["environment"]["figures"]["nvidia_smi"], list)
    assert said.count("not measured: ") == len(gpu.PARTS) - 1 + no_driver
    written = (tmp_path / "environment.json").stat().st_mtime_ns
    again = subprocess.run([*command, "--only", "environment"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "environment.json").stat().st_mtime_ns == written, "what is measured is not measured again"
    (tmp_path / "report.json").write_text(json.dumps(report | {"commit": "another"}))
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "is of commit another" in refused.stderr


def test_half_of_a_part_is_not_lost_by_a_call_that_leaves_it_out():
    stopped = {"status": "stopped", "why": "killed after 9 s", "seconds": 9.0, "figures": [1, 2]}
    done = {"status": "measured", "why": "", "seconds": 9.0, "figures": [1, 2, 3]}
    assert gpu.keep(stopped, gpu.left_out("not asked for")) == stopped
    assert gpu.keep(stopped, done) == done
    assert gpu.keep(gpu.left_out("not begun"), gpu.left_out("needs a GPU"))["why"] == "needs a GPU"


def test_runs_are_summed_up_by_recipe():
    made = {"recipe": "speed", "seed": 0, "accuracy_tta": 0.94, "train_s": 2.0, "eval_s": 0.5}
    other = {"recipe": "speed96", "seed": 0, "not_measured": "no such kernel"}
    said = "\n".join(gpu.show_runs([made, other, made | {"seed": 1, "accuracy_tta": 0.95, "train_s": 3.0}]))
    assert "| speed | 2 | 94.50% ± 0.71% | 2.500 s | 3.000 s |" in said
    assert "| speed96, seed 0 | | not measured: no such kernel | | |" in said
    assert said.count("not measured") == 1


def test_what_was_killed_comes_after_what_was_not_begun(asked, monkeypatch):
    begun = []
    parts = {name: part("", show=lambda figures: iter([])) for name in ("first", "second", "third")}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "measure", lambda name, *_: begun.append(name) or gpu.left_out("later"))
    stopped = {"status": "stopped", "why": "", "seconds": 1.0, "figures": None}
    report = {"commit": gpu.source_commit(), "device": "cpu", "dataset": "shapes10", "parts": {"first": stopped}}
    asked.file("report.json").write_text(json.dumps(report))
    words = ["gpu.py", "--device", "cpu", "--dataset", "shapes10", "--out", str(asked.out)]
    monkeypatch.setattr(sys, "argv", words)
    assert gpu.main() == 0
    assert begun == ["second", "third", "first"]


def test_the_recipes_of_the_report_exist():
    assert {name for names in gpu.SPEED_RECIPES.values() for name in names} | {gpu.BEST} <= set(NAMED)


def test_runs_are_made_in_turn_and_gone_on_with(small_cifar, tmp_path):
    out = tmp_path / "runs.jsonl"
    kept = {"recipe": "mlp", "seed": 0, "train_s": 1.0}
    out.write_text(json.dumps(kept) + "\n" + json.dumps({"recipe": "mlp", "seed": 1, "not_measured": "crashed"}) + "\n")
    words = ["--recipes", "mlp", "resnet34-pretrained", "--runs", "2", "--device", "cpu", "--data", str(small_cifar)]
    command = [sys.executable, str(BENCH / "gpu_runs.py"), "--out", str(out), *words, "--epochs", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr  # the second recipe's weights or data set are not there
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0] == kept
    assert [(row["recipe"], row["seed"]) for row in rows[1:]] == [("resnet34-pretrained", -1), ("mlp", 1)]
    assert rows[1]["not_measured"]
    assert 0 < rows[2]["accuracy_tta"] <= 1
    assert rows[2]["steps"] == 4


def test_the_plain_block_gives_what_the_block_gives():
    import torch

    dynamic = load("gpu_dynamic")
    for norm in (False, True):
        torch.manual_seed(0)
        block = dynamic.DynamicConv2d(4, 8, 3, norm=norm, residual=True, form="outputs")
        x_NCHW = torch.randn(5, 4, 6, 6).contiguous(memory_format=torch.channels_last)
        expected_NOHW = block(x_NCHW)
        block.__class__ = dynamic.Plain
        assert torch.allclose(block(x_NCHW), expected_NOHW, atol=1e-5)


def test_choices_are_measured_in_turn(small_cifar, tmp_path, monkeypatch):
    load("gpu_dynamic")  # whose `compare` it takes
    choices = load("gpu_choices")
    tiny = replace(choices.SPEED, batch_size=64, model=replace(choices.SPEED.model, widths=(8, 8, 8)))
    broken = replace(tiny, batch_size=5000)  # of 2,000 images
    monkeypatch.setattr(choices, "CHOICES", {"one": tiny, "other": replace(tiny, compile="off"), "broken": broken})
    out = tmp_path / "choices.json"
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(out), "--data", str(small_cifar), "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        choices.main()
    assert ended.value.code == 1
    found = json.loads(out.read_text())
    assert found["images_per_s"].keys() == {"one", "other"}
    assert all(rate > 0 for rate in found["images_per_s"].values())
    assert "5000 is more than the 2000 training images" in found["failed"]["speed, broken"]
    said = "\n".join(gpu.show_choices(found))
    assert "| one |" in said
    assert "broken: not measured" in said
