"""One training of a study: a process of its own, and a run folder like any other.

A training that diverges or runs out of memory takes nothing else with it, and what is found finished is not repeated.
What a study makes of its error: to all of them one that diverges is a result. One out of memory, or killed by the
kernel for want of it, is a result of a sweep too, where a larger model or batch may be what is tried; `ablate` and
`reproduce` stop there with its message, and go on once there is more memory.
"""

import json
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from fastcifar.errors import (
    EXIT_DEVICE,
    EXIT_DIVERGED,
    EXIT_INTERRUPTED,
    DeviceError,
    DivergedError,
    UserError,
    read_error,
)
from fastcifar.studies.flags import read_train

MOMENT_S = 10.0  # for a training that was told to stop to write its checkpoint


def run_trial(words: list[str], folder: Path) -> dict:
    """Train with these flags of `fastcifar train`, `folder` being the run folder; returns what result.json holds.

    A finished run in the folder is taken as it is, an interrupted one is gone on with. Progress goes to stderr.

    Raises:
        DivergedError: the loss is no longer a number.
        DeviceError: no such device, or not enough memory on it or on this machine.
        UserError: any other mistake that `train` names.
        KeyboardInterrupt: a signal; the run folder keeps a checkpoint if there was time for one.
        RuntimeError: the process died in another way.
    """
    if (folder / "result.json").is_file():
        return json.loads((folder / "result.json").read_text())
    begun = (folder / "checkpoint.safetensors").is_file()
    flags = ["--resume", str(folder), *here(words)] if begun else [*words, "--out", str(folder)]
    command = [sys.executable, "-m", "fastcifar", "train", *flags]
    # `train` catches a signal, writes its checkpoint and ends; Control-C reaches it by itself, a kill of us does not.
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            said = "".join(echo(process))
        except KeyboardInterrupt:
            stop(process)
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if process.returncode == 0:
        return json.loads((folder / "result.json").read_text())
    if process.returncode == -signal.SIGKILL:
        batch_size = read_train(words, "train")[0].settings.batch_size
        message = "`fastcifar train` was killed, probably for want of memory."
        raise DeviceError(message, f"--batch_size {max(2, batch_size // 2)}")
    if "fastcifar: " not in said and process.returncode not in (EXIT_INTERRUPTED, -signal.SIGTERM):
        raise RuntimeError(f"exit code {process.returncode} of: {shlex.join(['fastcifar', *command[3:]])}")
    raise named(process.returncode, said)


def here(words: list[str]) -> list[str]:
    """Those of the flags that say what trains, and on which data: whoever began it may have had others."""
    chosen = read_train(words, "train")[1]
    flags = {"device": chosen.device, "loader": chosen.loader, "data": chosen.data, "workers": chosen.workers}
    return [f"--{name}={value}" for name, value in flags.items() if value is not None]


def stop(process: subprocess.Popen) -> None:
    """Wait until it has ended. Control-C has reached it by itself; a signal to this process alone has not."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(MOMENT_S)
        return
    process.terminate()
    process.wait()


def echo(process: subprocess.Popen) -> list[str]:
    """Pass on what the process says, and keep it."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        sys.stderr.write(line)
        lines.append(line)
    return lines


def named(code: int, said: str) -> BaseException:
    """The error that a training ended with, from what it said last."""
    if code in (EXIT_INTERRUPTED, -signal.SIGTERM):  # the latter while it still imported
        return KeyboardInterrupt()
    message, hint = read_error(said)
    if code == EXIT_DIVERGED:
        return DivergedError(message, hint)
    if code == EXIT_DEVICE:
        return DeviceError(message, hint)
    error = UserError(message, hint)
    error.exit_code = code
    return error
