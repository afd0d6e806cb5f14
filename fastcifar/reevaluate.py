"""`fastcifar eval`: a finished run, judged again on the test images."""

from pathlib import Path

import torch

from fastcifar.devices import pick_device
from fastcifar.display import Display
from fastcifar.errors import UsageError
from fastcifar.evaluate import evaluate, top_confusions
from fastcifar.job import Job
from fastcifar.loaders.feed import open_feed
from fastcifar.models.build import build_model
from fastcifar.process import physical_cores
from fastcifar.run import RunFolder
from fastcifar.setup import EVALUATION_BATCH, open_dataset


def reevaluate(run: Path, job: Job, display: Display) -> dict:
    """Load the model that `job` left in `run` and return what it gets right and wrong, class by class.

    Raises DataError, DeviceError, UsageError.
    """
    recipe, device = job.settings, pick_device(job.device)
    dataset = open_dataset(job, display)
    model = build_model(recipe.from_scratch(), len(dataset.class_names), job.seed)
    try:
        model.load_state_dict(RunFolder.open(run).read_model())
    except RuntimeError as error:
        raise UsageError(f"{run}/model.safetensors is not the model that its config.yaml describes: {error}") from error
    dtype = getattr(torch, recipe.dtype)
    where = {"data": job.data, "progress": display.work}
    workers = job.workers or physical_cores()
    feed = open_feed(job.loader, dataset, workers=workers, device=device, dtype=dtype, **where)
    display.close()
    loader = feed.loader("test", batch_size=EVALUATION_BATCH, image_px=recipe.final_px)
    found = evaluate(model.to(device), loader, len(dataset.class_names), recipe.tta)
    return {
        "run": str(run),
        "dataset": dataset.name,
        "data_verified": dataset.verified,
        "loader": feed.name,
        **found.summary(),
        "classes": {
            name: {"precision": float(precision), "recall": float(recall), "f1": float(f1)}
            for name, precision, recall, f1 in zip(
                dataset.class_names, found.precision_K, found.recall_K, found.f1_K, strict=True
            )
        },
        "confusion": found.confusion_KK.tolist(),
        "top_confusions": top_confusions(found.confusion_KK, dataset.class_names),
    }
