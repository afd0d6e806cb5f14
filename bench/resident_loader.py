"""How fast the resident loader makes batches on the CPU, beside what a training step consumes.

    python bench/resident_loader.py --data PATH > bench/records/DATE-resident-loader/result.json

For each augmentation and each way to apply it, full epochs of the 50,000 training images after one to warm up; in turn,
so that a slow moment of the machine hits all alike. The step is that of recipe `speed` at each of its image sizes.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from fastcifar.process import set_threads, tune_allocator

tune_allocator()
threads = set_threads()

import torch  # noqa: E402

from fastcifar.display import Display  # noqa: E402
from fastcifar.job import Job  # noqa: E402
from fastcifar.loaders import augment as aug  # noqa: E402
from fastcifar.loaders.resident import PLAIN  # noqa: E402
from fastcifar.recipes import RECIPES, Augment  # noqa: E402
from fastcifar.report import processor  # noqa: E402
from fastcifar.run import source_commit  # noqa: E402
from fastcifar.setup import resize, set_up  # noqa: E402
from fastcifar.train import train_step  # noqa: E402

EPOCHS, STEPS = 7, 12
AUGMENTS = {
    "none": PLAIN,
    "crop and flip": Augment(),
    "crop, flip, cutout, brightness, contrast": Augment(cutout_px=8, brightness=0.1, contrast=0.1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    setup = set_up(Job("speed", RECIPES["speed"], data=parser.parse_args().data, device="cpu"), Display())
    rows = [
        {"augment": name, "apply": apply.__name__, "images_per_s": []}
        for name in AUGMENTS
        for apply in (aug.apply_numba, aug.apply_torch)
    ]
    for epoch in range(EPOCHS + 1):
        for row in rows:
            loader = setup.loader
            loader.augment, loader.apply = AUGMENTS[row["augment"]], getattr(aug, row["apply"])
            began_s = time.perf_counter()
            images = sum(len(y_B) for _, y_B in loader.epoch(epoch))
            if epoch:
                row["images_per_s"].append(images / (time.perf_counter() - began_s))
    report = {
        "machine": f"{processor()}, {threads} threads",
        "torch": torch.__version__,
        "commit": source_commit(),
        "batch_size": setup.loader.batch_size,
        "loader_images_per_s": [row | {"images_per_s": statistics.median(row["images_per_s"])} for row in rows],
        "step_images_per_s": {stage.image_px: step_rate(setup, stage.image_px) for stage in RECIPES["speed"].stages},
    }
    print(json.dumps(report, indent=2))


def step_rate(setup, image_px: int) -> float:
    """Images a second through forward, backward and optimizers alone: the batch is made beforehand."""
    recipe, scaler = RECIPES["speed"], torch.amp.GradScaler("cpu", enabled=False)
    x_BCHW, y_B = next(iter(setup.loader.epoch(0)))
    x_BCHW = resize(x_BCHW, image_px)
    times_s = []
    for _ in range(STEPS):
        began_s = time.perf_counter()
        train_step(setup, recipe, scaler, x_BCHW, y_B)
        times_s.append(time.perf_counter() - began_s)
    return recipe.batch_size / statistics.median(times_s)


if __name__ == "__main__":
    main()
