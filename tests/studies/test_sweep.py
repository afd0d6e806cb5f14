"""A sweep: what may be searched, and a queue that loses no point and runs none twice, whoever is killed."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastcifar.errors import DeviceError, DivergedError, UsageError, UserError
from fastcifar.recipes import find_recipe
from fastcifar.studies.fields import split_values
from fastcifar.studies.search import Searched, read_search

optuna = pytest.importorskip("optuna", reason="pip install 'fastcifar[sweep]'")
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning", "ignore:Heartbeat of storage")

WORDS = ["--dataset", "shapes10", "--device", "cpu", "--batch_size", "100", "--tta.share", "0"]
WORDS += ["--model.hidden", "[32]"]

# A worker as it is, but for shorter times.
WORKER = (
    "import sys; from fastcifar.studies import queue; queue.BEAT_S, queue.GRACE_S, queue.WAIT_S = 1, 4, 0.2\n"
    "from fastcifar.cli import main; sys.exit(main(sys.argv[1:]))"
)


def start(log: Path, *words: str) -> subprocess.Popen:
    """A worker that leads a process group of its own, its training included."""
    command = [sys.executable, "-c", WORKER, "sweep", "mlp", *words, *WORDS]
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def sweep(*words: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fastcifar", "sweep", *words]
    return subprocess.run(command, capture_output=True, text=True, **options)


def states(url: str, study: str) -> dict[int, list[str]]:
    """By point, how each attempt at it ended."""
    found = optuna.load_study(study_name=study, storage=url)
    attempts: dict[int, list[str]] = {}
    for trial in found.trials:
        attempts.setdefault(trial.user_attrs["point"], []).append(trial.state.name)
    return attempts


# What is searched


def test_choices_and_ranges():
    searched = read_search(
        ["--optim.lr=1e-4..1e-1", "batch-size=16..128", "model.dropout=0..0.5", "optim.name=adam,sgd"],
        "mlp",
        find_recipe("mlp"),
    )
    assert searched == [
        Searched("optim.lr", low=1e-4, high=1e-1),
        Searched("batch_size", low=16, high=128, whole=True),
        Searched("model.dropout", low=0.0, high=0.5),
        Searched("optim.name", ("adam", "sgd")),
    ]
    assert [one.log for one in searched] == [True, False, False, False]
    assert split_values("[64,256],[32,(1,2)],3") == ["[64,256]", "[32,(1,2)]", "3"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--search", "optim.lr=1,2"], "RECIPE"),
        (["--epochs", "2", "mlp", "--search", "optim.lr=1,2"], "RECIPE"),
        (["mlp"], "--search"),
        (["nosuch", "--search", "optim.lr=1,2"], "nosuch"),
        (["mlp", "--search", "optim.lr"], "'optim.lr'"),
        (["mlp", "--search", "optim.speed=1,2"], "optim.speed"),
        (["mlp", "--search", "optim.slower=1,2"], "no field optim.slower.\n  try: fastcifar recipes show mlp"),
        (["mlp", "--search", "optim.lr=1,"], "optim.lr"),
        (["mlp", "--search", "optim.lr=1,1"], "optim.lr"),
        (["mlp", "--search", "optim.lr=1,2", "optim.lr=3"], "optim.lr"),
        (["mlp", "--search", "optim.lr=0.1,-1"], "optim.lr"),
        (["mlp", "--search", "optim.lr=0.1,fast"], "optim.lr"),
        (["mlp", "--search", "optim.name=adam,lion"], "optim.name"),
        (["mlp", "--search", "optim.name=adam..sgd"], "optim.name"),
        (["mlp", "--search", "batch_size=1.5..9", "--method", "random"], "batch_size"),
        (["mlp", "--search", "optim.lr=0.1..0.01", "--method", "random"], "optim.lr"),
        (["mlp", "--search", "model.dropout=0.5..1.5", "--method", "random"], "model.dropout"),
        (["mlp", "--search", "optim.lr=0.01..0.1"], "--method"),
        (["mlp", "--search", "optim.lr=0.01,0.1", "--trials", "5"], "--trials"),
        (["mlp", "--search", "optim.lr=0.01,0.1", "--method", "tpe", "--trials", "0"], "--trials"),
        (["mlp", "--search", "optim.lr=0.01,0.1", "--method", "guess"], "--method"),
        (["mlp", "--search", "optim.lr=0.01,0.1", "--bogus", "1"], "--bogus"),
        (["mlp", "--search", "optim.lr=0.01,0.1", "--seed", "-1"], "--seed"),
        (["mlp", "--search", "optim.lr=0.01,0.1", "--recipe", "cnn4"], "--recipe"),
        (["mlp", "--search", "optim.lr=0.01,0.1", "--resume", "runs/x"], "--resume"),
        (["mlp", "--search", "optim.lr=0.01,0.1", "--target", "0.9"], "--target: cannot be given"),
        (["mlp", "--search", "optim.lr=0.01,0.1", "--patience=2"], "--patience: cannot be given"),
        (["speed", "--search", "optim.warmup=0,0.25", "optim.whiten_bias_until=0.3,0.15"], "whiten_bias_until"),
    ],
)
def test_wrong_usage_names_the_flag(words, said, tmp_path, monkeypatch):
    from fastcifar.studies.sweep import run

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        run(words)
    assert said in str(caught.value)
    assert caught.value.hint
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("postgresql://me:sesame@127.0.0.1:1/db", "me:***@127.0.0.1:1"),
        ("sqlite://", "SQLite file"),
        ("mysql://me:sesame@host/db", "SQLite file"),
        ("sesame", "no URL"),
    ],
)
def test_a_storage_that_cannot_be_used_ends_with_2_and_keeps_the_password(storage, said, tmp_path):
    done = sweep("mlp", "--search", "optim.lr=0.01,0.1", "--storage", storage, "--out", str(tmp_path / "out"), *WORDS)
    assert done.returncode == 2, done.stderr
    assert "--storage" in done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "sesame" not in done.stderr + done.stdout


# The queue, without training

CLAIMER = """
import json, sys
from fastcifar.studies.queue import Queue
grid = [{"x": str(x)} for x in range(24)]
from fastcifar.studies.search import Searched
searched = [Searched("x", tuple(point["x"] for point in grid))]
queue = Queue(sys.argv[1], "q", {"search": "x"}, searched, points=24, grid=grid, method="grid", seed=0)
while task := queue.claim():
    print(task.point, task.parameters["x"])
    queue.complete(task, task.point / 24, {"seconds": 1.0})
"""


def test_many_processes_take_each_point_once(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    command = [sys.executable, "-c", CLAIMER, url]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = "".join(worker.communicate()[0] for worker in workers)
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    taken = [tuple(map(int, line.split())) for line in said.splitlines()]
    assert sorted(taken) == [(n, n) for n in range(24)]
    assert states(url, "q") == {n: ["COMPLETE"] for n in range(24)}


def open_queue(tmp_path: Path, method: str, points: int = 3):
    from fastcifar.studies.queue import Queue

    searched = [Searched("optim.lr", low=1e-4, high=1e-1), Searched("batch_size", low=16, high=4096, whole=True)]
    url, asked = f"sqlite:///{tmp_path / 'study.db'}", {"search": "lr"}
    return Queue(url, "q", asked, searched, points=points, grid=None, method=method, seed=0)


def take(queue):
    task = queue.claim()
    assert task is not None
    return task


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_a_dead_workers_point_is_tried_again_as_it_was(method, tmp_path, monkeypatch):
    from fastcifar.studies import queue as module

    monkeypatch.setattr(module, "GRACE_S", 1)
    dead, other = open_queue(tmp_path, method), open_queue(tmp_path, method)
    lost = take(dead)
    second = take(other)
    assert (lost.point, second.point) == (0, 1)
    other.complete(second, 0.5, {"seconds": 1.0})
    time.sleep(2.5)
    third, again = take(other), take(other)
    assert (third.point, again.point) == (2, 0)
    assert again.parameters == lost.parameters
    dead.complete(lost, 0.9, {"seconds": 1.0})  # it was only slow, but the point is another's now
    other.complete(third, 0.4, {"seconds": 1.0})
    other.give_back(again)
    last = take(other)
    assert last.parameters == lost.parameters
    other.complete(last, 0.7, {"seconds": 1.0})
    assert other.claim() is None
    assert other.running() == 0
    assert other.is_complete()
    assert [(trial.user_attrs["point"], trial.value) for trial in other.finished()] == [(0, 0.7), (1, 0.5), (2, 0.4)]
    assert take(open_queue(tmp_path, method, points=4)).point == 3, "more --trials go on with a study"


def test_fewer_trials_than_were_begun_end_there(tmp_path):
    many, few = open_queue(tmp_path, "random", points=9), open_queue(tmp_path, "random", points=2)
    for queue in (many, few):
        queue.complete(take(queue), 0.5, {"seconds": 1.0})
    assert few.claim() is None
    assert few.is_complete()
    assert not many.is_complete()
    assert take(many).point == 2


def test_a_point_given_back_at_the_last_moment_is_trained(tmp_path, monkeypatch):
    """Between this worker's look for a free point and its question whether all are complete."""
    from fastcifar.studies import queue as module
    from fastcifar.studies import sweep

    monkeypatch.setattr(module, "WAIT_S", 0.0)
    monkeypatch.setattr(sweep, "run_trial", lambda words, folder: {"val_acc": 0.5, "wall_s": 1.0})
    queue, other = open_queue(tmp_path, "random", points=1), open_queue(tmp_path, "random", points=1)
    lost, looks = take(other), []

    def claim():
        looks.append(found := module.Queue.claim(queue))
        if len(looks) == 1:
            other.give_back(lost)
        return found

    monkeypatch.setattr(queue, "claim", claim)
    sweep.work(queue, ["--recipe", "mlp"], tmp_path)
    assert looks[0] is None
    assert [trial.value for trial in queue.finished()] == [0.5]


def test_drawn_points_repeat_for_a_seed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = open_queue(tmp_path / "a", "random"), open_queue(tmp_path / "b", "random")
    drawn = [take(first).parameters for _ in range(3)]
    assert drawn == [take(second).parameters for _ in range(3)]
    assert len({point["optim.lr"] for point in drawn}) == 3
    assert all(16 <= int(point["batch_size"]) <= 4096 for point in drawn)


TOO_LARGE = UserError("--batch_size: 90000 is more than the 45000 training images.")  # as a training of its own says it


@pytest.mark.parametrize("error", [DivergedError("nan"), DeviceError("Out of memory"), TOO_LARGE])
def test_what_diverges_counts_and_is_not_repeated(error, tmp_path, monkeypatch):
    from fastcifar.studies import sweep

    def fail(words, folder):
        raise error

    monkeypatch.setattr(sweep, "run_trial", fail)
    queue = open_queue(tmp_path, "tpe", points=1)
    sweep.train_point(queue, take(queue), ["--recipe", "mlp"], tmp_path)
    assert [(one.value, one.user_attrs["failed"]) for one in queue.finished()] == [(0.0, error.message)]
    assert queue.claim() is None


def test_values_that_do_not_go_together_count_as_failed(tmp_path):
    """As drawn from two ranges of which each end is fine by itself."""
    from fastcifar.studies import sweep

    queue = open_queue(tmp_path, "random", points=1)
    task = replace(take(queue), parameters={"optim.warmup": "0.25", "optim.whiten_bias_until": "0.15"})
    sweep.train_point(queue, task, ["--recipe", "speed"], tmp_path)
    assert "--optim.whiten_bias_until" in queue.finished()[0].user_attrs["failed"]


@pytest.mark.parametrize(
    ("second", "code"), [(DeviceError("Out of memory", "--batch_size 8"), 5), (DivergedError("nan"), 4)]
)
def test_if_all_failed_the_exit_code_says_how(second, code, tmp_path, monkeypatch):
    from fastcifar.studies import sweep

    errors = [DeviceError("Out of memory", "--batch_size 8"), second]

    def fail(words, folder):
        raise errors.pop(0)

    monkeypatch.setattr(sweep, "run_trial", fail)
    queue, words = open_queue(tmp_path, "random", points=2), ["--recipe", "mlp"]
    sweep.work(queue, words, tmp_path)
    searched = read_search(["optim.lr=1e-4..1e-1", "batch_size=16..4096"], "mlp", find_recipe("mlp"))
    error = sweep.name_failure(sweep.write_report(queue, "q", words, searched, "random", tmp_path), tmp_path)
    assert (error.exit_code, error.hint) == (code, "--batch_size 8")
    assert (tmp_path / "sweep.md").read_text().count("| failed |") == 2


FULL = UserError("--out: cannot write result.json: No space left on device.")
GONE = DeviceError("--device: no GPU can be used.")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("no such data"), FULL, GONE, RuntimeError("killed")])
def test_what_is_stopped_is_free_again_at_once(error, tmp_path, monkeypatch):
    from fastcifar.studies import sweep

    def fail(words, folder):
        raise error

    monkeypatch.setattr(sweep, "run_trial", fail)
    queue = open_queue(tmp_path, "tpe", points=1)
    task = take(queue)
    with pytest.raises(type(error)):
        sweep.train_point(queue, task, ["--recipe", "mlp"], tmp_path)
    again = take(queue)
    assert (again.point, again.parameters) == (0, task.parameters)


# Whole sweeps


def test_two_workers_on_sqlite_draw_exactly_n(tmp_path):
    out = tmp_path / "out"
    words = ["--search", "optim.lr=1e-3..1e-1", "optim.name=adam,sgd", "--method", "tpe", "--trials", "3"]
    words += ["--out", str(out), "--steps", "10"]
    workers = [start(tmp_path / f"{number}.log", *words) for number in range(2)]
    codes = [worker.wait(300) for worker in workers]
    assert codes == [0, 0], "".join(log.read_text() for log in tmp_path.glob("*.log"))
    assert states(f"sqlite:///{out / 'study.db'}", "sweep-mlp") == {n: ["COMPLETE"] for n in range(3)}
    report = json.loads((out / "sweep.json").read_text())
    assert len(report["trials"]) == 3
    accuracies = [row["val_acc"] for row in report["trials"]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert all(row["val_acc"] == 0 for row in report["trials"] if row["failed"])
    best = report["best"]
    result = json.loads((out / f"trial-{best['point']:05d}" / "result.json").read_text())
    assert best["val_acc"] == result["val_acc"]
    assert report["command"].startswith("fastcifar train --recipe mlp --steps 10 --dataset shapes10")
    assert f"--optim.lr={best['parameters']['optim.lr']}" in report["command"]
    assert (out / "sweep.md").read_text().count("trial-0") >= 3
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    other = sweep("mlp", "--search", "optim.lr=0.1,0.2", "--out", str(out), *WORDS)
    assert other.returncode == 2
    assert "--study" in other.stderr
    (out / "study.db").unlink()
    other = sweep("mlp", "--search", "optim.lr=0.1,0.2", "--out", str(out), *WORDS)
    assert other.returncode == 2
    assert "--out" in other.stderr


def postgres_programs() -> Path | None:
    """The newest folder of Debian's server programs, or that of the path."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if folders:
        return folders[-1]
    found = shutil.which("initdb")
    return Path(found).parent if found else None


@pytest.fixture
def postgres(tmp_path_factory):
    """A PostgreSQL server on loopback, with a password; yields its URL."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server here: apt-get install postgresql, or `make postgres`")
    # The server refuses to run as root. Its folder is beside pytest's, which only root may enter.
    user = "nobody" if os.getuid() == 0 else None
    folder = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    (folder / "password").write_text("sesame\n")
    if user:
        shutil.chown(folder, user)
        shutil.chown(folder / "password", user)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    data, log = folder / "data", folder / "log"

    def call(*command: str) -> None:
        subprocess.run(command, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    try:
        access = ["--auth", "scram-sha-256", "--username", "me", "--pwfile", str(folder / "password")]
        call(str(programs / "initdb"), "--no-sync", "--pgdata", str(data), *access)
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories= -c fsync=off"
        server = [str(programs / "pg_ctl"), "--pgdata", str(data), "--wait"]
        call(*server, "--log", str(log), "--options", options, "start")
        try:
            yield f"postgresql://me:sesame@127.0.0.1:{port}/postgres"
        finally:
            call(*server, "--mode", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def test_a_worker_killed_on_postgresql_loses_nothing(postgres, tmp_path):
    out, logs = tmp_path / "out", [tmp_path / "killed.log", tmp_path / "other.log"]
    words = ["--search", "optim.lr=0.001,0.003,0.01", "--storage", postgres, "--study", "s"]
    words += ["--out", str(out), "--steps", "200"]
    workers = [start(log, *words) for log in logs]
    killed, other = workers
    try:
        begun = None
        while not begun:
            assert killed.poll() is None, logs[0].read_text()
            time.sleep(0.05)
            named = re.search(r"(trial-\d{5}): ", logs[0].read_text())
            begun = named and out / named[1] if named and (out / named[1] / "checkpoint.safetensors").exists() else None
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait(10)
        assert begun is not None
        assert not (begun / "result.json").exists(), "it was to be killed before it was done"
        assert other.wait(300) == 0, logs[1].read_text()
    finally:
        for worker in workers:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)

    number = int(begun.name[-5:])
    url = postgres.replace("postgresql:", "postgresql+psycopg:")
    expected = {n: ["COMPLETE"] for n in range(3)} | {number: ["FAIL", "COMPLETE"]}
    assert states(url, "s") == expected
    report = json.loads((out / "sweep.json").read_text())
    assert sorted(row["parameters"]["optim.lr"] for row in report["trials"]) == ["0.001", "0.003", "0.01"]
    steps = [json.loads(line)["step"] for line in (begun / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 201)), "it went on from the checkpoint"

    # The same command, later: nothing is trained again.
    written = {path: path.stat().st_mtime_ns for path in out.glob("trial-*/result.json")}
    again = start(tmp_path / "again.log", *words)
    assert again.wait(120) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("trial-*/result.json")} == written
    assert states(url, "s") == expected
    secret = [path for path in tmp_path.rglob("*") if path.is_file() and b"sesame" in path.read_bytes()]
    assert not secret, "the password stays where it was typed"
