"""TensorBoard and MLflow, read back with their own libraries."""

import json
import os
import signal
import sys
import time
from dataclasses import replace

import pytest

from fastcifar.display import Display
from fastcifar.errors import UsageError
from fastcifar.job import Job
from fastcifar.run import RunFolder
from fastcifar.settings import Recipe, SpeedNetModel, Tta
from fastcifar.track import MLflow, TensorBoard
from fastcifar.train import train

pytest.importorskip("tensorboard")
pytest.importorskip("mlflow")

from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SMALL = Recipe(batch_size=125, model=SpeedNetModel(widths=(8, 8, 8)), tta=Tta(share=0.0))


@pytest.fixture
def job(small_cifar, monkeypatch) -> Job:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("fastcifar.setup.HELD_OUT", 500)
    tracked = {"validate": True, "track": "tensorboard,mlflow"}
    return Job("speed", SMALL, data=small_cifar, device="cpu", steps=12, **tracked)


def rows(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]


def scalars(folder: RunFolder, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder.path), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def mlflow_run(folder: RunFolder):
    client = MlflowClient(f"sqlite:///{folder.path.parent}/mlflow.db")
    return client, client.get_run((folder.path / "mlflow_run_id").read_text())


def check(folder: RunFolder, result: dict) -> None:
    """Each tracker holds each step once."""
    client, run = mlflow_run(folder)
    assert run.info.status == "FINISHED"
    for name in ("loss", "accuracy", "lr", "images_per_s", "val_accuracy", "val_loss"):
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows(folder) if name in row]
        assert scalars(folder, name) == expected
        history = sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name))
        assert history == expected
    assert run.data.params["seed"] == "0"
    assert run.data.params["model.widths"] == "(8, 8, 8)"
    assert run.data.metrics["result.test_acc"] == result["test_acc"]
    assert run.data.tags["result.recipe"] == "speed"
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["report.html"]
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_both_hold_what_the_run_folder_does(job, tmp_path):
    folder = RunFolder.create(tmp_path / "run", "speed")
    check(folder, train(job, folder, Display(), time.monotonic()))


def test_a_resumed_run_is_gone_on_with(job, tmp_path, monkeypatch):
    """Interrupted after step 5."""
    folder = RunFolder.create(tmp_path / "run", "speed")
    update = Display.update

    def update_and_interrupt(display, row, *others):
        if row["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        update(display, row, *others)

    monkeypatch.setattr(Display, "update", update_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(job, folder, Display(), time.monotonic())
    monkeypatch.undo()
    monkeypatch.setattr("fastcifar.setup.HELD_OUT", 500)
    assert mlflow_run(folder)[1].info.status == "KILLED"
    time.sleep(1.1)  # TensorBoard names its files by the second
    check(folder, train(job, folder, Display(), time.monotonic(), resume=True))


@pytest.mark.parametrize("moment", ["log", "close"])
def test_a_tracker_that_fails_fails_alone(job, tmp_path, monkeypatch, capsys, moment):
    def fail(*_):
        raise ConnectionError("the server is gone")

    begin = MLflow.__init__

    def begin_well(self, *words):
        begin(self, *words)
        monkeypatch.setattr(MLflow, moment, fail)

    monkeypatch.setattr(MLflow, "__init__", begin_well)
    folder = RunFolder.create(tmp_path / "run", "speed")
    assert train(job, folder, Display(), time.monotonic())["steps"] == 12
    assert capsys.readouterr().err.count("--track mlflow failed, the training goes on without it: the server") == 1
    assert len(scalars(folder, "loss")) == 12


def test_a_tracker_that_is_gone_does_not_keep_a_run_from_being_resumed(job, tmp_path, monkeypatch, capsys):
    folder = RunFolder.create(tmp_path / "run", "speed")

    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Display, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(job, folder, Display(), time.monotonic())
    monkeypatch.undo()
    monkeypatch.setattr("fastcifar.setup.HELD_OUT", 500)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    assert train(job, folder, Display(), time.monotonic(), resume=True)["steps"] == 12
    assert "--track mlflow failed, the training goes on without it" in capsys.readouterr().err


def test_what_ends_a_run_after_its_last_step_ends_its_trackers(job, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastcifar.train.evaluate", interrupt)
    folder = RunFolder.create(tmp_path / "run", "speed")
    with pytest.raises(KeyboardInterrupt):
        train(job, folder, Display(), time.monotonic())
    assert mlflow_run(folder)[1].info.status == "KILLED"
    assert len(scalars(folder, "loss")) == 12


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow")])
def test_a_missing_package_is_named_before_anything_is_done(job, tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=f"--track {name}") as caught:
        train(replace(job, track=name), RunFolder.create(tmp_path / "run", "speed"), Display(), time.monotonic())
    assert caught.value.hint == "make dev, or: pip install 'fastcifar[track]'"
    assert list((tmp_path / "run").iterdir()) == []


def test_a_store_that_cannot_be_used_is_named(job, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    with pytest.raises(UsageError, match=r"--track mlflow: cannot begin at \$MLFLOW_TRACKING_URI"):
        train(job, RunFolder.create(tmp_path / "run", "speed"), Display(), time.monotonic())


def test_an_unknown_tracker(job):
    with pytest.raises(UsageError, match="--track: there is no 'wandb'; there are tensorboard, mlflow"):
        replace(job, track="mlflow,wandb")


def test_all_trackers_are_listed():
    from fastcifar import job, track

    assert tuple(track.TRACKERS) == job.TRACKERS
    assert track.TRACKERS["tensorboard"][0] is TensorBoard
