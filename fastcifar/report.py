"""report.html: one self-contained page on a finished run."""

import base64
import io
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import Environment, FileSystemLoader, select_autoescape

from fastcifar.data.dataset import Dataset
from fastcifar.display import format_s
from fastcifar.evaluate import Evaluation, top_confusions
from fastcifar.process import processor
from fastcifar.run import RunFolder, write_atomically
from fastcifar.settings import Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISTAKES = 24
INK, ACCENT, SECOND = "#24292f", "#0b6bcb", "#c2410c"


def png(figure: "Figure") -> bytes:
    """A finished figure as a file, its panels open above and to the right."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def write_report(
    folder: RunFolder, result: dict, recipe: Recipe, rows: list[dict], evaluation: Evaluation, dataset: Dataset
) -> None:
    """Write report.html from the result so far, the metrics' rows and the answers on the test images."""
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["j2"]))
    page = templates.get_template("report.html.j2").render(
        title=folder.path.name,
        dataset=dataset,
        result=result,
        train_time=format_s(result["train_s"]),
        curves=draw_curves(rows, training_label(recipe)),
        confusion=shade(evaluation.confusion_KK) if len(dataset.class_names) <= 20 else None,
        confusions=top_confusions(evaluation.confusion_KK, dataset.class_names),
        classes=list(
            zip(dataset.class_names, evaluation.precision_K, evaluation.recall_K, evaluation.f1_K, strict=True)
        ),
        mistakes=worst_mistakes(evaluation, dataset),
        config=(folder.path / "config.yaml").read_text(),
        machine=f"{platform.platform()}, {processor()}, Python {platform.python_version()}, torch {result['torch']}",
    )
    write_atomically(folder.path / "report.html", page.encode())


def training_label(recipe: Recipe) -> str:
    """What the training loss is of: with other targets than the held-out loss has, it is another quantity."""
    changes = ["smoothed labels"] if recipe.label_smoothing else []
    changes += [recipe.mix] if recipe.mix != "none" else []
    return ", ".join(["training batch", *changes])


def draw_curves(rows: list[dict], training: str) -> str:
    """Loss, accuracy and learning rate against wall-clock, as an inline SVG; `training` says what the loss is of."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    time_s = [row["wall_s"] for row in rows]
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.edgecolor": "#8c959f"}):
        figure = Figure(figsize=(11, 2.9), layout="constrained")
        loss, right, lr = figure.subplots(1, 3)
        loss.plot(time_s, [row["loss"] for row in rows], color=ACCENT, linewidth=1.2, label=training)
        loss.set_title("loss", loc="left")
        right.plot(time_s, [100 * row["accuracy"] for row in rows], color=ACCENT, linewidth=1.2, label="training batch")
        looks = [row for row in rows if "val_loss" in row]
        if looks:
            looked_s = [row["wall_s"] for row in looks]
            dots = {"color": SECOND, "linewidth": 1.2, "marker": "o", "markersize": 3, "label": "held out"}
            loss.plot(looked_s, [row["val_loss"] for row in looks], **dots)
            right.plot(looked_s, [100 * row["val_accuracy"] for row in looks], **dots)
            right.legend(frameon=False)
        loss.legend(frameon=False)
        right.set_title("accuracy, %", loc="left")
        lr.plot(time_s, [row["lr"] for row in rows], color=ACCENT, linewidth=1.2)
        lr.set_ylim(0, 1.05)
        lr.set_title("learning rate", loc="left", color=ACCENT)
        size = lr.twinx()
        size.step(time_s, [row["image_px"] for row in rows], color=SECOND, linewidth=1.2, where="post")
        size.set_ylim(0, 34)
        size.set_title("image size, px", loc="right", color=SECOND)
        for axes in (loss, right, lr, size):
            axes.spines[["top"]].set_visible(False)
            axes.set_xlabel("seconds since start")
        picture = io.StringIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue().partition("<svg")[1] + picture.getvalue().partition("<svg")[2]


def shade(confusion_KK: np.ndarray) -> list[list[tuple[int, float]]]:
    """Each cell's count and its share of the true class, for the colour."""
    share_KK = confusion_KK / np.maximum(confusion_KK.sum(1, keepdims=True), 1)
    return [[(int(n), float(s)) for n, s in zip(*row, strict=True)] for row in zip(confusion_KK, share_KK, strict=True)]


def worst_mistakes(evaluation: Evaluation, dataset: Dataset) -> list[dict]:
    """The test images whose wrong answer the model was surest of."""
    answer_N = evaluation.probability_NK.argmax(1)
    surety_N = np.where(answer_N == dataset.test.labels_N, -1.0, evaluation.probability_NK.max(1))
    worst = [n for n in np.argsort(-surety_N, kind="stable")[:MISTAKES] if surety_N[n] >= 0]
    return [
        {
            "png": base64.b64encode(encode_png(dataset.test.images_NHWC[n])).decode(),
            "is": dataset.class_names[dataset.test.labels_N[n]],
            "taken_for": dataset.class_names[answer_N[n]],
            "surety": float(surety_N[n]),
        }
        for n in worst
    ]


def encode_png(image_HWC: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "PNG")
    return file.getvalue()
