"""`fastcifar tune lr` and `fastcifar tune batch`: two numbers measured on this machine, before any long training."""

import argparse
import json
from pathlib import Path

from fastcifar.errors import EXIT_DONE
from fastcifar.studies.flags import Flags, read_train


def flags() -> Flags:
    parser = Flags(
        "tune",
        "Measure a learning rate or a batch size. lr: a range test, the rate rising with every step until the loss "
        "suffers. batch: images a second and memory of a training step, the batch doubling from --batch_size "
        "(default: 32).",
        "lr|batch [--out DIR]",
    )
    parser.add_argument("what", choices=("lr", "batch"), metavar="lr|batch", help="what to find")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="for tune.json and tune.png (default: a new one in runs/)"
    )
    return parser


def run(words: list[str]) -> int:
    """Measure, print the table and the suggestion, write both with a picture; returns the exit code.

    Raises DataError, DeviceError, DivergedError, UsageError.
    """
    own, rest = flags().split(words)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--batch_size")
    if own.what == "batch" and first.parse_known_args(rest)[0].batch_size is None:
        rest = ["--batch_size", "32", *rest]
    job, chosen = read_train(rest)

    from fastcifar.cli import prepare_process

    prepare_process()
    from fastcifar.display import Display
    from fastcifar.run import RunFolder, source_commit, write_atomically
    from fastcifar.setup import set_up
    from fastcifar.studies import tune_batch, tune_lr

    tuner, display = {"lr": tune_lr, "batch": tune_batch}[own.what], Display()
    setup = set_up(job, display)
    report = tuner.measure(job, setup, display)
    display.close()
    report = {"commit": source_commit(), "recipe": job.recipe, "dataset": setup.dataset.name, **report}
    folder = RunFolder.create(own.out, f"tune-{own.what}").path
    write_atomically(folder / "tune.json", (json.dumps(report, indent=2) + "\n").encode())
    write_atomically(folder / "tune.png", tuner.draw(report))
    for line in tuner.lines(report):
        print(line)
    print(f"\npicture: {folder / 'tune.png'}")
    if chosen.json:
        print(json.dumps(report))
    return EXIT_DONE
