"""`fastcifar tune lr` and `fastcifar tune batch`: two numbers measured on this machine, before any long training."""

import argparse
import json
from contextlib import suppress

from fastcifar.errors import EXIT_DONE, UsageError
from fastcifar.run import make_folder, pick_folder, source_commit, write_atomically, write_json
from fastcifar.studies.flags import Flags, read_train

WHAT = ("lr", "batch")


def flags() -> Flags:
    parser = Flags(
        "tune",
        "|".join(WHAT),
        "Measure a learning rate or a batch size. lr: a range test, the rate rising with every step until the loss "
        "suffers. batch: images a second and memory of a training step, the batch doubling from --batch_size "
        "(default: 32).",
        "[--out DIR]",
    )
    parser.add_out("a new one in runs/")
    return parser


def run(words: list[str]) -> int:
    """Measure, print the table and the suggestion, write both with a picture; returns the exit code.

    Raises DataError, DeviceError, DivergedError, UsageError.
    """
    [what], own, rest = flags().split(words)
    if what not in WHAT:
        raise UsageError(f"tune: finds {' or '.join(WHAT)}, not {what}.", "fastcifar tune --help")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--batch_size")
    if what == "batch" and first.parse_known_args(rest)[0].batch_size is None:
        rest = ["--batch_size", "32", *rest]
    job, chosen = read_train(rest, "tune")
    folder = own.out or pick_folder(f"tune-{what}")
    if (folder / "tune.json").exists():
        raise UsageError(f"--out: {folder} already holds what was measured before.", "another --out DIR")
    make_folder(folder)

    from fastcifar.cli import prepare_process

    prepare_process()
    from fastcifar.devices import out_of_memory_named
    from fastcifar.display import Display
    from fastcifar.setup import set_up
    from fastcifar.studies import tune_batch, tune_lr

    tuner, display = {"lr": tune_lr, "batch": tune_batch}[what], Display()
    try:
        with out_of_memory_named(job.settings.batch_size):
            setup = set_up(job, display)
            report = tuner.measure(job, setup, display)
        report = {"commit": source_commit(), "recipe": job.recipe, "dataset": setup.dataset.name, **report}
        write_json(folder / "tune.json", report)
        write_atomically(folder / "tune.png", tuner.draw(report))
    finally:
        display.close()
        with suppress(OSError):
            folder.rmdir()  # succeeds only if it is empty: nothing was measured
    for line in tuner.lines(report):
        print(line)
    print(f"\npicture: {folder / 'tune.png'}")
    if chosen.json:
        print(json.dumps(report))
    return EXIT_DONE
