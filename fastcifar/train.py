"""The training loop: the file to read first.

One batch's way: data set -> loader -> images [B, 3, H, W] on the device -> resized for the stage -> forward, loss,
backward, optimizers -> a row of metrics. `train` tells the whole story, from a job to a result; `fit` is its loop and
`train_step` one step of it.

Shapes: B images of a batch, C channels, H rows, W columns, K classes.
"""

import itertools
import math
import shlex
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from fastcifar.budget import REPORT_S, Knot, Pace, Position, guess_cost, overrun_s, refuse_hopeless, stage_at
from fastcifar.checkpoint import capture, restore
from fastcifar.display import Display
from fastcifar.errors import DivergedError, UsageError
from fastcifar.evaluate import evaluate, looks_an_image, plan_tta
from fastcifar.graphs import Step, StepGraphs, can_record
from fastcifar.interrupts import Interrupts
from fastcifar.job import HELD_OUT, Job
from fastcifar.looks import Looks
from fastcifar.mix import mix
from fastcifar.optim.schedule import set_learning_rates
from fastcifar.process import collect_garbage
from fastcifar.ranks import ALONE, Ranks
from fastcifar.report import write_report
from fastcifar.resize import resize
from fastcifar.result import describe_result
from fastcifar.run import Metrics, RunFolder, source_commit
from fastcifar.settings import ClassicOptim, Recipe, Tta
from fastcifar.setup import Setup, set_up
from fastcifar.track import Tracking, check_trackers

CHECKPOINT_EVERY_S = 30.0
REPORT_IMPORTS = 0.6  # report.html takes half as long as Python and all imports did, on whatever machine


def train(
    job: Job, folder: RunFolder, display: Display, started_s: float, resume: bool = False, ranks: Ranks = ALONE
) -> dict:
    """Train as `job` says, leave everything in `folder`, return what result.json holds.

    Args:
        started_s: when the process began, on the clock of time.monotonic().
        resume: go on from the folder's checkpoint; the time it had spent counts against the budget.
        ranks: the processes that train together; all but rank 0 return nothing, and nobody needs their `folder`.

    Raises DataError, DeviceError, DivergedError, UsageError; KeyboardInterrupt after a signal, the checkpoint written.
    """
    imports_s = time.monotonic() - started_s
    commit = source_commit()  # of the code that was imported: its checkout may move on while it trains
    check_trackers(job)
    interrupts = Interrupts()
    checkpoint = folder.read_checkpoint() if resume else None
    if checkpoint is not None:
        started_s -= checkpoint.spent_s
    # The weights that a checkpoint brings replace those that the recipe begins with.
    fresh = replace(job, settings=job.settings.from_scratch()) if checkpoint else job
    setup = set_up(fresh, display, spent_s=lambda: time.monotonic() - started_s, ranks=ranks)
    collect_garbage()
    recipe = replace(setup.recipe, min_steps=0)
    if not setup.choice:
        recipe = replace(recipe, model=job.settings.model)
    display.say(f"{setup.dataset.title}, recipe {setup.name}, on {setup.device}: {folder.path}")
    if setup.feed.pack is not None:
        display.say(f"read by {setup.feed.name} from {setup.feed.pack.folder}, every byte of it checked")

    # When the evaluation must be done.
    end_s = started_s + (job.budget_s or math.inf) - max(REPORT_S, REPORT_IMPORTS * imports_s)
    cost_s = setup.look_s * HELD_OUT
    looks = Looks(setup.held_out_loader, len(setup.loader), cost_s, target=job.target, patience=job.patience)
    if job.budget_s is not None:
        deadline_s, tta = ranks.same(divide_budget(job.budget_s, end_s, setup, recipe.tta))
        if checkpoint is None:  # what was interrupted near its end is finished, however little time is left
            refuse_hopeless(job.budget_s, deadline_s - looks.ahead_s(end=1) - time.monotonic())
        recipe = replace(recipe, tta=tta)
        cost = partial(setup.rates.of_step, batch_size=recipe.batch_size) if setup.rates else guess_cost
        pace = Pace(recipe.stages, job.plan, deadline_s, looks.ahead_s, cost)
    else:
        steps = job.steps or math.ceil(recipe.epochs * len(setup.loader))
        pace = Pace(recipe.stages, job.plan or [Knot(0, 0.0, steps)])
    # What is resumed or repeated later keeps the data set, batch size and second look that were settled on now.
    lasting = replace(
        job,
        recipe=setup.name,
        settings=recipe,
        dataset=setup.dataset.name,
        fallback_dataset=None,
        loader=setup.feed.name,
        track=None if ranks.rank else job.track,
    )
    folder.write_config(lasting.config())
    try:
        position = restore(setup, pace, checkpoint, looks) if checkpoint else Position()
    except (RuntimeError, LookupError) as error:
        again = f"fastcifar train --config {shlex.quote(str(folder.path))}/config.yaml"
        message = f"{folder.path}: its checkpoint is of another network than this code makes: {error}"
        raise UsageError(message.splitlines()[0], again) from error
    metrics = Metrics(folder, position.step)
    tracking = Tracking(lasting, folder, metrics.rows, display.say)

    saved_s = -math.inf
    with tracking:
        with interrupts.held():
            for rows in () if looks.enough else fit(setup, recipe, pace, position, looks):
                progress, now_s = rows[-1]["progress"], time.monotonic()
                if looks.due(position.step, progress):
                    rows[-1] |= looks.look(setup.model, position.step, progress)
                for row in rows:
                    metrics.add(row | {"wall_s": now_s - started_s})
                    tracking.add(metrics.rows[-1])
                display.update(rows[-1], pace.steps, pace.left_s(position.step))
                interrupted = ranks.any(interrupts.caught)
                if interrupted or progress >= 1 or now_s - saved_s > CHECKPOINT_EVERY_S:
                    folder.write_checkpoint(capture(setup, pace, position, time.monotonic() - started_s, looks))
                    saved_s = time.monotonic()
                if interrupted:
                    raise KeyboardInterrupt
                if ranks.same(looks.enough):
                    break
        display.close()
        if ranks.rank:
            return {}
        val_acc = looks.accuracy
        if looks.best_state:
            val_acc = looks.best
            setup.model.load_state_dict(looks.best_state)
            display.say(f"kept the weights of step {looks.best_step} of {position.step}: {looks.best:.2%} held out")

        evaluation_began_s = time.monotonic()
        # A first look takes longer than a second: without half of what a run may be late, 2 s of 300 stayed unused.
        late_s = end_s + overrun_s(job.budget_s or 0.0) / 2
        evaluation = evaluate(setup.model, setup.test_loader, len(setup.dataset.class_names), recipe.tta, late_s)
        eval_s = time.monotonic() - evaluation_began_s
        recipe = replace(recipe, tta=replace(recipe.tta, share=evaluation.tta_share))
        folder.write_model(setup.model.state_dict())
        result = describe_result(job, setup, evaluation, position, eval_s, val_acc, commit)
        write_report(folder, result, recipe, metrics.rows, evaluation, setup.dataset)
        folder.write_config(replace(lasting, settings=recipe, budget=None, plan=pace.knots).config())
        result["wall_s"] = time.monotonic() - started_s
        folder.finish(result)
        tracking.finish(result)
    return result


def fit(setup: Setup, recipe: Recipe, pace: Pace, position: Position, looks: Looks) -> Iterator[list[dict]]:
    """Train on from `position` until all progress is made; yields rows of metrics whenever the device was waited for.

    That is after 1, 2, 4 ... and at last every `setup.wait_every` steps, and whenever a look is due. What the caller
    does in between counts as no training time.

    Raises DivergedError.
    """
    loader, pending = setup.loader, []
    began_s = time.monotonic()
    step = ready_step(setup, recipe)
    position.compile_s += time.monotonic() - began_s
    length, resumed_s = 1, time.monotonic()
    for epoch in itertools.count(position.step // len(loader)):
        for x_BCHW, y_B in loader.epoch(epoch, first_batch=position.step % len(loader)):
            if pace.progress(position.step) >= 1:
                return
            middle = pace.middle(position.step)
            image_px = stage_at(recipe.stages, middle).image_px
            lr = set_learning_rates(setup.optimizers, middle, recipe.optim)
            loss, hits = step(x_BCHW, y_B, image_px)
            position.step += 1
            pending.append(({"step": position.step, "image_px": image_px, "lr": lr}, loss, hits))
            progress = pace.progress(position.step)
            if len(pending) < length and progress < 1 and not looks.due(position.step, progress):
                continue

            started, losses, hits = zip(*pending, strict=True)
            rows = read_rows(started, losses, hits, recipe)  # waits for the device
            now_s = time.monotonic()
            seconds = (now_s - resumed_s) / len(rows)
            position.train_s += now_s - resumed_s
            pace.measured(position.step, image_px, seconds, now_s)
            if pace.deadline_s is not None:  # no two ranks measure the same
                pace.knots = setup.ranks.same(pace.knots)
            for row in rows:
                row["epoch"], row["progress"] = row["step"] / len(loader), pace.progress(row["step"])
                row["images_per_s"] = recipe.batch_size / seconds
            yield rows
            pending, length, resumed_s = [], min(2 * length, setup.wait_every), time.monotonic()


def ready_step(setup: Setup, recipe: Recipe) -> Step:
    """`train_step` for batches of any stage's size; on a GPU as CUDA graphs, where those can hold it."""

    def step(x_BCHW: Tensor, y_B: Tensor, image_px: int) -> tuple[Tensor, Tensor]:
        return train_step(setup, recipe, resize(x_BCHW, image_px), y_B)

    if setup.device.type != "cuda" or setup.ranks.count > 1 or not can_record(recipe):
        return step
    x_BCHW = setup.loader.take(torch.arange(recipe.batch_size))
    return StepGraphs(step, recipe, setup.model, setup.optimizers, x_BCHW, setup.loader.labels_N[: recipe.batch_size])


def train_step(setup: Setup, recipe: Recipe, x_BCHW: Tensor, y_B: Tensor) -> tuple[Tensor, Tensor]:
    """One update of the weights; returns the loss summed over the batch and the number of right answers, unread.

    With several processes the images are this one's part of the batch, and what is returned is of the whole; with
    several members it is their mean.
    """
    setup.model.train()
    target = y_B
    if recipe.mix != "none":
        x_BCHW, target = mix(recipe, len(setup.dataset.class_names), x_BCHW, y_B)
    if recipe.members > 1:  # each answers by itself
        y_B, target = (torch.cat([labels] * recipe.members) for labels in (y_B, target))
    with torch.autocast(x_BCHW.device.type, x_BCHW.dtype, enabled=x_BCHW.dtype != torch.float32):
        logits_BK = setup.forward(x_BCHW).float()
    loss = F.cross_entropy(logits_BK, target, label_smoothing=recipe.label_smoothing, reduction="sum")
    setup.scaler.scale(loss if recipe.optim.sums_loss else loss / (len(x_BCHW) * setup.ranks.count)).backward()
    setup.ranks.add_gradients(setup.model.parameters())
    if isinstance(recipe.optim, ClassicOptim) and recipe.optim.clip_norm:
        for optimizer in setup.optimizers:
            setup.scaler.unscale_(optimizer)
        clip_grad_norm_(setup.model.parameters(), recipe.optim.clip_norm)
    for optimizer in setup.optimizers:
        setup.scaler.step(optimizer)
    setup.scaler.update()
    setup.model.zero_grad(set_to_none=True)
    hits = (logits_BK.detach().argmax(1) == y_B).sum()
    return setup.ranks.add(loss.detach()) / recipe.members, setup.ranks.add(hits) / recipe.members


def read_rows(
    rows: tuple[dict, ...], losses: tuple[Tensor, ...], hits: tuple[Tensor, ...], recipe: Recipe
) -> list[dict]:
    """The rows with loss and accuracy, per image, fetched from the device at once. Raises DivergedError."""
    both = torch.stack([torch.stack(losses).double(), torch.stack(hits).double()]) / recipe.batch_size
    for row, loss, accuracy in zip(rows, *both.tolist(), strict=True):
        row["loss"], row["accuracy"] = loss, accuracy
        if not math.isfinite(loss):
            raise DivergedError(
                f"Training diverged: the loss is {loss} at step {row['step']}, "
                f"the learning rate at {row['lr']:.0%} of its peak.",
                recipe.optim.slower(),
            )
    return list(rows)


def divide_budget(budget_s: float, end_s: float, setup: Setup, tta: Tta) -> tuple[float, Tta]:
    """(when training must end for the evaluation to be done at `end_s`, the images there is time to look at again)"""
    images = len(setup.test_loader.labels_N)
    tta = plan_tta(tta, setup.look_s, images, budget_s)
    return end_s - setup.look_s * images * looks_an_image(tta), tta
