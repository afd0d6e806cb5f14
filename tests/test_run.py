"""The run folder: whole files or none."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from fastcifar.budget import Knot
from fastcifar.errors import UsageError
from fastcifar.run import Checkpoint, Metrics, RunFolder, source_commit, write_atomically

ENDLESS_WRITER = """
import sys, torch
from pathlib import Path
from fastcifar.run import RunFolder, Checkpoint
folder = RunFolder(Path(sys.argv[1]))
for step in range(10**9):
    folder.write_checkpoint(Checkpoint({"model.x": torch.full((10**6,), float(step))}, step, 0.0, 0.0, []))
    print(step, flush=True)
"""


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    folder = RunFolder.create(tmp_path / "run", "speed")
    tensors = {"model.a": torch.randn(3, 4), "optimizer.0.1": torch.ones(2, dtype=torch.bfloat16)}
    folder.write_checkpoint(Checkpoint(tensors, 17, 1.5, 1.25, [Knot(0, 0.0, 9), Knot(3, 0.25, 20)]))
    found = folder.read_checkpoint()
    assert (found.step, found.spent_s, found.train_s) == (17, 1.5, 1.25)
    assert found.knots == [Knot(0, 0.0, 9), Knot(3, 0.25, 20)]
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())


def test_kill_9_while_writing_leaves_a_whole_checkpoint(tmp_path):
    for _ in range(5):
        writer = subprocess.Popen(
            [sys.executable, "-c", ENDLESS_WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        steps = [int(writer.stdout.readline()) for _ in range(20)]
        writer.kill()
        writer.wait()
        found = RunFolder(tmp_path).read_checkpoint()
        assert found.step >= steps[-1]
        assert (found.tensors["model.x"] == found.step).all()
    RunFolder(tmp_path).finish({"done": True})
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"], "no half of a checkpoint may stay"


def test_a_folder_is_held_by_one_process(tmp_path):
    """A child that was forked meanwhile, as DataLoader's workers are, does not keep it when its parent is killed."""
    # It lets go of the lock before `fork` returns in it, which may be after the parent has gone on. `os.write` keeps
    # both lines whole: under PYTHONUNBUFFERED `print` writes a text and its end apart.
    script = """
import os, sys, time
from pathlib import Path
from fastcifar.run import RunFolder
with RunFolder(Path(sys.argv[1])).held():
    os.write(1, b"forked\\n" if os.fork() == 0 else b"held\\n")
    time.sleep(60)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert holder.stdout is not None
        assert {holder.stdout.readline() for _ in range(2)} == {"forked\n", "held\n"}
        with pytest.raises(UsageError, match="another process is training in this folder"), RunFolder(tmp_path).held():
            pass
        holder.kill()
        holder.wait()
        with RunFolder(tmp_path).held():
            pass
        assert not list(tmp_path.iterdir()), "nothing of it stays"
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def with_facts(facts: str) -> bytes:
    return safetensors.torch.save({"model.x": torch.zeros(1)}, {"facts": facts})


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ",
        b"\xff" * 64,
        with_facts("[]"),
        with_facts('{"step": 1, "knots": [{"steps": 3}]}'),
        with_facts('{"step": 1, "spent_s": 0, "train_s": 0, "knots": [], "mood": "bad"}'),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage):
    (tmp_path / "checkpoint.safetensors").write_bytes(damage)
    with pytest.raises(UsageError, match=r"checkpoint\.safetensors"):
        RunFolder(tmp_path).read_checkpoint()


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    script = (
        "import resource, signal, sys; from pathlib import Path; from fastcifar.run import write_atomically\n"
        "from fastcifar.errors import UsageError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_atomically(Path(sys.argv[1]), b'x' * 10_000)\n"
        "except UsageError as error: print(error)\n"
    )
    target = tmp_path / "result.json"
    write_atomically(target, b"old")
    done = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True, text=True, check=True)
    assert "--out: cannot write" in done.stdout
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_full_disk_is_named(tmp_path):
    script = (
        "import resource, signal, sys; from pathlib import Path; from fastcifar.run import Metrics, RunFolder\n"
        "from fastcifar.errors import UsageError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "metrics = Metrics(RunFolder(Path(sys.argv[1])))\n"
        "try:\n    while True: metrics.add({'loss': 1.0})\n"
        "except UsageError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert f"cannot write {tmp_path}/metrics.jsonl" in done.stdout


def test_a_folder_that_cannot_be_looked_into_is_named(tmp_path):
    for folder in (tmp_path / ("x" * 300), tmp_path / "a file" / "run"):
        (tmp_path / "a file").touch()
        with pytest.raises(UsageError, match="--out: cannot make the folder"):
            RunFolder.create(folder, "speed")
        with pytest.raises(UsageError, match="holds no run"):
            RunFolder.open(folder)


def test_hints_can_be_typed_as_they_stand(tmp_path):
    folder = RunFolder.create(tmp_path / "my run", "speed")
    folder.write_checkpoint(Checkpoint({}, 1, 0.0, 0.0, []))
    with pytest.raises(UsageError) as caught:
        RunFolder.create(folder.path, "speed")
    assert caught.value.hint == f"fastcifar train --resume '{folder.path}', or another --out"
    folder.finish({})
    with pytest.raises(UsageError) as caught:
        RunFolder.create(folder.path, "speed")
    assert caught.value.hint == f"fastcifar eval '{folder.path}', or another --out"


def test_metrics_past_the_checkpoint_and_half_lines_are_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    metrics = Metrics(folder)
    for step in range(1, 6):
        metrics.add({"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    resumed = Metrics(folder, steps_done=3)
    resumed.add({"step": 4, "again": True})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "again": True}]
    assert resumed.rows == [json.loads(line) for line in lines]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one commit, and this package in it as if it had been cloned there."""
    monkeypatch.delenv("FASTCIFAR_COMMIT", raising=False)
    if shutil.which("git") is None:
        pytest.skip("needs git")
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false"]
    (tmp_path / "run.py").write_text("")

    def git(*words):
        return subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True, text=True).stdout

    git("init")
    git("add", "run.py")
    git("commit", "-m", "one")
    return tmp_path, git("rev-parse", "HEAD").strip()


def test_the_commit_is_that_of_the_checkout(checkout, monkeypatch):
    folder, commit = checkout
    monkeypatch.setattr("fastcifar.run.__file__", str(folder / "run.py"))
    assert source_commit() == commit
    (folder / "run.py").write_text("changed")
    assert source_commit() == f"{commit}-dirty"


def test_the_commit_of_somebody_elses_checkout_is_not_ours(checkout, monkeypatch):
    """pip puts the package into a virtual environment, and that may lie in any repository."""
    folder, _ = checkout
    (folder / ".venv").mkdir()
    (folder / ".venv" / "run.py").write_text("")
    monkeypatch.setattr("fastcifar.run.__file__", str(folder / ".venv" / "run.py"))
    assert source_commit() is None


def test_an_image_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("FASTCIFAR_COMMIT", "0123abc")
    assert source_commit() == "0123abc"
