"""Does torch.compile pay on this CPU? Steps of recipe `speed`, eager and compiled in turn, at each image size.

python bench/compile_cpu.py --data PATH > bench/records/DATE-compile-cpu/result.json
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

from fastcifar.process import set_threads, tune_allocator

tune_allocator()
threads = set_threads()

import torch  # noqa: E402

from fastcifar.display import Display  # noqa: E402
from fastcifar.job import Job  # noqa: E402
from fastcifar.process import processor  # noqa: E402
from fastcifar.recipes import NAMED  # noqa: E402
from fastcifar.resize import resize  # noqa: E402
from fastcifar.run import source_commit  # noqa: E402
from fastcifar.setup import set_up  # noqa: E402
from fastcifar.train import train_step  # noqa: E402

STEPS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    recipe = NAMED["speed"].recipe
    eager = set_up(Job("speed", recipe, data=parser.parse_args().data, device="cpu"), Display())
    setups = {"eager": eager, "compiled": replace(eager, forward=torch.compile(eager.model))}
    batch_BCHW, y_B = next(iter(eager.loader.epoch(0)))
    rows = []
    for stage in recipe.stages:
        x_BCHW = resize(batch_BCHW, stage.image_px)
        times_s = {name: [] for name in setups}
        for step in range(STEPS + 2):  # the first two compile, and fault their memory in
            for name, setup in setups.items():
                began_s = time.perf_counter()
                train_step(setup, recipe, x_BCHW, y_B)
                if step >= 2:
                    times_s[name].append(time.perf_counter() - began_s)
        rows.append({"image_px": stage.image_px, **{name: statistics.median(times) for name, times in times_s.items()}})
    report = {
        "machine": f"{processor()}, {threads} threads",
        "torch": torch.__version__,
        "commit": source_commit(),
        "batch_size": recipe.batch_size,
        "step_s": rows,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
