"""The words of a study: first what it is about, then its own flags and any of `train`, which `train` itself reads."""

import argparse
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

from jsonargparse import Namespace

from fastcifar.errors import UsageError
from fastcifar.job import Job
from fastcifar.parsers import parse, read_job

# What a study sets itself, or what would end a training early.
SET_BY_THE_STUDY = ("--recipe", "--config", "--resume", "--plan", "--target", "--patience")


class Flags(argparse.ArgumentParser):
    """The study's own flags. Wrong ones raise UsageError.

    Args:
        first: the word before all flags, such as RECIPE; "[RECIPE ...]" is any number of them.
    """

    def __init__(self, verb: str, first: str, description: str, usage: str):
        super().__init__(
            prog=f"fastcifar {verb}",
            usage=f"fastcifar {verb} {first} {usage} [any flag of train]",
            description=description,
            epilog="Recipes: `fastcifar recipes list`. Any flag of train: `fastcifar train --recipe NAME --help`.",
            allow_abbrev=False,
        )
        self.verb, self.first = verb, first

    def add_seeds(self) -> None:
        self.add_argument("--seeds", metavar="N", type=int, default=1, help="train with each of the seeds 0 to N-1")

    def add_out(self, default: str) -> None:
        self.add_argument("--out", metavar="DIR", type=Path, default=None, help=f"the folder (default: {default})")

    def split(self, words: list[str]) -> tuple[list[str], argparse.Namespace, list[str]]:
        """(the words before all flags, the study's own flags, the words that are left for `train`)

        Later ones cannot be told from values: argparse does not know how many words a flag of `train` takes.
        """
        found = list(takewhile(lambda word: not word.startswith("-"), words))
        own, rest = self.parse_known_args(words[len(found) :])
        if len(found) != 1 and not self.first.startswith("["):
            self.error(f"{self.verb}: needs one word before all flags, {self.first}, not {len(found)}.")
        return found, own, rest

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"{self.prog} --help")


def refuse_flags(verb: str, words: list[str], *more: str) -> None:
    """Raise UsageError for a flag of `train` that is the study's to set, or one of `more`."""
    for word in words:
        flag = word.partition("=")[0]
        if flag in (*SET_BY_THE_STUDY, *more):
            raise UsageError(f"{flag}: cannot be given to `fastcifar {verb}`.", f"fastcifar {verb} --help")


def read_train(words: list[str], verb: str) -> tuple[Job, Namespace]:
    """The job that these flags of `train` describe, and the flags. Raises UsageError, also for --resume."""
    chosen = parse(["train", *words], verb)["train"]
    if chosen.resume is not None:
        raise UsageError("--resume: a study goes on by itself.", "the same command once more, without --resume")
    return read_job(chosen), chosen
