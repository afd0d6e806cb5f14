"""The words of a study: a few flags of its own and, beside them, any flag of `train`, which `train` itself reads."""

import argparse
from pathlib import Path
from typing import NoReturn

from jsonargparse import Namespace

from fastcifar.errors import UsageError
from fastcifar.job import Job
from fastcifar.parsers import parse, read_job


class Flags(argparse.ArgumentParser):
    """The study's own flags. `split` leaves the others; wrong ones raise UsageError."""

    def __init__(self, verb: str, description: str, usage: str):
        super().__init__(
            prog=f"fastcifar {verb}",
            usage=f"fastcifar {verb} {usage} [any flag of train]",
            description=description,
            epilog="Any flag of train: `fastcifar train --recipe NAME --help` lists them.",
            allow_abbrev=False,
        )

    def add_study_arguments(self, default_out: str) -> None:
        """--seeds and --out."""
        self.add_argument("--seeds", metavar="N", type=int, default=1, help="train with each of the seeds 0 to N-1")
        self.add_argument("--out", metavar="DIR", type=Path, default=None, help=f"the folder (default: {default_out})")

    def split(self, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """(the study's own flags, the words that are left for `train`)"""
        return self.parse_known_args(words)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"{self.prog} --help")


def read_train(words: list[str]) -> tuple[Job, Namespace]:
    """The job that these flags of `train` describe, and the flags. Raises UsageError, also for --resume."""
    chosen = parse(["train", *words])["train"]
    if chosen.resume is not None:
        raise UsageError("--resume: a study goes on by itself.", "the same command once more, without --resume")
    return read_job(chosen), chosen
