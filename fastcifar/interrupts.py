"""Ctrl-C and SIGTERM, taken between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupts:
    """While `held`, the first signal only sets `caught`; the second one, or any outside, raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.caught = False
        self._held = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, *_) -> None:
        if not self._held or self.caught:
            raise KeyboardInterrupt
        self.caught = True

    @contextmanager
    def held(self) -> Iterator[None]:
        self._held = True
        try:
            yield
        finally:
            self._held = False
