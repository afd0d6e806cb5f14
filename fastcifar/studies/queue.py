"""The points of a sweep, worked off by any number of processes on any number of machines: none lost, none twice.

The study lies in an Optuna storage, SQLite or PostgreSQL. A point is one setting of what is searched, numbered from 0;
an Optuna trial is one attempt at it. A point is free unless an attempt at it is complete, or runs and is alive.

Optuna's own queue is not quite enough. It takes a trial with SELECT ... FOR UPDATE, which SQLite does not know, so two
processes can take the same one; and a process that dies at a bad moment, between taking a trial and its first
heartbeat or between failing a dead one and queueing it again, loses it for good. So here every change of state is made
under one lock of the storage, which ends with the process that holds it: an advisory lock of PostgreSQL, or a locked
file beside SQLite's. Whoever has it first repairs what the dead have left.
"""

import fcntl
import os
import socket
import threading
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fastcifar.errors import UsageError
from fastcifar.studies.search import Searched, typed

try:
    import optuna
    import sqlalchemy
    from sqlalchemy.engine import URL, make_url
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError
except ImportError as error:
    raise UsageError(f"A sweep needs Optuna ({error}).", "make dev, or: pip install 'fastcifar[sweep]'") from error

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

BEAT_S = 10  # between two signs of life of a worker
GRACE_S = 30  # without one, after which it counts as dead
WAIT_S = 2.0  # between two looks of a worker that has nothing to do while others run
LOCK_S = 60  # most that a worker may hold the lock before PostgreSQL gives it to the next, should its machine vanish
LOCK = 0x666173746369  # number of the lock in PostgreSQL, which knows them by number

# Heartbeats are experimental in Optuna, and meant for its own loop; ours is below.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
warnings.filterwarnings("ignore", message="Heartbeat of storage")
optuna.logging.set_verbosity(optuna.logging.ERROR)


@dataclass(frozen=True)
class Task:
    """A point that this process is to work on, and what it is to try."""

    point: int
    parameters: dict[str, str]  # by field, as typed
    trial: Trial


class Queue:
    """The points of one study.

    Args:
        url: where the storage is: sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE.
        name: of the study.
        asked: what is searched and how, JSON; a study that was begun with anything else is refused.
        searched: the fields.
        grid: the points, if they are known beforehand; else there are `points` of them, and `method` draws each.
        method: random or tpe.
        seed: of what `method` draws.

    Raises UsageError if the storage cannot be reached, or has another study of this name.
    """

    def __init__(
        self,
        url: str,
        name: str,
        asked: dict,
        searched: list[Searched],
        *,
        points: int,
        grid: list[dict[str, str]] | None,
        method: str,
        seed: int,
    ):
        self.url, self.points, self.grid, self.method, self.seed = read_url(url), points, grid, method, seed
        self.distributions = {one.field: distribution(one) for one in searched}
        with self.reached():
            self.engine = sqlalchemy.create_engine(self.url, pool_pre_ping=True)
            with self.locked():
                self.storage = optuna.storages.RDBStorage(
                    self.url.render_as_string(hide_password=False),
                    {"pool_pre_ping": True, "connect_args": self.connect_options()},
                    heartbeat_interval=BEAT_S,
                    grace_period=GRACE_S,
                )
                self.study = optuna.create_study(
                    storage=self.storage, study_name=name, direction="maximize", load_if_exists=True
                )
                begun = self.study.user_attrs.get("asked")
                if begun is None:
                    self.study.set_user_attr("identity", uuid.uuid4().hex)
                    self.study.set_user_attr("asked", asked)
                self.identity: str = self.study.user_attrs["identity"]
        if begun is not None and begun != asked:
            different = ", ".join(key for key in asked if asked[key] != begun.get(key))
            raise UsageError(
                f"--study: {name!r} in {self.place()} was begun with another {different}.", "--study with another name"
            )

    def place(self) -> str:
        """The storage's URL, its password hidden."""
        return self.url.render_as_string(hide_password=True)

    def claim(self) -> Task | None:
        """Take the next free point; None if as many as there are to be are complete or being worked on."""
        with self.reached(), self.locked():
            self.repair()
            if len(self.trials(TrialState.COMPLETE, TrialState.RUNNING)) >= self.points:
                return None
            waiting = self.trials(TrialState.WAITING)
            # Marked as alive before it runs, so that there is no moment in which its death would go unseen.
            self.storage.record_heartbeat(waiting[0]._trial_id)
            point = waiting[0].user_attrs["point"]
            self.study.sampler = self.sampler(point)
            trial = self.study.ask(self.distributions)
            assert trial.number == waiting[0].number
            trial.set_user_attr("worker", worker_name())
            return Task(point, {name: typed(value) for name, value in trial.params.items()}, trial)

    def complete(self, task: Task, accuracy: float, facts: dict) -> None:
        """The point is done, `facts` being what else is to be known of it.

        Does nothing if this process was taken for dead meanwhile and the point given to another.
        """
        with self.reached(), self.locked():
            if self.state(task) != TrialState.RUNNING:
                return
            for name, value in facts.items():
                task.trial.set_user_attr(name, value)
            self.study.tell(task.trial, accuracy)

    def give_back(self, task: Task) -> None:
        """The point is free again."""
        with self.reached(), self.locked():
            if self.state(task) == TrialState.RUNNING:
                self.study.tell(task.trial, state=TrialState.FAIL)

    @contextmanager
    def alive(self, task: Task) -> Iterator[None]:
        """Give signs of life, from a thread."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(BEAT_S):
                with suppress(Exception):  # a storage that is away for a moment is no reason to stop a training
                    self.storage.record_heartbeat(task.trial._trial_id)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def finished(self) -> list[FrozenTrial]:
        """The attempt that completed each point, best first."""
        with self.reached():
            trials = self.trials(TrialState.COMPLETE)
        return sorted(trials, key=lambda trial: (-(trial.value or 0.0), trial.user_attrs["point"]))

    def is_complete(self) -> bool:
        return len(self.finished()) >= self.points

    def running(self) -> int:
        """How many points are being worked on, by this process or others."""
        with self.reached():
            return len(self.trials(TrialState.RUNNING))

    # Under the lock

    def repair(self) -> None:
        """Fail the attempts of the dead, and queue every point that has no attempt left. The lock is held."""
        optuna.storages.fail_stale_trials(self.study)
        attempts: dict[int, list[FrozenTrial]] = {}
        for trial in self.trials():
            attempts.setdefault(trial.user_attrs["point"], []).append(trial)
        for point in range(self.points):
            tried = attempts.get(point, [])
            if all(trial.state == TrialState.FAIL for trial in tried):
                parameters = self.grid[point] if self.grid else drawn(tried)
                self.study.enqueue_trial(parameters, user_attrs={"point": point})

    def state(self, task: Task) -> TrialState:
        return self.storage.get_trial(task.trial._trial_id).state

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def sampler(self, point: int) -> optuna.samplers.BaseSampler:
        """Drawn from (seed, point), so that two workers never draw the same numbers."""
        seed = (self.seed * 1_000_003 + point) % 2**32
        if self.method == "tpe":
            return optuna.samplers.TPESampler(seed=seed)  # it counts the running trials as poor and looks elsewhere
        return optuna.samplers.RandomSampler(seed=seed)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the storage's lock."""
        if self.url.get_backend_name() == "sqlite":
            path = Path(f"{self.url.database}.lock")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        else:
            with self.engine.begin() as connection:
                limit = f"SET LOCAL idle_in_transaction_session_timeout = '{LOCK_S}s'"
                connection.exec_driver_sql(limit)
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
                yield

    @contextmanager
    def reached(self) -> Iterator[None]:
        """Turn what a storage that is not there raises into a UsageError, without the password."""
        try:
            yield
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError, OSError, ImportError) as error:
            deepest = error.__cause__ or error
            why = str(getattr(deepest, "orig", None) or deepest).strip().splitlines()[0]
            if self.url.password:
                why = why.replace(str(self.url.password), "***")
            raise UsageError(
                f"--storage: cannot use {self.place()}: {why}", "--storage with a server that runs"
            ) from None

    def connect_options(self) -> dict:
        if self.url.get_backend_name() == "sqlite":
            return {"timeout": 60}  # seconds that it waits for another process's write
        return {"options": "-c timezone=UTC"}  # the same for all, as heartbeats are stored as local time


def drawn(tried: list[FrozenTrial]) -> dict:
    """What the attempts at a point were to try, as far as it was drawn before they died."""
    return {} if not tried else tried[-1].system_attrs.get("fixed_params", {}) | tried[-1].params


def read_url(text: str) -> URL:
    """Raises UsageError for what is no SQLite file and no PostgreSQL database."""
    hint = "--storage postgresql://USER:PASSWORD@HOST/DATABASE"
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):  # whose text repeats the URL
        raise UsageError("--storage: is no URL of a database.", hint) from None
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    kind = url.drivername.partition("+")[0]
    if kind not in ("sqlite", "postgresql") or not url.database or url.database == ":memory:":
        raise UsageError("--storage: must be a SQLite file or a PostgreSQL database.", hint)
    return url


def distribution(one: Searched) -> BaseDistribution:
    if one.choices:
        return CategoricalDistribution(one.choices)
    if one.whole:
        return IntDistribution(int(one.low), int(one.high), log=one.log)
    return FloatDistribution(one.low, one.high, log=one.log)


def worker_name() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"
