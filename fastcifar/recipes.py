"""The recipes by name: what the project is known for, and the systems of five reports, each in two ways.

`--as-reported` trains what a report describes with its own hyperparameters; without it, the same architecture the fast
way. Where a report leaves a number open, the comment says what was chosen. `mlp` and `cnn2` share a report.
"""

from dataclasses import dataclass, replace

from fastcifar.errors import UsageError
from fastcifar.settings import (
    Augment,
    ClassicOptim,
    CnnModel,
    DynamicModel,
    MlpModel,
    Recipe,
    ResNet34Model,
    SpeedNetModel,
    Stage,
    Tta,
)


@dataclass(frozen=True)
class Claim:
    """The accuracies that a report gives, as shares of 1; None where it gives none.

    Args:
        val: on validation images, at the end; `val_best` at its best epoch.
        test: on the test images, at the end; `test_best` at its best epoch.
        about: the report rounds.
    """

    val: float | None = None
    val_best: float | None = None
    test: float | None = None
    test_best: float | None = None
    about: bool = False


@dataclass(frozen=True)
class Named:
    """A recipe by name; `reported` is None unless it comes from a report, and `claim` is what that says it reaches."""

    summary: str
    recipe: Recipe
    reported: Recipe | None = None
    dataset: str = "cifar10"
    claim: Claim = Claim()


# Images that grow while the network learns: the early steps see 20 pixels and cost 0.4 of the late ones' arithmetic.
GROWING = Stage(image_px=20, until=0.3), Stage(image_px=24, until=0.6), Stage(image_px=32, until=1.0)

# The whitened convnet of the CIFAR-10 speed records (cifar10-airbench), on growing images. Source of the choices that
# differ: LOG.md, 2026-11-20.
#   fastcifar train --recipe speed --budget 5min
# CIFAR-10 on 2 CPU cores with AMX, as busy as the machine is: 93.8 to 94.6 % in 5 min. On 2 without: 94.3 % in 260 s;
# CIFAR-100: 73.1 % in 5 min (LOG.md). No GPU measured.
SPEED = Recipe(
    batch_size=1024,
    min_steps=100,
    epochs=10.0,
    stages=GROWING,
    tta=Tta(share=0.25),
)

# The same network narrower, for seconds or a slow machine, and wider, for minutes; without --recipe, --budget chooses.
# Held-out images with augmentation (planner/curves.json): 91.6 and 94.2 % after 8 epochs.
#   fastcifar train --recipe speed-narrow --epochs 8
#   fastcifar train --recipe speed-wide --epochs 8
SPEED_NARROW = replace(SPEED, model=SpeedNetModel(widths=(32, 128, 128)))
SPEED_WIDE = replace(SPEED, model=SpeedNetModel(widths=(128, 384, 384)))

# Two of the wide one. From some 24 epochs on more of them buy next to nothing, a second network still does: held-out
# images, 95.4 % after 12 epochs of two, 95.3 % after 24 of one, half a percent more from two unlike ones of 16 and 24.
#   fastcifar train --recipe speed-pair --budget 15min
SPEED_PAIR = replace(SPEED_WIDE, epochs=12.0, members=2)

# The published method itself, cifar10-airbench's airbench94_muon.py: images of 32 pixels throughout, PyTorch's own
# operators, every test image looked at six times. What `speed` is compared with. Its author: 94 % in 2.6 s on an A100.
#   fastcifar train --recipe airbench94
PUBLISHED = SpeedNetModel(own_kernels=False, mixtures=False)
AIRBENCH94 = Recipe(batch_size=2000, epochs=8.0, model=PUBLISHED, tta=Tta(shifts="corners"))

# 94 % as soon as possible: 94.05 % on 2 CPU cores without AMX after 152 s of training and evaluation, mean of five
# (LOG.md). No GPU measured.
#   fastcifar train --recipe speed94
SPEED94 = replace(SPEED, epochs=11.0)

# For GPUs, each to reach what its name says; none has been trained there yet, so epochs are a guess from CPUs (LOG.md).
# 95 % at as few epochs as held-out images say; 96 % with what airbench96 adds: depth, cutout, larger shifts.
SPEED95 = replace(SPEED_WIDE, epochs=15.0)
HARDER = Augment(crop_px=4, cutout_px=12)
SPEED96 = replace(SPEED, epochs=40.0, model=SpeedNetModel(widths=(128, 384, 512), depth=3), augment=HARDER)

# CIFAR-100: 75 % without test-time augmentation.
#   fastcifar train --recipe speed100 --dataset cifar100
SPEED100 = replace(SPEED, epochs=20.0, model=SpeedNetModel(widths=(128, 384, 512)), tta=Tta(share=0.0))

# The most that five minutes of one large GPU buy.
#   fastcifar train --recipe best5 --budget 5min
BEST5 = replace(SPEED96, epochs=100.0, model=SpeedNetModel(widths=(256, 768, 768), depth=3), tta=Tta())

# What the reports have in common: plain cross-entropy in float32, every image as it is, Adam at 1e-3 throughout.
AS_IT_IS = Augment(crop_px=0, flip="none")
PLAIN = Recipe(
    batch_size=100,
    epochs=50.0,
    label_smoothing=0.0,
    dtype="float32",
    augment=AS_IT_IS,
    optim=ClassicOptim(name="adam", lr=1e-3),
    tta=Tta(share=0.0),
)
# And what the fast ways have in common: bfloat16, one cycle of AdamW, images shifted and mirrored. Batches of 500 cost
# every convnet accuracy that was tried with smaller ones (LOG.md, 2026-11-23), but simplecnn, tried with Muon besides;
# resnet34-pretrained was not.
FAST = Recipe(
    batch_size=128,
    label_smoothing=0.1,
    optim=ClassicOptim(name="adamw", lr=4e-3, weight_decay=0.05, schedule="one-cycle"),
)

# For convnets that are worth its cost: Muon for the filters. One epoch of dynamic4: 49 % held out, AdamW alone 37 %
# (LOG.md).
MUON = replace(FAST.optim, name="muon", muon_lr=0.12, momentum=0.6)

# 3072-512-10 with BatchNorm and dropout 0.5. Reported: 55.82 % at best on validation images, 55.40 % on the test set.
#   fastcifar train --recipe mlp --as-reported
MLP_REPORTED = replace(PLAIN, model=MlpModel())
MLP = replace(FAST, batch_size=500, epochs=30.0, model=MlpModel(dropout=0.2))

# Two convolutions of 64 and 128 channels, each with BatchNorm, ReLU, dropout and max pooling. Reported: 77.49 % at best
# on validation images, 76.92 % on the test set. Chosen: 3x3 filters with padding, dropout 0.4, the best of 0.3, 0.4 and
# 0.5 on held-out images (LOG.md).
#   fastcifar train --recipe cnn2 --as-reported
CNN2_MODEL = CnnModel(blocks=((64,), (128,)), block_dropout=0.4, dropout=0.0)
CNN2_REPORTED = replace(PLAIN, model=CNN2_MODEL)
CNN2 = replace(FAST, epochs=20.0, model=replace(CNN2_MODEL, block_dropout=0.1))

# Four convolutions, each with BatchNorm, ReLU and max pooling, dropout 0.5 before the last layer. Reported: 77.70 % at
# the end on validation images, 78.60 % at best, 76.63 % on the test set. Chosen: 32, 64, 128, 256 channels, batch 64.
#   fastcifar train --recipe cnn4 --as-reported
CNN4_REPORTED = replace(PLAIN, batch_size=64, epochs=10.0, model=CnnModel())
CNN4 = replace(FAST, epochs=15.0, model=CnnModel(dropout=0.1))

# Three blocks of two convolutions on CIFAR-100, then 4096-512-100 with dropout 0.5. Reported: about 60 % on validation
# images. Chosen: StepLR's tenth after 20 and 40 of 50 epochs, as progress.
#   fastcifar train --recipe simplecnn --as-reported
SIMPLECNN_MODEL = CnnModel(blocks=((64, 64), (128, 128), (256, 256)), hidden=512)
SIMPLECNN_REPORTED = replace(
    PLAIN,
    batch_size=32,
    model=SIMPLECNN_MODEL,
    augment=Augment(crop_px=4, border="black", flip="random"),
    optim=ClassicOptim(name="adam", lr=1e-3, weight_decay=5e-4, schedule="step", step=0.4),
)
SIMPLECNN = replace(FAST, batch_size=500, epochs=20.0, model=SIMPLECNN_MODEL)

# Eleven dynamic blocks: k coefficients from the mean of each channel, k convolutions combined by them, the input added,
# BatchNorm, leaky ReLU. Reported: 83.67 % on the test set at the end, 85.22 % at best. Chosen: k = 4, softmax,
# three blocks each of 64, 128 and 256 channels and two of 512, pooled where the width changes. The fast way has 92.5 %;
# with AdamW alone, in batches of 500, it had 86.4 (LOG.md).
#   fastcifar train --recipe dynamic11 --as-reported
DYNAMIC11_MODEL = DynamicModel(groups=((64,) * 3, (128,) * 3, (256,) * 3, (512,) * 2))
DYNAMIC11_REPORTED = replace(
    PLAIN,
    batch_size=256,
    epochs=25.0,
    model=DYNAMIC11_MODEL,
    optim=ClassicOptim(name="adam", lr=1e-3, weight_decay=5e-4),
)
DYNAMIC11 = replace(
    FAST,
    epochs=6.0,
    model=DYNAMIC11_MODEL,
    optim=replace(MUON, lr=0.024),
    stages=GROWING,
    tta=Tta(share=0.25),
)

# Four blocks of four parallel convolutions, each with BatchNorm and ReLU, combined by softmax coefficients, residual.
# Reported: 92.15 % on the test set. Chosen: linear layers of 256 and 128 before the last, jitter of 0.2. The fast way
# has 92.6 %; in batches of 500, with a sixth of AdamW's rate, it had 88.8 (LOG.md).
#   fastcifar train --recipe dynamic4 --as-reported
DYNAMIC4_MODEL = DynamicModel(groups=((64, 128), (256, 512)), norm_experts=True, hidden=(256, 128), dropouts=(0.4, 0.3))
DYNAMIC4_REPORTED = replace(
    PLAIN,
    batch_size=512,
    epochs=100.0,
    label_smoothing=0.3,
    dtype="bfloat16",
    model=DYNAMIC4_MODEL,
    augment=Augment(crop_px=4, border="black", flip="random", rotate_deg=15.0, brightness=0.2, contrast=0.2),
    optim=ClassicOptim(
        name="sgd", lr=0.15, momentum=0.95, weight_decay=1e-3, schedule="one-cycle", warmup=0.3, clip_norm=0.5
    ),
)
DYNAMIC4 = replace(
    FAST,
    epochs=10.0,
    model=replace(DYNAMIC4_MODEL, dropouts=(0.1, 0.1)),
    optim=replace(MUON, lr=0.024),
    stages=(Stage(image_px=20, until=0.4), Stage(image_px=24, until=0.7), Stage(image_px=32, until=1.0)),
    tta=Tta(share=0.25),
)

# torchvision's ResNet-34 on CIFAR-100, from scratch. Reported: about 49 % on validation images. Chosen: mixup's beta
# distribution of 1, shifts by up to 4 onto black. Its first layers, made for 224 pixels, leave 1 x 1 of 32: the fast
# way ends with 64 pixels. It has 69.9 % of the test images; before, with 32 throughout and other batches, rate and
# epochs, it had 62.4 (LOG.md).
#   fastcifar train --recipe resnet34 --as-reported
RESNET34_REPORTED = replace(
    PLAIN,
    batch_size=32,
    epochs=100.0,
    label_smoothing=0.1,
    mix="mixup",
    model=ResNet34Model(),
    augment=Augment(crop_px=4, border="black", flip="random"),
    optim=ClassicOptim(
        name="sgd", lr=0.01, momentum=0.9, nesterov=False, weight_decay=5e-4, schedule="cosine", clip_norm=1.0
    ),
)
RESNET34 = replace(
    FAST,
    batch_size=256,
    epochs=16.0,
    model=ResNet34Model(),
    optim=replace(MUON, lr=0.024),
    stages=(Stage(image_px=32, until=0.5), Stage(image_px=64, until=1.0)),
    tta=Tta(shift_px=2, share=0.25),
)

# The same from ImageNet's weights, which are downloaded, or read with --model.weights FILE. Reported: no figure.
#   fastcifar train --recipe resnet34-pretrained --as-reported
PRETRAINED = ResNet34Model(weights="imagenet")
RESNET34_PRETRAINED_REPORTED = replace(
    RESNET34_REPORTED,
    batch_size=64,
    model=PRETRAINED,
    optim=ClassicOptim(
        name="sgd", lr=0.1, momentum=0.9, nesterov=False, weight_decay=5e-4, schedule="cosine", clip_norm=1.0
    ),
)
RESNET34_PRETRAINED = replace(FAST, batch_size=500, epochs=15.0, model=PRETRAINED, optim=MUON)

NAMED = {
    "speed": Named(
        "whitened convnet, Muon, growing images: CIFAR-10 and CIFAR-100 in minutes on a CPU, seconds on a GPU", SPEED
    ),
    "speed-narrow": Named("speed with half the channels, for seconds or a slow machine", SPEED_NARROW),
    "speed-wide": Named("speed with more channels, for minutes", SPEED_WIDE),
    "speed-pair": Named("two of speed-wide side by side, for a quarter of an hour and more", SPEED_PAIR),
    "speed94": Named("speed for 94 %, as soon as possible", SPEED94),
    "speed95": Named("speed-wide for 95 % on a GPU: not trained there yet", SPEED95),
    "speed96": Named("three convolutions a group, cutout, for 96 % on a GPU: not trained there yet", SPEED96),
    "speed100": Named("wide, for 75 % of CIFAR-100 on a GPU: not trained there yet", SPEED100, dataset="cifar100"),
    "best5": Named("the widest, for five minutes of a large GPU: not trained there yet", BEST5),
    "airbench94": Named("the published method that speed descends from, on PyTorch's own operators", AIRBENCH94),
    "mlp": Named(
        "a report's network without convolutions: 3072-512-10",
        MLP,
        MLP_REPORTED,
        claim=Claim(val_best=0.5582, test=0.5540),
    ),
    "cnn2": Named(
        "a report's two convolutions of 64 and 128 channels",
        CNN2,
        CNN2_REPORTED,
        claim=Claim(val_best=0.7749, test=0.7692),
    ),
    "cnn4": Named(
        "a report's four convolutions, dropout before the last layer",
        CNN4,
        CNN4_REPORTED,
        claim=Claim(val=0.7770, val_best=0.7860, test=0.7663),
    ),
    "simplecnn": Named(
        "a report's three blocks of two convolutions",
        SIMPLECNN,
        SIMPLECNN_REPORTED,
        "cifar100",
        Claim(val=0.60, about=True),
    ),
    "dynamic11": Named(
        "a report's eleven blocks of dynamic convolutions",
        DYNAMIC11,
        DYNAMIC11_REPORTED,
        claim=Claim(test=0.8367, test_best=0.8522),
    ),
    "dynamic4": Named(
        "a report's four blocks of four normalised convolutions", DYNAMIC4, DYNAMIC4_REPORTED, claim=Claim(test=0.9215)
    ),
    "resnet34": Named(
        "a report's ResNet-34 from scratch", RESNET34, RESNET34_REPORTED, "cifar100", Claim(val=0.49, about=True)
    ),
    "resnet34-pretrained": Named(
        "the same from ImageNet's weights", RESNET34_PRETRAINED, RESNET34_PRETRAINED_REPORTED, "cifar100"
    ),
}


def find_named(name: str) -> Named:
    """Raises UsageError for an unknown name."""
    if name not in NAMED:
        raise UsageError(
            f"--recipe: there is no recipe {name!r}; there is {', '.join(NAMED)}.", "fastcifar recipes list"
        )
    return NAMED[name]


def find_recipe(name: str, as_reported: bool = False) -> Recipe:
    """Raises UsageError for an unknown name, or one that comes from no report."""
    named = find_named(name)
    if as_reported and named.reported is None:
        raise UsageError(f"--as-reported: recipe {name} comes from no report.", f"fastcifar train --recipe {name}")
    return named.reported if as_reported and named.reported else named.recipe
