"""What a recipe consists of: frozen dataclasses that the command line can override by dotted name.

Nothing here imports torch, so `fastcifar recipes list` and `--help` answer at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from fastcifar.errors import UsageError

Check = tuple[str, str, bool]  # a field, what it may be, whether it is


@dataclass(frozen=True)
class SpeedNetModel:
    """The whitened convnet of `models/speednet.py`.

    Args:
        widths: channels of its three groups.
        depth: convolutions of each; the third, for trainings of many epochs, comes with a residual.
        whiten_eps: added to the eigenvalues of the patch covariance before their inverse root.
        own_kernels: this project's operators where they are faster than PyTorch's: on an x86 CPU with AVX2, for widths
            and a batch size that are multiples of 32.
        fused_gelu: on a GPU, this project's kernel for BatchNorm and GELU instead of what torch.compile makes of
            PyTorch's. Off, as nobody has measured yet which is faster.
        mixtures: eight more filters of the first layer, sums and differences of the strongest patches. In blocks, where
            channels come by 32, they cost nothing.
    """

    widths: tuple[int, int, int] = (64, 256, 256)
    depth: Literal[2, 3] = 2
    whiten_eps: float = 5e-4
    own_kernels: bool = True
    fused_gelu: bool = False
    mixtures: bool = True
    any_size: ClassVar[bool] = True  # of image

    def checks(self) -> Iterator[Check]:
        yield "widths", "multiples of 8", all(width > 0 and width % 8 == 0 for width in self.widths)
        yield "whiten_eps", "more than 0", self.whiten_eps > 0


@dataclass(frozen=True)
class MlpModel:
    """The network without convolutions of `models/mlp.py`.

    Args:
        hidden: widths of its hidden layers.
        batchnorm: after each hidden layer, before its ReLU.
        dropout: share of each hidden layer's outputs set to 0 while training.
    """

    hidden: tuple[int, ...] = (512,)
    batchnorm: bool = True
    dropout: float = 0.5
    any_size: ClassVar[bool] = False

    def checks(self) -> Iterator[Check]:
        yield "hidden", "at least 1 each", all(width >= 1 for width in self.hidden)
        yield "dropout", "from 0 to 1", 0 <= self.dropout <= 1


@dataclass(frozen=True)
class CnnModel:
    """The plain convnets of `models/cnn.py`: blocks of 3x3 convolutions, each block ending in a 2x2 max pooling.

    Args:
        blocks: for each block, the channels of its convolutions.
        hidden: width of a fully connected layer before the last; 0 for none.
        batchnorm: after each convolution, before its ReLU.
        block_dropout: share of a block's outputs set to 0 while training, before they are pooled.
        dropout: the same before the last layer.
    """

    blocks: tuple[tuple[int, ...], ...] = ((32,), (64,), (128,), (256,))
    hidden: int = 0
    batchnorm: bool = True
    block_dropout: float = 0.0
    dropout: float = 0.5
    any_size: ClassVar[bool] = False

    def checks(self) -> Iterator[Check]:
        yield "blocks", "1 to 5 of at least one convolution each", 1 <= len(self.blocks) <= 5 and all(self.blocks)
        yield "blocks", "of at least 1 channel each", all(width >= 1 for block in self.blocks for width in block)
        yield "hidden", "not negative", self.hidden >= 0
        yield "block_dropout", "from 0 to 1", 0 <= self.block_dropout <= 1
        yield "dropout", "from 0 to 1", 0 <= self.dropout <= 1


@dataclass(frozen=True)
class DynamicModel:
    """The convnets of dynamic convolutions of `models/dynamicnet.py`.

    Args:
        groups: channels of the blocks, with a 2x2 max pooling between two groups.
        experts: convolutions that each block combines.
        norm_experts: BatchNorm and ReLU on each expert's output, instead of on their sum.
        form: where the experts are combined; with `norm_experts` only "outputs".
        hidden: widths of the linear layers before the last.
        dropouts: share of the outputs of each that is set to 0 while training.
    """

    groups: tuple[tuple[int, ...], ...] = ((64, 128), (256, 512))
    experts: int = 4
    norm_experts: bool = False
    form: Literal["outputs", "weights", "inputs"] = "outputs"
    hidden: tuple[int, ...] = ()
    dropouts: tuple[float, ...] = ()
    any_size: ClassVar[bool] = True

    def checks(self) -> Iterator[Check]:
        yield "groups", "1 to 4 of at least one block each", 1 <= len(self.groups) <= 4 and all(self.groups)
        yield "groups", "of at least 1 channel each", all(width >= 1 for group in self.groups for width in group)
        yield "experts", "at least 1", self.experts >= 1
        yield "form", "outputs with model.norm_experts", self.form == "outputs" or not self.norm_experts
        yield "hidden", "at least 1 each", all(width >= 1 for width in self.hidden)
        yield "dropouts", "as many as model.hidden", len(self.dropouts) == len(self.hidden)
        yield "dropouts", "from 0 to 1 each", all(0 <= dropout <= 1 for dropout in self.dropouts)


@dataclass(frozen=True)
class ResNet34Model:
    """torchvision's ResNet-34 (`models/resnet.py`).

    Args:
        weights: to begin with: a file of torchvision's for ImageNet, "imagenet" to download it, or "" for random ones.
    """

    weights: str = ""
    any_size: ClassVar[bool] = True

    def checks(self) -> Iterator[Check]:
        yield from ()


Model = SpeedNetModel | MlpModel | CnnModel | DynamicModel | ResNet34Model


@dataclass(frozen=True)
class Augment:
    """What is done to a training image.

    In this order: policy, saturation, hue; then crop, flip, rotation; then brightness and contrast; then cutout. The
    first three make bytes of bytes, as torchvision does.

    Args:
        policy: torchvision's RandAugment (two operations of magnitude 9 of 30) or AutoAugment (that for CIFAR-10).
        saturation: multiply an image's distance from grey by 1 plus or minus up to this much; 0 is off.
        hue: turn its colours by up to this share of the colour wheel, either way; 0 is off.
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
    policy: Literal["none", "randaugment", "autoaugment"] = "none"
    saturation: float = 0.0
    hue: float = 0.0

    def checks(self) -> Iterator[Check]:
        yield "saturation", "from 0 to 1", 0 <= self.saturation <= 1
        yield "hue", "from 0 to 0.5", 0 <= self.hue <= 0.5
        yield "crop_px", "from 0 to 31", 0 <= self.crop_px <= 31
        yield "rotate_deg", "from 0 to 45", 0 <= self.rotate_deg <= 45
        yield "brightness", "from 0 to 1", 0 <= self.brightness <= 1
        yield "contrast", "from 0 to below 1", 0 <= self.contrast < 1
        yield "cutout_px", "from 0 to 32", 0 <= self.cutout_px <= 32

    @property
    def repaints(self) -> tuple[str, ...]:
        """The fields that are set of those that make bytes of bytes (`loaders/repaint.py`)."""
        wanted = {"policy": self.policy != "none", "saturation": self.saturation > 0, "hue": self.hue > 0}
        return tuple(name for name, is_set in wanted.items() if is_set)


@dataclass(frozen=True)
class SpeedOptim:
    """For SpeedNet: Muon for the filters, SGD with Nesterov momentum for biases and head.

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
    sums_loss: ClassVar[bool] = True  # over the batch; learning rates are made for that

    def checks(self) -> Iterator[Check]:
        yield "muon_lr", "more than 0", self.muon_lr > 0
        yield "muon_momentum", "from 0 to below 1", 0 <= self.muon_momentum < 1
        yield "muon_steps", "at least 1", self.muon_steps >= 1
        yield "bias_lr", "more than 0", self.bias_lr > 0
        yield "head_lr", "more than 0", self.head_lr > 0
        yield "momentum", "above 0 and below 1", 0 < self.momentum < 1
        yield "weight_decay", "not negative", self.weight_decay >= 0
        yield "warmup", "from 0 to below 1", 0 <= self.warmup < 1
        yield "whiten_bias_until", "above optim.warmup, up to 1", self.warmup < self.whiten_bias_until <= 1

    def slower(self) -> str:
        """Flags to try when a training has diverged."""
        return f"--optim.muon_lr {self.muon_lr / 2:g} --optim.head_lr {self.head_lr / 2:g}"


@dataclass(frozen=True)
class ClassicOptim:
    """One of torch's optimizers for all weights, or Muon beside one, and a schedule of the learning rate.

    Args:
        name: adam (weight decay added to the gradient), adamw (weights shrunk directly), sgd, or muon for the filters
            of convolutions and adamw for everything else.
        lr: peak learning rate, for a loss that is the mean over the batch.
        muon_lr: the same of muon, relative to filters of norm sqrt(count).
        momentum: of sgd and muon; `nesterov` looks ahead in sgd, muon always does.
        schedule: constant; one-cycle (a line up until `warmup`, then one down to 0); cosine (half a wave down to 0); or
            step (a tenth after each `step` of the progress).
        clip_norm: longest allowed gradient, over all weights; 0 is off.
    """

    name: Literal["adam", "adamw", "sgd", "muon"] = "adam"
    lr: float = 1e-3
    muon_lr: float = 0.24
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 0.0
    schedule: Literal["constant", "one-cycle", "cosine", "step"] = "constant"
    warmup: float = 0.2
    step: float = 0.4
    clip_norm: float = 0.0
    sums_loss: ClassVar[bool] = False

    def checks(self) -> Iterator[Check]:
        yield "lr", "more than 0", self.lr > 0
        yield "muon_lr", "more than 0", self.muon_lr > 0
        yield "momentum", "above 0 and below 1", 0 < self.momentum < 1
        yield "weight_decay", "not negative", self.weight_decay >= 0
        yield "warmup", "from 0 to below 1", 0 <= self.warmup < 1
        yield "step", "above 0, up to 1", 0 < self.step <= 1
        yield "clip_norm", "not negative", self.clip_norm >= 0

    def slower(self) -> str:
        """Flags to try when a training has diverged."""
        muon = f" --optim.muon_lr {self.muon_lr / 2:g}" if self.name == "muon" else ""
        return f"--optim.lr {self.lr / 2:g}{muon}"


Optim = SpeedOptim | ClassicOptim


@dataclass(frozen=True)
class Stage:
    """Train on images of `image_px` pixels until this much `progress` is made."""

    image_px: int
    until: float


@dataclass(frozen=True)
class Tta:
    """Test-time augmentation: mirrored and shifted views, averaged.

    Args:
        shift_px: by how much the shifted views move; 0 leaves only the mirrored one.
        shifts: where to: to all four sides, or, as in cifar10-airbench, up-left and down-right. The sides were right
            about 0.1 % more of the images (LOG.md).
        share: look again only at this share of the images, those the plain view is least sure of.
    """

    shift_px: int = 1
    shifts: Literal["sides", "corners"] = "sides"
    share: float = 1.0

    def checks(self) -> Iterator[Check]:
        yield "shift_px", "from 0 to 8", 0 <= self.shift_px <= 8
        yield "share", "from 0 to 1", 0 <= self.share <= 1


@dataclass(frozen=True)
class Recipe:
    """One way to train a model.

    Args:
        batch_size: images a step.
        min_steps: a budget that buys fewer steps than this halves the batch, down to 128, until it buys as many.
        epochs: passes over the training set when neither --budget nor --epochs nor --steps says otherwise.
        label_smoothing: probability mass spread evenly over all classes.
        mix: blend each image with another of its batch (mixup), or paste a part of the other into it (cutmix).
        mix_alpha: of the beta distribution that says how much; 1 is evenly.
        dtype: compute type of convolutions; weights and statistics stay float32.
        compile: torch.compile's mode on a GPU, or "off"; a CPU runs eagerly either way (LOG.md: Inductor gained nothing
            there).
        members: networks trained side by side on the same batches, their answers averaged (`models/ensemble.py`); a
            step costs as many times as much.
        stages: image sizes through the training, each until some progress; the last one until 1, and at evaluation.
    """

    batch_size: int = 2000
    min_steps: int = 0
    epochs: float = 8.0
    label_smoothing: float = 0.2
    mix: Literal["none", "mixup", "cutmix"] = "none"
    mix_alpha: float = 1.0
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    compile: Literal["off", "default", "max-autotune"] = "default"
    model: Model = field(default_factory=SpeedNetModel)
    members: int = 1
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=SpeedOptim)
    stages: tuple[Stage, ...] = (Stage(image_px=32, until=1.0),)
    tta: Tta = field(default_factory=Tta)

    @property
    def final_px(self) -> int:
        """The size of image that the training ends with, and the model is judged at."""
        return self.stages[-1].image_px

    def from_scratch(self) -> "Recipe":
        """The same without weights to begin with, for a model that is given its own."""
        return replace(self, model=ResNet34Model()) if isinstance(self.model, ResNet34Model) else self

    def checks(self) -> Iterator[Check]:
        yield "batch_size", "at least 2, for BatchNorm's sake", self.batch_size >= 2
        yield "min_steps", "not negative", self.min_steps >= 0
        yield "epochs", "more than 0", self.epochs > 0
        yield "members", "at least 1", self.members >= 1
        yield "label_smoothing", "from 0 to below 1", 0 <= self.label_smoothing < 1
        yield "mix_alpha", "more than 0", self.mix_alpha > 0
        sizes, ends = [stage.image_px for stage in self.stages], [stage.until for stage in self.stages]
        yield "stages", "at least one, of 18 to 64 pixels", bool(sizes) and all(18 <= size <= 64 for size in sizes)
        yield "stages", "of 32 pixels for this model", self.model.any_size or set(sizes) == {32}
        yield "stages", "rising in `until` and ending at 1", ends == sorted(set(ends)) and ends[-1] == 1
        for part in ("model", "augment", "optim", "tta"):
            for name, allowed, right in getattr(self, part).checks():
                yield f"{part}.{name}", allowed, right

    def check(self) -> None:
        """Raise UsageError naming the first field whose value makes no sense."""
        for name, allowed, right in self.checks():
            if not right:
                found = self
                for part in name.split("."):
                    found = getattr(found, part)
                raise UsageError(f"--{name}: must be {allowed}, is {found}.", "fastcifar recipes list")
