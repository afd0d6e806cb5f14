"""A training of a study: finished once, gone on with after a stop, its errors passed on by kind."""

import json
import signal
import subprocess
import sys
import time

import pytest

from fastcifar.errors import DeviceError, DivergedError, UserError
from fastcifar.studies import trial
from fastcifar.studies.trial import run_trial

WORDS = ["--recipe", "mlp", "--dataset", "shapes10", "--device", "cpu", "--steps", "4", "--batch_size", "100"]


def test_finished_once(tmp_path):
    result = run_trial(WORDS, tmp_path / "run")
    assert result["steps"] == 4
    written_s = (tmp_path / "run" / "result.json").stat().st_mtime_ns
    assert run_trial(WORDS, tmp_path / "run") == result
    assert (tmp_path / "run" / "result.json").stat().st_mtime_ns == written_s


def test_errors_keep_their_kind_and_text(tmp_path):
    with pytest.raises(UserError, match="--batch_size: 90000 is more than") as caught:
        run_trial([*WORDS, "--batch_size", "90000"], tmp_path / "large")
    assert caught.value.exit_code == 2
    assert caught.value.hint.startswith("--batch_size ")
    with pytest.raises(DivergedError):
        run_trial([*WORDS, "--optim.lr", "1e30", "--steps", "20"], tmp_path / "diverged")


def test_killed_it_is_probably_for_want_of_memory(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(DeviceError, match="want of memory") as caught:
        run_trial(WORDS, tmp_path / "run")
    assert caught.value.hint == "--batch_size 50"


def test_who_takes_over_trains_here(tmp_path, monkeypatch):
    """Not on the device, nor with the loader, of the worker that began it."""
    program, folder = tmp_path / "python", tmp_path / "run"
    program.write_text('#!/bin/sh\necho "$@" >&2\nexit 130\n')
    program.chmod(0o755)
    folder.mkdir()
    (folder / "checkpoint.safetensors").touch()
    monkeypatch.setattr(sys, "executable", str(program))
    said = []
    monkeypatch.setattr(trial.sys.stderr, "write", said.append)
    with pytest.raises(KeyboardInterrupt):
        run_trial([*WORDS, "--data", "here"], folder)
    resumed = f"-m fastcifar train --resume {folder} --device=cpu --loader=resident --data=here"
    assert "".join(said).strip() == resumed


def test_a_bug_says_what_to_type_to_see_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match="exit code 1 of: fastcifar train --recipe mlp"):
        run_trial(WORDS, tmp_path / "run")


def test_what_does_not_end_by_itself_is_ended(monkeypatch):
    """As after a SIGINT to the study alone."""
    monkeypatch.setattr(trial, "MOMENT_S", 0.1)
    with subprocess.Popen(["sleep", "60"]) as process:
        trial.stop(process)
    assert process.returncode == -signal.SIGTERM


def test_stopped_gently_it_leaves_a_checkpoint_and_goes_on(tmp_path):
    folder, words = tmp_path / "run", [*WORDS, "--steps", "1500"]
    call = f"run_trial({words}, Path({str(folder)!r}))"
    program = f"from pathlib import Path; from fastcifar.studies.trial import run_trial; {call}"
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    while not (folder / "checkpoint.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    stopped_at = len((folder / "metrics.jsonl").read_text().splitlines())
    assert 0 < stopped_at < 1500
    assert not (folder / "result.json").exists()
    result = run_trial(words, folder)
    assert result["steps"] == 1500
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 1501))
