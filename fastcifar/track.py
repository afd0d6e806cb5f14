"""--track: the metrics, configuration and result of a run, also where other tools look for them.

A thread of its own hands them on, so that a step only pays for a place in a queue. A tracker that fails (its server is
gone, its disk full) says so once, and the training goes on without it; metrics.jsonl is complete either way. A budget
pays for the beginning: TensorBoard takes a second, MLflow two, and some more where it makes its database.

tensorboard  event files in the run folder: `tensorboard --logdir runs`
mlflow       the server at $MLFLOW_TRACKING_URI, else mlflow.db beside the run folder and mlruns/ for its reports:
             `mlflow ui --backend-store-uri sqlite:///runs/mlflow.db`
"""

import json
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Protocol

from fastcifar.errors import UsageError
from fastcifar.job import Job
from fastcifar.run import RunFolder, dump_yaml, write_atomically

EXPERIMENT = "fastcifar"
WAIT_S = 30.0  # at the end, for what a slow server has not taken yet; result.json is written before that
MLFLOW_METRICS, MLFLOW_PARAMS = 1000, 100  # that one call may log
EVERY_S = 1.0  # rows are handed on in pieces of this length: each costs MLflow a transaction


class Tracker(Protocol):
    """Built with (folder, config, rows of metrics so far); all but the building happens in the thread."""

    def log(self, rows: list[dict]) -> None: ...

    def close(self, result: dict | None, report: Path) -> None:
        """`result` is None if the training did not reach its end."""
        ...


class TensorBoard:
    def __init__(self, folder: RunFolder, config: dict, rows: list[dict]):
        from torch.utils.tensorboard.writer import SummaryWriter

        # What was written before an interruption may lack its end: all of it is purged and written again.
        self.writer = SummaryWriter(str(folder.path), purge_step=0 if rows else None)
        self.writer.add_text("config", f"```\n{dump_yaml(config)}```")
        self.log(rows)

    def log(self, rows: list[dict]) -> None:
        for row in rows:
            for name, value in metrics(row).items():
                self.writer.add_scalar(name, value, row["step"])

    def close(self, result: dict | None, report: Path) -> None:
        if result:
            self.writer.add_text("result", f"```\n{json.dumps(result, indent=2)}\n```", result["steps"])
        self.writer.close()


class MLflow:
    """`mlflow_run_id` in the run folder says which run a resumed training goes on with."""

    def __init__(self, folder: RunFolder, config: dict, rows: list[dict]):
        from mlflow import MlflowClient
        from mlflow.entities import Param

        runs = folder.path.absolute().parent
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self.client = MlflowClient(uri or f"sqlite:///{runs}/mlflow.db")
        known, self.logged = folder.path / "mlflow_run_id", 0
        if rows and known.exists():
            self.id = known.read_text().strip()
            self.client.update_run(self.id, status="RUNNING")
            self.logged = max((m.step for m in self.client.get_metric_history(self.id, "loss")), default=0)
        else:
            experiment = self.experiment(None if uri else runs)
            self.id = self.client.create_run(experiment, run_name=folder.path.name).info.run_id
            write_atomically(known, self.id.encode())
            params = [Param(name, value) for name, value in flat(config).items()]
            for first in range(0, len(params), MLFLOW_PARAMS):
                self.client.log_batch(self.id, params=params[first : first + MLFLOW_PARAMS])
        self.log(rows)

    def experiment(self, runs: Path | None) -> str:
        found = self.client.get_experiment_by_name(EXPERIMENT)
        if found:
            return found.experiment_id
        return self.client.create_experiment(EXPERIMENT, artifact_location=(runs / "mlruns").as_uri() if runs else None)

    def log(self, rows: list[dict]) -> None:
        from mlflow.entities import Metric

        new = [row for row in rows if row["step"] > self.logged]  # after an interruption, some are there already
        time_ms = round(1000 * time.time())
        found = [Metric(name, value, time_ms, row["step"]) for row in new for name, value in metrics(row).items()]
        for first in range(0, len(found), MLFLOW_METRICS):
            self.client.log_batch(self.id, metrics=found[first : first + MLFLOW_METRICS])

    def close(self, result: dict | None, report: Path) -> None:
        if result:
            self.log_result(result)
            self.client.log_artifact(self.id, str(report))
        self.client.set_terminated(self.id, "FINISHED" if result else "KILLED")

    def log_result(self, result: dict) -> None:
        for name, value in result.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self.client.log_metric(self.id, f"result.{name}", value, step=result["steps"])
            else:
                self.client.set_tag(self.id, f"result.{name}", value)


TRACKERS: dict[str, tuple[type[Tracker], str]] = {  # by name, as in job.py: the class, what it imports
    "tensorboard": (TensorBoard, "torch.utils.tensorboard"),
    "mlflow": (MLflow, "mlflow"),
}


def check_trackers(job: Job) -> None:
    """Raise UsageError if what --track names is not installed: before anything else is done."""
    for name in job.trackers:
        try:
            import_module(TRACKERS[name][1])
        except ImportError as error:
            raise UsageError(f"--track {name}: {error}.", "make dev, or: pip install 'fastcifar[track]'") from error


class Tracking:
    """What a training tells its trackers. As a context: whatever ends the training early ends them, too.

    Args:
        rows: of metrics that an interrupted training has left.
        say: prints a line.

    Raises UsageError: a tracker cannot even begin, and there is no interrupted training to go on with.
    """

    def __init__(self, job: Job, folder: RunFolder, rows: list[dict], say: Callable[[str], None]):
        self.folder, self.say, self.config = folder, say, job.config()
        self.report = folder.path / "report.html"
        self.queue: queue.SimpleQueue = queue.SimpleQueue()
        self.trackers: dict[str, Tracker] = {}
        for name in job.trackers:
            self.begin(name, rows)
        self.thread = threading.Thread(target=self.work, daemon=True)
        if self.trackers:
            self.thread.start()

    def begin(self, name: str, rows: list[dict]) -> None:
        try:
            self.trackers[name] = TRACKERS[name][0](self.folder, self.config, rows)  # type: ignore[call-arg]
        except Exception as error:
            if rows:  # to resume, nobody can leave out --track
                self.say(f"! --track {name} failed, the training goes on without it: {first_line(error)}")
                return
            self.tell(lambda tracker: tracker.close(None, self.report))
            where = " at $MLFLOW_TRACKING_URI" if name == "mlflow" and "MLFLOW_TRACKING_URI" in os.environ else ""
            raise UsageError(f"--track {name}: cannot begin{where}: {first_line(error)}.", "without --track") from error

    def add(self, row: dict) -> None:
        """A row of metrics. Takes 11 us; the thread 0.2 ms for TensorBoard, 0.5 ms for MLflow's SQLite (busy cores)."""
        if self.trackers:
            self.queue.put(row)

    def finish(self, result: dict | None) -> None:
        """Wait until all has been handed on."""
        if self.trackers:
            self.queue.put((result,))
            self.thread.join(WAIT_S)

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, error, *_) -> None:
        if error is not None:
            self.finish(None)

    def work(self) -> None:
        end = None
        while end is None:
            rows, until_s = [], time.monotonic() + EVERY_S
            with suppress(queue.Empty):
                while end is None:
                    item = self.queue.get(timeout=max(0.0, until_s - time.monotonic()))
                    if isinstance(item, tuple):
                        end = item
                    else:
                        rows.append(item)
            self.tell(lambda tracker, rows=rows: tracker.log(rows))
        self.tell(lambda tracker: tracker.close(end[0], self.report))

    def tell(self, what: Callable[[Tracker], None]) -> None:
        """Tell each tracker; one that fails is told nothing more."""
        for name, tracker in list(self.trackers.items()):
            try:
                what(tracker)
            except Exception as error:
                del self.trackers[name]
                self.say(f"! --track {name} failed, the training goes on without it: {first_line(error)}")


def metrics(row: dict) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step"}


def flat(config: dict, prefix: str = "") -> dict[str, str]:
    """Dotted names, as flags have them."""
    found = {}
    for name, value in config.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": str(value)[:500]}
    return found


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
