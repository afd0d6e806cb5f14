"""The command line: verbs only. Each verb reads its words and calls the one function that does the work.

Whatever needs torch is imported inside the verbs, so that `fastcifar --help` answers in a fifth of a second.
"""

import gc
import importlib
import json
import os
import shlex
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from jsonargparse import Namespace

from fastcifar.budget import parse_duration, refuse_hopeless
from fastcifar.errors import EXIT_DATA, EXIT_DONE, EXIT_INTERRUPTED, UsageError, UserError
from fastcifar.job import Job
from fastcifar.parsers import STUDIES, absolute, parse, read_job
from fastcifar.recipes import NAMED, find_recipe

TRAINING_IMAGES = 50_000  # of every data set


def main(words: list[str] | None = None) -> int:
    """Run one command; returns its exit code (errors.py)."""
    started_s = time.monotonic()
    if words is None:
        from fastcifar.process import age_s

        words, started_s = sys.argv[1:], started_s - age_s()
    try:
        return run([with_underscores(word) for word in words], started_s)
    except UserError as error:
        print(f"fastcifar: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fastcifar: interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED


def with_underscores(word: str) -> str:
    """--batch-size and --batch_size are the same flag."""
    flag, equals, value = word.partition("=")
    return flag[:2] + flag[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def run(words: list[str], started_s: float) -> int:
    if words and words[0] in STUDIES:  # they read their own few flags and hand the rest to `train`'s parser
        return importlib.import_module(f"fastcifar.studies.{words[0]}").run(words[1:])
    arguments = parse(words)
    verbs = {
        "train": train,
        "plan": plan,
        "eval": evaluate,
        "data": data,
        "recipes": recipes,
        "bench": bench,
        "verify-kernels": verify_kernels,
        "doctor": doctor,
    }
    return verbs[arguments.subcommand](arguments[arguments.subcommand], started_s)


# Verbs


def train(chosen: Namespace, started_s: float) -> int:
    from fastcifar.run import RunFolder

    follower = int(os.environ.get("RANK", 0)) > 0  # of the processes that torchrun started
    job = resumed_job(chosen) if chosen.resume is not None else read_job(chosen)
    if follower:
        folder = RunFolder.scratch(chosen.resume)
    else:
        folder = RunFolder.create(chosen.out, job.recipe) if chosen.resume is None else RunFolder.open(chosen.resume)
    gc.disable()  # until everything is imported (`collect_garbage`)
    prepare_process()
    from fastcifar.devices import out_of_memory_named
    from fastcifar.display import Display, print_result
    from fastcifar.ranks import joined
    from fastcifar.train import train

    display = Display(quiet=follower)
    try:
        with folder.held(), out_of_memory_named(job.settings.batch_size), joined(job.device) as ranks:
            result = train(job, folder, display, started_s, resume=chosen.resume is not None, ranks=ranks)
    except KeyboardInterrupt:
        if (folder.path / "checkpoint.safetensors").exists():
            display.say(f"Stopped. Go on with: fastcifar train --resume {shlex.quote(str(folder.path))}")
        raise
    finally:
        gc.unfreeze()
        gc.enable()
        display.close()
        if follower:
            shutil.rmtree(folder.path, ignore_errors=True)
        with suppress(OSError):
            folder.path.rmdir()  # succeeds only if it is empty: the run never began
    if follower:
        return EXIT_DONE
    print_result(result, folder.path)
    if chosen.json:
        print(json.dumps(result))
    return EXIT_DONE


def plan(chosen: Namespace, started_s: float) -> int:
    budget_s = parse_duration(chosen.budget)
    prepare_process()
    from fastcifar.devices import pick_device
    from fastcifar.display import print_plan
    from fastcifar.planner.choose import choose

    classes = 100 if chosen.dataset == "cifar100" else 10
    where = {"images": TRAINING_IMAGES, "classes": classes, "device": pick_device(chosen.device)}
    choices = choose(chosen.dataset, **where, budget_s=budget_s, spent_s=lambda: time.monotonic() - started_s)
    refuse_hopeless(budget_s, choices[0].train_s)
    elsewhere = {"--dataset": (chosen.dataset, "cifar10"), "--device": (chosen.device, "auto")}
    flags = [f" {flag} {value}" for flag, (value, default) in elsewhere.items() if value != default]
    print_plan(choices, f"fastcifar train --budget {shlex.quote(chosen.budget)}{''.join(flags)}")
    if chosen.json:
        print(json.dumps([asdict(choice) for choice in choices]))
    return EXIT_DONE


def evaluate(chosen: Namespace, started_s: float) -> int:
    prepare_process()
    from fastcifar.display import Display, print_evaluation
    from fastcifar.reevaluate import reevaluate

    job = saved_job(chosen.run)
    changed = {name: chosen[name] for name in ("data", "loader", "workers") if chosen[name] is not None}
    result = reevaluate(chosen.run, replace(job, device=chosen.device, **changed), Display())
    print_evaluation(result)
    if chosen.json:
        print(json.dumps(result))
    return EXIT_DONE


def data(chosen: Namespace, started_s: float) -> int:
    from fastcifar.data import source
    from fastcifar.display import Display, print_table

    if (chosen.verb == "write") != (chosen.format is not None) or (chosen.out and chosen.verb != "write"):
        hint = "fastcifar data write --format ffcv"
        raise UsageError("`data write` needs a --format, and no other verb of `data` takes --format or --out.", hint)
    display = Display()
    where = chosen.dataset, chosen.data, display.work
    if chosen.verb == "write":
        from fastcifar.data.pack import describe_pack, train_command, write_pack

        pack = write_pack(source.load(*where), chosen.format, chosen.out, display.work)
        display.close()
        print_table(describe_pack(pack))
        print(f"\nTrain on it: {train_command(pack)}")  # outside the table, which would break the command in two
        return EXIT_DONE
    if chosen.verb == "verify":
        findings = source.verify(*where)
        display.close()
        for finding in findings:
            print(f"{finding.what}: {'verified' if finding.verified else 'NOT verified'}: {finding.text}")
        return EXIT_DONE if all(finding.verified for finding in findings) else EXIT_DATA
    dataset = source.prepare(*where) if chosen.verb == "prepare" else source.load(*where)
    display.close()
    print_table(source.describe(dataset))
    return EXIT_DONE


def recipes(chosen: Namespace, started_s: float) -> int:
    from fastcifar.display import print_table

    if chosen.verb == "list":
        print_table([(name, named.summary) for name, named in NAMED.items()])
    else:
        from fastcifar.run import dump_yaml

        recipe = find_recipe(chosen.name, chosen.as_reported)
        print(dump_yaml({"recipe": chosen.name, "as_reported": chosen.as_reported} | asdict(recipe)))
    return EXIT_DONE


def bench(chosen: Namespace, started_s: float) -> int:
    prepare_process()
    options = chosen[chosen.subcommand]
    if chosen.subcommand == "kernels":
        from fastcifar.benchmarks.loaders import make_room
        from fastcifar.run import source_commit
        from fastcifar_kernels import bench

        if options.out is not None:
            make_room(options.out)
        return bench.run(options.out, source_commit())
    from fastcifar.benchmarks import loaders, train
    from fastcifar.display import Display

    if chosen.subcommand == "train":
        where = {"dataset": options.dataset, "data": options.data, "device": options.device}
        return train.run(options.recipe, options.seeds, options.target, where, options.out, Display())
    return loaders.run(loaders.job(options.dataset, options.data, options.device), options.out, Display())


def verify_kernels(chosen: Namespace, started_s: float) -> int:
    prepare_process()
    from fastcifar_kernels import verify

    return verify.main(["--op", *chosen.op] if chosen.op else [])


def doctor(chosen: Namespace, started_s: float) -> int:
    prepare_process()
    from fastcifar.display import print_table
    from fastcifar.doctor import examine

    print_table(examine())
    return EXIT_DONE


# What the verbs share


def prepare_process() -> None:
    """Tune the allocator before torch makes its first tensor, then the threads."""
    from fastcifar.process import set_threads, tune_allocator

    tune_allocator()
    set_threads()


def resumed_job(chosen: Namespace) -> Job:
    """The interrupted job; where its data are and what trains it may be another place now. Raises UsageError."""
    job, again = saved_job(chosen.resume), f"fastcifar train --resume {shlex.quote(str(chosen.resume))}"
    elsewhere = [name for name in chosen.given if name in ("data", "loader", "workers", "device")]
    if others := set(chosen.given) - {"resume", "json", *elsewhere}:
        raise UsageError(f"--resume: goes on as the run began, without --{min(others)}.", again)
    if chosen.data is not None:
        chosen.data = absolute(chosen.data)
    return replace(job, **{name: chosen[name] for name in elsewhere})


def saved_job(run: Path) -> Job:
    """The job whose config.yaml lies in a run folder, read as if it had been typed. Raises UsageError."""
    from fastcifar.run import RunFolder

    words = ["train", "--config", str(RunFolder.open(run).path / "config.yaml")]
    return read_job(parse(words)["train"])
