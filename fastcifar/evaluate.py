"""What a trained model is worth: accuracy with and without test-time augmentation, and who is taken for whom.

Shapes: N images, B of a batch, C channels, H rows, W columns, K classes.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.loaders.loader import Loader
from fastcifar.settings import Tta

CONFUSIONS = 10  # pairs of classes worth naming
# Where shifted views begin in the padded image, from its upper left corner: down and to the right, times `shift_px`.
SHIFTS = {"sides": ((0, 1), (2, 1), (1, 0), (1, 2)), "corners": ((0, 0), (2, 2))}
EVALUATION_SHARE = 0.12  # of a budget, at most: a short one looks again at fewer images


@dataclass(frozen=True)
class Evaluation:
    """A model's answers on one split. Precision, recall, F1 and confusion are those of the augmented answers."""

    accuracy: float
    accuracy_tta: float
    tta_share: float  # of the images, which were looked at again
    probability_NK: np.ndarray  # with test-time augmentation
    confusion_KK: np.ndarray  # rows: true class, columns: predicted class
    precision_K: np.ndarray
    recall_K: np.ndarray
    f1_K: np.ndarray

    def summary(self) -> dict[str, float]:
        """The figures that result.json and `fastcifar eval` share."""
        return {
            "test_acc": self.accuracy,
            "test_acc_tta": self.accuracy_tta,
            "tta_share": self.tta_share,
            "macro_precision": float(self.precision_K.mean()),
            "macro_recall": float(self.recall_K.mean()),
            "macro_f1": float(self.f1_K.mean()),
        }


@torch.inference_mode()
def answer(model: nn.Module, x_BCHW: Tensor) -> Tensor:
    """Logits [B, K], float32, computed in the images' dtype and on their device."""
    with torch.autocast(x_BCHW.device.type, x_BCHW.dtype, enabled=x_BCHW.dtype != torch.float32):
        return model(x_BCHW).float()


def predict(model: nn.Module, x_BCHW: Tensor) -> Tensor:
    """Class probabilities [B, K], float32."""
    return answer(model, x_BCHW).softmax(1)


def predict_views(model: nn.Module, x_BCHW: Tensor, tta: Tta) -> Tensor:
    """Class probabilities [B, K], float32, from the mean of the logits of several views.

    An image and its mirror image, half of the weight, and both of these shifted, reflected at the border. That logits
    are averaged, and the weights, are cifar10-airbench's.
    """

    def both_sides(x_BCHW: Tensor) -> Tensor:
        return (answer(model, x_BCHW) + answer(model, x_BCHW.flip(3))) / 2

    logits_BK = both_sides(x_BCHW)
    px, (height, width) = tta.shift_px, x_BCHW.shape[2:]
    if px:
        padded = F.pad(x_BCHW, (px,) * 4, "reflect").contiguous(memory_format=torch.channels_last)
        starts = [(down * px, right * px) for down, right in SHIFTS[tta.shifts]]
        shifted = sum(both_sides(padded[:, :, top : top + height, left : left + width]) for top, left in starts)
        logits_BK = (logits_BK + shifted / len(starts)) / 2
    return logits_BK.softmax(1)


def evaluate(model: nn.Module, loader: Loader, classes: int, tta: Tta, deadline_s: float = math.inf) -> Evaluation:
    """Look at every image once, then again with augmentation at the share of them that the model is least sure of.

    At fewer, if time is short: all should be done by `deadline_s`, on the clock of time.monotonic().
    """
    model.eval()
    labels_N, began_s = loader.labels_N, time.monotonic()
    images = len(labels_N)
    probability_NK = torch.cat([predict(model, x_BCHW) for x_BCHW, _ in loader.epoch(0)])
    accuracy = share_right(probability_NK, labels_N)  # waits for the device
    now_s = time.monotonic()
    tta = fit_tta(tta, (now_s - began_s) / images, images, deadline_s - now_s)
    unsure_M = probability_NK.amax(1).topk(round(tta.share * images), largest=False).indices
    for ids_B in unsure_M.split(loader.batch_size) if len(unsure_M) else ():
        probability_NK[ids_B] = predict_views(model, loader.take(ids_B), tta)
    pairs_N = labels_N * classes + probability_NK.argmax(1)
    confusion_KK = torch.bincount(pairs_N, minlength=classes**2).view(classes, classes).cpu().numpy()
    accuracy_tta = share_right(probability_NK, labels_N)
    return Evaluation(accuracy, accuracy_tta, tta.share, probability_NK.cpu().numpy(), *scores(confusion_KK))


def share_right(probability_NK: Tensor, labels_N: Tensor) -> float:
    return (probability_NK.argmax(1) == labels_N).double().mean().item()


def scores(confusion_KK: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The matrix itself and precision, recall and F1 of each class [K]; 0 where a class never occurs."""
    hits_K = np.diag(confusion_KK).astype(float)
    predicted_K, true_K = confusion_KK.sum(0), confusion_KK.sum(1)
    precision_K = hits_K / np.maximum(predicted_K, 1)
    recall_K = hits_K / np.maximum(true_K, 1)
    f1_K = 2 * hits_K / np.maximum(predicted_K + true_K, 1)
    return confusion_KK, precision_K, recall_K, f1_K


def top_confusions(confusion_KK: np.ndarray, names: tuple[str, ...]) -> list[tuple[str, str, int]]:
    """(true class, taken for, how often), the most frequent first."""
    wrong_KK = confusion_KK - np.diag(np.diag(confusion_KK))
    order = np.argsort(-wrong_KK, axis=None, kind="stable")[:CONFUSIONS]
    pairs = [divmod(int(cell), len(names)) for cell in order]
    return [(names[t], names[p], int(wrong_KK[t, p])) for t, p in pairs if wrong_KK[t, p]]


def looks_an_image(tta: Tta) -> float:
    """How often `evaluate` has the model look at an image, on average."""
    views = 1 + len(SHIFTS[tta.shifts]) * (tta.shift_px > 0)
    return 1 + 2 * views * tta.share


def fit_tta(tta: Tta, look_s: float, images: int, left_s: float) -> Tta:
    """The same for as many of the images as there is time to look at again, a look at one taking `look_s` seconds."""
    all_s = look_s * images * (looks_an_image(replace(tta, share=1.0)) - 1)
    return replace(tta, share=min(tta.share, max(0.0, left_s / all_s)))


def plan_tta(tta: Tta, look_s: float, images: int, budget_s: float) -> Tta:
    """The same for as many images as a budget's share for the evaluation allows."""
    return fit_tta(tta, look_s, images, EVALUATION_SHARE * budget_s - look_s * images)


class Judgement(NamedTuple):
    accuracy: float  # share of the images that are right
    loss: float  # mean cross-entropy, without label smoothing


def judge(model: nn.Module, loader: Loader) -> Judgement:
    """What the model makes of a loader's images, without test-time augmentation."""
    model.eval()
    hits, loss = torch.zeros((), device=loader.device), torch.zeros((), device=loader.device)
    for x_BCHW, y_B in loader.epoch(0):
        logits_BK = answer(model, x_BCHW)
        hits += (logits_BK.argmax(1) == y_B).sum()
        loss += F.cross_entropy(logits_BK, y_B, reduction="sum")
    images = len(loader.labels_N)
    return Judgement(hits.item() / images, loss.item() / images)
