"""What a user did wrong, or what their machine lacks: one paragraph, the next command to type, an exit code.

Everything else is a bug and keeps its traceback.
"""

EXIT_DONE = 0
EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_DIVERGED = 4
EXIT_DEVICE = 5
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Base of the errors that `fastcifar` prints without a traceback.

    `message` says what is wrong and where; `hint` is the next command to type, or empty.
    """

    exit_code = EXIT_USAGE

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  try: {self.hint}" if self.hint else self.message


def read_error(said: str) -> tuple[str, str]:
    """(message, hint) of the error that a `fastcifar` of another process ended with, from what it said.

    Of one that ended otherwise, the last line, such as a traceback's, and no hint.
    """
    _, named, last = said.rpartition("fastcifar: ")
    if not named:
        return (said.strip().splitlines() or [""])[-1], ""
    message, _, hint = last.strip().partition("\n  try: ")
    return " ".join(message.split()), hint


class UsageError(UserError):
    """A flag, recipe or value that makes no sense."""


class DataError(UserError):
    """Data that is missing, damaged or not what it says it is."""

    exit_code = EXIT_DATA


class DataMissing(DataError):
    """There is no data where it was looked for: the one case in which --fallback-dataset applies."""


class DivergedError(UserError):
    """The loss is no longer a number."""

    exit_code = EXIT_DIVERGED


class DeviceError(UserError):
    """No such device, or not enough memory on it."""

    exit_code = EXIT_DEVICE
