"""Every recipe, as data: frozen dataclasses that the command line can override by dotted name.

Nothing here imports torch, so `fastcifar recipes list` and `--help` answer at once.
"""

from dataclasses import dataclass, field
from typing import Literal

from fastcifar.errors import UsageError


@dataclass(frozen=True)
class Model:
    """The whitened convnet of `models/speednet.py`.

    Args:
        widths: channels of its three groups.
        whiten_eps: added to the eigenvalues of the patch covariance before their inverse root.
    """

    widths: tuple[int, int, int] = (64, 256, 256)
    whiten_eps: float = 5e-4


@dataclass(frozen=True)
class Augment:
    """What is done to a training image, in this order: crop, flip, rotation, brightness and contrast, cutout.

    Args:
        crop_px: shift by up to this many pixels each way.
        border: what a shift brings in: the image's reflection, or black.
        flip: mirror at random each epoch, or alternate (each image mirrored every other epoch), or not at all.
        rotate_deg: turn by up to this many degrees either way, to the nearest pixel, corners black; 0 is off.
        brightness: add up to this share of the full range to an image, either way; 0 is off.
        contrast: multiply an image by 1 plus or minus up to this much around the mean colour; 0 is off.
        cutout_px: side of the square painted over with the mean colour; 0 is off.
    """

    crop_px: int = 2
    border: Literal["reflect", "black"] = "reflect"
    flip: Literal["none", "random", "alternating"] = "alternating"
    rotate_deg: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    cutout_px: int = 0


@dataclass(frozen=True)
class Optim:
    """Muon for the filters, SGD with Nesterov momentum for biases and head.

    Args:
        muon_lr: peak learning rate of the filters, relative to filters of norm sqrt(count).
        muon_momentum: Nesterov momentum of the filters.
        muon_steps: Newton-Schulz iterations.
        bias_lr: peak learning rate of the biases (per image, as the loss is summed over the batch).
        head_lr: peak learning rate of the head (likewise).
        momentum: Nesterov momentum of biases and head.
        weight_decay: decay of biases and head per image.
        warmup: share of the progress over which the learning rate rises to its peak (OneCycle); 0 starts at the peak.
        whiten_bias_until: progress at which the whitening bias has stopped learning.
    """

    muon_lr: float = 0.24
    muon_momentum: float = 0.6
    muon_steps: int = 3
    bias_lr: float = 0.053
    head_lr: float = 0.67
    momentum: float = 0.85
    weight_decay: float = 2e-6
    warmup: float = 0.0
    whiten_bias_until: float = 0.375


@dataclass(frozen=True)
class Stage:
    """Train on images of `image_px` pixels until this much `progress` is made."""

    image_px: int
    until: float


@dataclass(frozen=True)
class Tta:
    """Test-time augmentation: mirrored and shifted views, averaged.

    Args:
        shift_px: the two shifted views move by this much along the diagonal; 0 leaves only the mirrored one.
        share: look again only at this share of the images, those the plain view is least sure of.
    """

    shift_px: int = 1
    share: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """One way to train a model.

    Args:
        batch_size: images a step.
        min_steps: a budget that buys fewer steps than this halves the batch, down to 125, until it buys as many.
        epochs: passes over the training set when neither --budget nor --epochs nor --steps says otherwise.
        label_smoothing: probability mass spread evenly over all classes.
        dtype: compute type of convolutions; weights and statistics stay float32.
        compile: torch.compile on CUDA; a CPU runs eagerly either way (LOG.md: Inductor gained nothing there).
        stages: image sizes through the training, each until some progress; the last one until 1.
    """

    batch_size: int = 2000
    min_steps: int = 0
    epochs: float = 8.0
    label_smoothing: float = 0.2
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    compile: bool = True
    model: Model = field(default_factory=Model)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    stages: tuple[Stage, ...] = (Stage(image_px=32, until=1.0),)
    tta: Tta = field(default_factory=Tta)

    def check(self) -> None:
        """Raise UsageError naming the first field whose value makes no sense."""
        for name, allowed, value in (
            ("batch_size", "at least 1", self.batch_size >= 1),
            ("min_steps", "not negative", self.min_steps >= 0),
            ("epochs", "more than 0", self.epochs > 0),
            ("label_smoothing", "from 0 to below 1", 0 <= self.label_smoothing < 1),
            ("model.widths", "multiples of 8", all(width > 0 and width % 8 == 0 for width in self.model.widths)),
            ("model.whiten_eps", "more than 0", self.model.whiten_eps > 0),
            ("augment.crop_px", "from 0 to 31", 0 <= self.augment.crop_px <= 31),
            ("augment.rotate_deg", "from 0 to 45", 0 <= self.augment.rotate_deg <= 45),
            ("augment.brightness", "from 0 to 1", 0 <= self.augment.brightness <= 1),
            ("augment.contrast", "from 0 to below 1", 0 <= self.augment.contrast < 1),
            ("augment.cutout_px", "from 0 to 32", 0 <= self.augment.cutout_px <= 32),
            ("optim.muon_lr", "more than 0", self.optim.muon_lr > 0),
            ("optim.muon_momentum", "from 0 to below 1", 0 <= self.optim.muon_momentum < 1),
            ("optim.muon_steps", "at least 1", self.optim.muon_steps >= 1),
            ("optim.bias_lr", "more than 0", self.optim.bias_lr > 0),
            ("optim.head_lr", "more than 0", self.optim.head_lr > 0),
            ("optim.momentum", "above 0 and below 1", 0 < self.optim.momentum < 1),
            ("optim.weight_decay", "not negative", self.optim.weight_decay >= 0),
            ("optim.warmup", "from 0 to below 1", 0 <= self.optim.warmup < 1),
            (
                "optim.whiten_bias_until",
                "above optim.warmup, up to 1",
                self.optim.warmup < self.optim.whiten_bias_until <= 1,
            ),
            (
                "stages",
                "at least one, of 18 to 64 pixels",
                bool(self.stages) and all(18 <= s.image_px <= 64 for s in self.stages),
            ),
            (
                "stages",
                "rising in `until` and ending at 1",
                [s.until for s in self.stages] == sorted({s.until for s in self.stages}) and self.stages[-1].until == 1,
            ),
            ("tta.shift_px", "from 0 to 8", 0 <= self.tta.shift_px <= 8),
            ("tta.share", "from 0 to 1", 0 <= self.tta.share <= 1),
        ):
            if not value:
                found = self
                for part in name.split("."):
                    found = getattr(found, part)
                raise UsageError(f"--{name}: must be {allowed}, is {found}.", "fastcifar recipes show speed")


# The whitened convnet of the CIFAR-10 speed records (cifar10-airbench), on images that grow while it learns: the early
# steps see 20 pixels and cost half of the late ones. Source of the choices that differ: LOG.md, 2026-11-20.
#   fastcifar train --recipe speed --budget 5min
# CIFAR-10 on 2 CPU cores with AMX: 93.7 % in 5 min, 87.8 % in 60 s; CIFAR-100: 68 % in 5 min (README). No GPU measured.
SPEED = Recipe(
    batch_size=1000,
    min_steps=100,
    epochs=10.0,
    stages=(Stage(image_px=20, until=0.3), Stage(image_px=24, until=0.6), Stage(image_px=32, until=1.0)),
    tta=Tta(share=0.25),
)

RECIPES = {"speed": SPEED}
SUMMARIES = {
    "speed": "whitened convnet, Muon, growing images: CIFAR-10 and CIFAR-100 in minutes on a CPU, seconds on a GPU"
}


def find_recipe(name: str) -> Recipe:
    """Raises UsageError for an unknown name."""
    if name not in RECIPES:
        raise UsageError(
            f"--recipe: there is no recipe {name!r}; there is {', '.join(RECIPES)}.", "fastcifar recipes list"
        )
    return RECIPES[name]
