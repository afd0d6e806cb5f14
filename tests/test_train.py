"""Whole trainings, small: they learn, they repeat, they survive, they end in time."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastcifar.budget import Knot, Pace, Position
from fastcifar.checkpoint import capture, restore
from fastcifar.data.download import import_torchvision
from fastcifar.display import Display
from fastcifar.errors import DivergedError, UsageError
from fastcifar.evaluate import judge
from fastcifar.job import Job
from fastcifar.loaders.feed import import_loader
from fastcifar.looks import Looks
from fastcifar.models.speednet import SpeedNet
from fastcifar.ranks import Ranks
from fastcifar.reevaluate import reevaluate
from fastcifar.resize import resize
from fastcifar.run import RunFolder
from fastcifar.settings import Augment, ClassicOptim, CnnModel, MlpModel, Recipe, SpeedNetModel, SpeedOptim, Stage, Tta
from fastcifar.setup import Setup, set_up, warm_up
from fastcifar.train import fit, train, train_step

SMALL = Recipe(
    batch_size=125,
    model=SpeedNetModel(widths=(16, 32, 32)),
    stages=(Stage(20, 0.5), Stage(32, 1.0)),
    tta=Tta(share=0.2),
)


@pytest.fixture
def job(small_cifar) -> Job:
    return Job("speed", SMALL, data=small_cifar, device="cpu", steps=20)


@pytest.fixture
def few_held_out(monkeypatch) -> None:
    """500 of the small set's 2,000 training images, instead of 5,000 of 50,000."""
    monkeypatch.setattr("fastcifar.setup.HELD_OUT", 500)


def run_to_end(job: Job, path: Path) -> dict:
    return train(job, RunFolder.create(path, job.recipe), Display(), time.monotonic())


def weights(path: Path) -> dict:
    return load_file(path / "model.safetensors")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def fastcifar(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "fastcifar", *words], capture_output=True, text=True, **options)


def asked_for(said: str) -> int | None:
    """The seconds that a budget must have on this machine, if the one given was refused."""
    found = re.search(r"try: --budget (\d+)s", said)
    return int(found[1]) if found else None


def train_within(budget_s: int, *words: str, **options) -> tuple[subprocess.CompletedProcess, int, float]:
    """`fastcifar train` with this budget or, on a slower machine, with the one it asks for.

    Returns the process, the budget and the seconds that the process took by our clock.
    """
    for _ in range(3):
        began_s = time.monotonic()
        done = fastcifar("train", "--budget", f"{budget_s}s", *words, **options)
        if not (asked_s := asked_for(done.stderr)):
            break
        budget_s = asked_s
    return done, budget_s, time.monotonic() - began_s


NO_LOOKS = Looks(loader=None, epoch_steps=1)
KEYS = {
    "processes",
    "dataset",
    "data_verified",
    "recipe",
    "as_reported",
    "loader",
    "device",
    "seed",
    "budget_s",
    "wall_s",
    "compile_s",
    "train_s",
    "eval_s",
    "epochs",
    "steps",
    "images_per_s",
    "val_acc",
    "test_acc",
    "test_acc_tta",
    "macro_precision",
    "macro_recall",
    "macro_f1",
    "params",
    "peak_memory_bytes",
    "torch",
    "triton",
    "commit",
}


def test_a_run_leaves_everything_it_should(job, tmp_path):
    result = run_to_end(job, tmp_path / "run")
    assert set(result) >= KEYS
    assert json.loads((tmp_path / "run/result.json").read_text()) == result
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "model.safetensors",
        "report.html",
        "result.json",
    ]
    assert result["data_verified"] is False
    assert result["steps"] == 20
    assert result["epochs"] == pytest.approx(20 * 125 / 2000)
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 21))
    assert {row["image_px"] for row in rows(tmp_path / "run")} == {20, 32}
    page = (tmp_path / "run/report.html").read_text()
    for part in ("Confusion matrix", "Most confidently wrong", "<svg", "data:image/png;base64", "not CIFAR-10"):
        assert part in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_the_commit_of_a_result_is_the_one_it_began_with(job, tmp_path, monkeypatch):
    class MovesOn(Display):
        def update(self, row, steps, eta_s):
            monkeypatch.setenv("FASTCIFAR_COMMIT", "after")

    monkeypatch.setenv("FASTCIFAR_COMMIT", "before")
    folder = RunFolder.create(tmp_path / "run", job.recipe)
    assert train(job, folder, MovesOn(), time.monotonic())["commit"] == "before"
    assert os.environ["FASTCIFAR_COMMIT"] == "after"


def test_it_learns_shapes(tmp_path):
    """A few small steps on shapes10 get far beyond what pixels alone tell."""
    recipe = replace(SMALL, batch_size=250, model=SpeedNetModel(widths=(32, 64, 64)))
    result = run_to_end(Job("speed", recipe, dataset="shapes10", device="cpu", steps=60), tmp_path / "run")
    assert result["test_acc"] > 0.9  # measured: 0.991, where a linear classifier on the pixels reaches 0.13
    assert result["test_acc_tta"] > 0.9


def test_two_runs_with_one_seed_are_equal_to_the_bit(job, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_to_end(replace(job, seed=seed), tmp_path / name)
    one, same, other = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_budget_run_is_replayed_by_its_config(small_cifar, tmp_path):
    """The steps a budget was found to buy stand in config.yaml, which repeats them exactly."""
    fields = ["--batch-size", "125", "--model.widths", "[16,32,32]", "--data", str(small_cifar), "--device", "cpu"]
    first, *_ = train_within(15, *fields, "--out", str(tmp_path / "first"))
    assert first.returncode == 0, first.stderr
    again = fastcifar("train", "--config", str(tmp_path / "first/config.yaml"), "--out", str(tmp_path / "again"))
    assert again.returncode == 0, again.stderr
    one, same = weights(tmp_path / "first"), weights(tmp_path / "again")
    assert all(torch.equal(one[name], same[name]) for name in one)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("first", "again")]
    assert results[0]["steps"] == results[1]["steps"]
    for key in ("test_acc", "test_acc_tta", "tta_share"):
        assert results[0][key] == results[1][key]


@pytest.mark.clock
def test_a_budget_of_20_seconds_is_kept_on_a_slow_machine(tmp_path):
    """The full recipe on shapes10 with a single thread: in time, most of it used, the schedule at its end."""
    fastcifar("data", "prepare", "--dataset", "shapes10")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    only_one_core = (
        (lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})) if sys.platform == "linux" else None
    )
    words = "--dataset", "shapes10", "--device", "cpu", "--json", "--out", str(tmp_path / "run")
    done, budget_s, took_s = train_within(20, *words, env=environment, preexec_fn=only_one_core)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "run/result.json").read_text())
    assert 0.9 * budget_s <= result["wall_s"] <= budget_s + max(1, 0.02 * budget_s)
    assert took_s - 1 <= result["wall_s"] <= took_s
    last = rows(tmp_path / "run")[-1]
    assert last["progress"] == 1
    assert last["lr"] < 0.1


@pytest.fixture(scope="module")
def uninterrupted(small_cifar, tmp_path_factory) -> tuple[list[str], Path]:
    """The words of a training, and the folder of one that nothing disturbed."""
    words = ["train", "--batch-size", "125", "--model.widths", "[16,32,32]", "--steps", "100"]
    words += ["--data", str(small_cifar), "--device", "cpu"]
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = fastcifar(*words, "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return words, folder


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(how, uninterrupted, tmp_path):
    words, whole = uninterrupted
    process = subprocess.Popen(
        [sys.executable, "-m", "fastcifar", *words, "--out", str(tmp_path / "run")], stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 30):
        assert process.poll() is None, process.stderr
        time.sleep(0.02)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    if how != signal.SIGKILL:  # which leaves no time to say goodbye: the last regular checkpoint must do
        assert process.returncode == 130
        assert f"fastcifar train --resume {tmp_path / 'run'}" in said
    assert not (tmp_path / "run/result.json").exists()
    resumed = fastcifar("train", "--resume", str(tmp_path / "run"))
    assert resumed.returncode == 0, resumed.stderr
    one, same = weights(tmp_path / "run"), weights(whole)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert [row["loss"] for row in rows(tmp_path / "run")] == [row["loss"] for row in rows(whole)]


def test_a_finished_run_is_not_resumed(uninterrupted):
    assert fastcifar("train", "--resume", str(uninterrupted[1])).returncode == 2


def test_a_folder_in_which_another_process_trains_is_refused(uninterrupted, tmp_path):
    words, _ = uninterrupted
    process = subprocess.Popen([sys.executable, "-m", "fastcifar", *words, "--out", str(tmp_path / "run")])
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)
    beside = fastcifar("train", "--resume", str(tmp_path / "run"))
    process.kill()
    process.wait()
    assert beside.returncode == 2
    assert f"{tmp_path / 'run'}: another process is training in this folder" in beside.stderr


def test_a_budget_run_interrupted_near_its_end_goes_on(small_cifar, tmp_path):
    """Hardly any time is left to train, which is no reason to refuse what is nearly done."""
    fields = ["--batch-size", "125", "--model.widths", "[16,32,32]", "--data", str(small_cifar), "--device", "cpu"]
    metrics, log, budget_s = tmp_path / "run/metrics.jsonl", tmp_path / "log", 15

    def begin(budget_s: int) -> subprocess.Popen:
        words = ["train", "--budget", f"{budget_s}s", *fields, "--out", str(tmp_path / "run")]
        return subprocess.Popen([sys.executable, "-m", "fastcifar", *words], stderr=log.open("w"))

    process = begin(budget_s)
    while not (metrics.exists() and (done := rows(tmp_path / "run")) and done[-1]["progress"] > 0.9):
        if process.poll() is not None:
            asked_s = asked_for(log.read_text())
            assert asked_s, log.read_text()
            process, budget_s = begin(asked_s), asked_s
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    resumed = fastcifar("train", "--resume", str(tmp_path / "run"), "--json")
    assert resumed.returncode == 0, resumed.stderr
    result = json.loads(resumed.stdout.splitlines()[-1])
    assert result["wall_s"] > result["train_s"] > 0.2 * budget_s, "the time spent before counts"
    assert rows(tmp_path / "run")[-1]["progress"] == 1


def test_time_spent_before_an_interruption_counts(job, tmp_path):
    folder = RunFolder.create(tmp_path / "run", "speed")
    job = replace(job, steps=None, budget="60s")
    setup_began = time.monotonic() - 54
    with pytest.raises(UsageError, match="--budget"):
        train(job, folder, Display(), setup_began)


def test_validation_trains_to_the_end_and_says_what_it_saw(job, few_held_out, tmp_path):
    result = run_to_end(replace(job, steps=12, validate=True), tmp_path / "run")
    assert result["steps"] == 12
    looks = [row for row in rows(tmp_path / "run") if "val_accuracy" in row]
    assert [row["step"] for row in looks] == [2, 4, 6, 8, 10, 12], "every 0.1 of progress is every second step"
    assert all(row["val_loss"] > 0 for row in looks)
    assert result["val_acc"] == looks[-1]["val_accuracy"]
    page = (tmp_path / "run/report.html").read_text()
    assert page.count(">held out<") == 2, "beside the loss and beside the accuracy"
    assert "training batch, smoothed labels" in page


def test_the_model_is_judged_at_the_size_that_its_training_ends_with(job, few_held_out, tmp_path, monkeypatch):
    seen, forward = set(), SpeedNet.forward

    def watched(self, x_BCHW):
        if not self.training:
            seen.add(x_BCHW.size(3))
        return forward(self, x_BCHW)

    monkeypatch.setattr(SpeedNet, "forward", watched)
    recipe = replace(SMALL, stages=(Stage(20, 0.5), Stage(40, 1.0)))
    job = replace(job, settings=recipe, validate=True)
    result = run_to_end(job, tmp_path / "run")
    assert seen == {40}
    seen.clear()
    found = reevaluate(tmp_path / "run", job, Display())
    assert seen == {40}
    assert (found["test_acc"], found["test_acc_tta"]) == (result["test_acc"], result["test_acc_tta"])


def test_target_stops_early(job, few_held_out, tmp_path):
    result = run_to_end(replace(job, steps=500, target=0.3), tmp_path / "run")
    assert 0.3 <= result["val_acc"] < 1
    assert result["steps"] < 250
    assert [row for row in rows(tmp_path / "run") if "val_accuracy" in row]


@pytest.fixture
def unsteady(job, few_held_out) -> Job:
    """A training that stalls long before its end."""
    settings = replace(SMALL, dtype="float32", optim=SpeedOptim(muon_lr=2.0, head_lr=3.0))
    return replace(job, settings=settings, steps=100, patience=2)


def test_patience_keeps_the_best_weights_of_a_training_that_stalls(unsteady, tmp_path):
    job = unsteady
    result = run_to_end(job, tmp_path / "run")
    seen = {row["step"]: row["val_accuracy"] for row in rows(tmp_path / "run") if "val_accuracy" in row}
    best_step = max(seen, key=lambda step: (seen[step], -step))
    assert len([step for step in seen if step > best_step]) == 2
    assert result["steps"] == max(seen) < 100
    assert result["val_acc"] == seen[best_step]
    setup = set_up(job, Display())
    setup.model.load_state_dict(weights(tmp_path / "run"))
    assert setup.held_out_loader is not None
    assert judge(setup.model, setup.held_out_loader).accuracy == seen[best_step], "statistics of BatchNorm included"


def test_patience_survives_interruptions(unsteady, tmp_path, monkeypatch):
    """Stopped at each of its looks, the last one too, a training ends where it would have, with the same weights."""
    job = unsteady
    whole = run_to_end(job, tmp_path / "whole")
    folder = RunFolder.create(tmp_path / "run", job.recipe)
    look = Looks.look

    def look_and_interrupt(*looking):
        os.kill(os.getpid(), signal.SIGTERM)
        return look(*looking)

    monkeypatch.setattr(Looks, "look", look_and_interrupt)
    interrupted = 0
    while not (tmp_path / "run/result.json").exists():
        try:
            train(job, folder, Display(), time.monotonic(), resume=interrupted > 0)
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted == len([row for row in rows(tmp_path / "whole") if "val_accuracy" in row]) >= 3
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["steps"], result["val_acc"]) == (whole["steps"], whole["val_acc"])
    one, same = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(one[name], same[name]) for name in one)


def test_held_out_images_are_not_trained_on():
    job = Job("speed", SMALL, dataset="shapes10", device="cpu", steps=1, target=0.9)
    seen = set()
    for seed in (0, 1, 9):  # ten seeds hold every image out once
        setup = set_up(replace(job, seed=seed), Display())
        assert setup.held_out_loader is not None
        train_images, held_out = (
            {x.float().numpy().tobytes() for x in loader.take(torch.arange(len(loader.labels_N)))}
            for loader in (setup.loader, setup.held_out_loader)
        )
        assert len(held_out) == 5000
        assert len(train_images) == 45_000
        assert not train_images & held_out
        assert not seen & held_out
        seen |= held_out


@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("model", [MlpModel(hidden=(16,)), CnnModel(blocks=((8,), (16,)), dropout=0.2)])
@pytest.mark.parametrize("loader", ["resident", "torch"])
def test_momenta_and_dropout_go_on_where_they_were(job, tmp_path, name, model, loader):
    """Every kind of optimizer keeps state of its own, filters and their momenta are channels-last, and dropout's random
    numbers have a place, too."""
    optim = ClassicOptim(name=name, lr=1e-3, clip_norm=1.0)
    settings = Recipe(batch_size=125, model=model, optim=optim, dtype="float32")
    job = replace(job, settings=settings, steps=12, loader=loader, workers=1)

    def begin() -> tuple[Setup, Pace]:
        return set_up(job, Display()), Pace(settings.stages, [Knot(0, 0.0, 12)])

    whole, pace = begin()
    for _ in fit(whole, settings, pace, Position(), NO_LOOKS):
        pass
    half, pace, position = *begin(), Position()
    for rows in fit(half, settings, pace, position, NO_LOOKS):
        if rows[-1]["step"] >= 5:
            break
    folder = RunFolder.create(tmp_path / "run", "mine")
    folder.write_checkpoint(capture(half, pace, position, 0.0, NO_LOOKS))
    torch.rand(7)  # someone else draws
    rest, pace = begin()
    for _ in fit(rest, settings, pace, restore(rest, pace, folder.read_checkpoint(), NO_LOOKS), NO_LOOKS):
        pass
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, rest.model.state_dict()[name]), name


@pytest.mark.parametrize("recipe", ["mlp", "cnn2"])
def test_a_report_trains_from_the_command_line(small_cifar, tmp_path, recipe):
    words = ["train", "--recipe", recipe, "--as-reported", "--data", str(small_cifar), "--steps", "12", "--json"]
    done = fastcifar(*words, "--out", str(tmp_path / "run"), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["recipe"] == recipe
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["as_reported"] is True
    assert config["optim"]["name"] == "adam"
    again = fastcifar("eval", str(tmp_path / "run"), "--device", "cpu", "--json")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("loader", ["ffcv", "dali", "torch"])
def test_another_loader_trains_the_same_model(small_cifar, tmp_path, loader):
    """In bfloat16 all four give the same bits for this augmentation, so all that follows is the same."""
    try:
        import_loader(loader)
    except UsageError as error:
        pytest.skip(str(error))
    settings = replace(SMALL, augment=Augment(crop_px=2))
    runs = {}
    for name in ("resident", loader):
        job = Job("speed", settings, data=small_cifar, loader=name, workers=2, device="cpu", steps=12)
        result = run_to_end(job, tmp_path / name)
        assert result["loader"] == name
        runs[name] = [row["loss"] for row in rows(tmp_path / name)], result["test_acc"], result["test_acc_tta"]
    assert runs["resident"] == runs[loader]


def test_auto_says_which_loader_it_took(small_cifar, tmp_path, capsys):
    job = Job("speed", SMALL, data=small_cifar, loader="auto", device="cpu", steps=2)
    assert run_to_end(job, tmp_path / "run")["loader"] == "resident"
    assert "loader: resident" in (tmp_path / "run" / "config.yaml").read_text()
    assert "loader resident: " in capsys.readouterr().err


def test_divergence_ends_the_run_with_its_place(job, tmp_path):
    settings = replace(SMALL, dtype="float32", optim=SpeedOptim(head_lr=1e38))
    with pytest.raises(DivergedError, match=r"loss is (nan|inf) at step \d+"):
        run_to_end(replace(job, settings=settings), tmp_path / "run")
    assert not (tmp_path / "run/result.json").exists()


def test_warming_up_leaves_no_trace(job):
    """What CUDA compiles before the clock starts must not move a weight or a statistic."""
    setup = set_up(job, Display())
    before = {name: value.clone() for name, value in setup.model.state_dict().items()}
    warm_up(setup.model, setup.model, setup.optimizers, SMALL, setup.loader.take(torch.arange(16)))
    assert all(torch.equal(value, before[name]) for name, value in setup.model.state_dict().items())
    assert all(weight.grad is None for weight in setup.model.parameters())
    assert isinstance(setup.model, SpeedNet)
    assert setup.model.whiten.bias is not None
    assert setup.model.whiten.bias.requires_grad


def test_float16_steps_as_float32_does(job):
    """The path that CUDA takes with --dtype float16, tiny and on the CPU: scaled gradients, the same update."""
    updates = []
    for dtype in (torch.float32, torch.float16):
        setup = set_up(
            replace(job, settings=replace(SMALL, dtype="float32", model=SpeedNetModel(widths=(8, 8, 8)))), Display()
        )
        before = {name: value.clone() for name, value in setup.model.named_parameters()}
        setup = replace(setup, scaler=torch.amp.GradScaler("cpu", enabled=dtype == torch.float16))
        x_BCHW, y_B = next(iter(setup.loader.epoch(0)))
        train_step(setup, SMALL, resize(x_BCHW[:8], 18).to(dtype), y_B[:8])
        # Muon would blow the rounding of tiny gradients up; the weights that SGD moves follow theirs in proportion.
        moved = [(w - before[n]).flatten() for n, w in setup.model.named_parameters() if w.ndim < 4]
        updates.append(torch.cat(moved).detach())
    assert updates[0].norm() > 0
    assert (updates[0] - updates[1]).norm() < 0.05 * updates[0].norm()


def test_float16s_scale_goes_on_where_it_was(job):
    """It begins with 65,536 and, after an overflow, halves: to begin anew would be to overflow anew."""
    setup = replace(set_up(job, Display()), scaler=torch.amp.GradScaler("cpu", init_scale=32.0, growth_interval=2))
    pace = Pace(SMALL.stages, [Knot(0, 0.0, 20)])
    setup.scaler.scale(torch.ones(()))
    kept = capture(setup, pace, Position(step=1), 0.0, NO_LOOKS)
    fresh = replace(setup, scaler=torch.amp.GradScaler("cpu"))
    restore(fresh, pace, kept, NO_LOOKS)
    assert fresh.scaler.state_dict() == setup.scaler.state_dict()


def test_a_checkpoint_of_another_network_is_named(job, tmp_path):
    folder = RunFolder.create(tmp_path / "run", "speed")
    wider = replace(SMALL, model=SpeedNetModel(widths=(16, 32, 64)))
    setup = set_up(replace(job, settings=wider), Display())
    pace = Pace(SMALL.stages, [Knot(0, 0.0, 20)])
    folder.write_checkpoint(capture(setup, pace, Position(step=1), 0.0, NO_LOOKS))
    with pytest.raises(UsageError, match="of another network") as caught:
        train(job, folder, Display(), time.monotonic(), resume=True)
    assert caught.value.hint == f"fastcifar train --config {folder.path}/config.yaml"


def test_ranks_draw_their_own_dropout_after_a_resume(job):
    pace = Pace(SMALL.stages, [Knot(0, 0.0, 20)])
    setup = set_up(job, Display())
    kept = capture(setup, pace, Position(step=1), 0.0, NO_LOOKS)
    drawn = []
    for rank in range(3):
        torch.manual_seed(rank)
        restore(replace(setup, ranks=Ranks(rank, 3)), pace, kept, NO_LOOKS)
        drawn.append(torch.rand(()).item())
    assert len(set(drawn)) == 3


def losses(setup: Setup, knots: list[Knot]) -> tuple[list[float], list[int]]:
    """Train to the end of the plan: the loss of every step, and how many rows came at a time."""
    chunks = list(fit(setup, SMALL, Pace(SMALL.stages, knots), Position(), NO_LOOKS))
    return [row["loss"] for rows in chunks for row in rows], [len(rows) for rows in chunks]


def test_waiting_rarely_for_the_device_changes_nothing_but_the_waiting(job):
    """A GPU is asked for its numbers once an epoch; the same path on a CPU."""
    knots = [Knot(0, 0.0, 21)]
    often, ones = losses(set_up(job, Display()), knots)
    rarely, chunks = losses(replace(set_up(job, Display()), wait_every=8), knots)
    assert ones == [1] * 21
    assert chunks == [1, 2, 4, 8, 6]
    assert rarely == often


def test_compiled_training_equals_eager_training(job):
    """What CUDA runs by default, on the CPU: every image size, and the whitening bias that stops learning midway."""
    knots = [Knot(0, 0.0, 12)]
    eager, _ = losses(set_up(job, Display()), knots)
    setup = set_up(job, Display())
    forward = torch.compile(setup.model, fullgraph=True, backend="aot_eager")
    setup = replace(setup, forward=cast(torch.nn.Module, forward))
    warm_up(setup.forward, setup.model, setup.optimizers, SMALL, setup.loader.take(torch.arange(125)))
    compiled, _ = losses(setup, knots)
    assert compiled == pytest.approx(eager, rel=0.01)


def test_a_resnet_begins_with_the_weights_of_a_file_and_is_judged_without_it(small_cifar, tmp_path):
    import_torchvision()
    from torchvision.models import resnet34

    torch.save(resnet34().state_dict(), tmp_path / "imagenet.pth")
    words = ["train", "--recipe", "resnet34-pretrained", "--model.weights", str(tmp_path / "imagenet.pth")]
    words += ["--dataset", "cifar10", "--data", str(small_cifar), "--steps", "2", "--batch-size", "50"]
    done = fastcifar(*words, "--out", str(tmp_path / "run"), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    (tmp_path / "imagenet.pth").unlink()
    again = fastcifar("eval", str(tmp_path / "run"), "--device", "cpu")
    assert again.returncode == 0, again.stderr
    refused = fastcifar(*words, "--out", str(tmp_path / "other"), "--device", "cpu")
    assert refused.returncode == 3
    assert "imagenet.pth" in refused.stderr
