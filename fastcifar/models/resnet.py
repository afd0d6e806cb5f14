"""torchvision's ResNet-34, made for images of 224 pixels, on images of 32.

Shapes: N images, H rows, W columns, K classes.
"""

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from fastcifar.data.download import import_torchvision
from fastcifar.errors import DataError
from fastcifar.models.conv import use_conv2d

FAMILY = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
IMAGENET = "imagenet"
HINT = "--model.weights resnet34-b627a593.pth"


def build_resnet34(classes: int, weights: str = "") -> nn.Module:
    """Normalised images [N, 3, H, W], channels-last, to logits [N, K].

    Args:
        weights: "" for random ones; "imagenet" for torchvision's IMAGENET1K_V1, downloaded and its checksum compared;
            or a file with such weights in torchvision's format. The last layer, which knows 1000 classes, is new.

    Raises DataError: no such file, not such a file, another architecture, or no network.
    """
    import_torchvision()
    from torchvision.models import resnet34

    model = resnet34(num_classes=classes)
    use_conv2d(model)
    if weights:
        read = download() if weights == IMAGENET else load(Path(weights))
        refuse_other(read, weights)
        head = {f"fc.{name}": value for name, value in model.fc.state_dict().items()}
        model.load_state_dict(read | head)
    return model


def download() -> dict[str, Tensor]:
    from torchvision.models import ResNet34_Weights

    try:
        return dict(ResNet34_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True))
    except (OSError, RuntimeError) as error:  # RuntimeError: the checksum differs
        raise DataError(f"ResNet-34's ImageNet weights cannot be downloaded: {error}.", HINT) from error


def load(file: Path) -> dict[str, Tensor]:
    """Tensors only: a pickled file may ask for anything else to be executed, and is refused."""
    try:
        read = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"--model.weights: there is no file {file}.", HINT) from error
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise DataError(f"--model.weights: {file} is not a file of tensors as torch.save writes them.", HINT) from error
    if not isinstance(read, dict) or not all(isinstance(value, Tensor) for value in read.values()):
        raise DataError(f"--model.weights: {file} holds something else than named tensors.", HINT)
    return read


def refuse_other(read: dict[str, Tensor], source: str) -> None:
    """Raise DataError unless these are the weights of a ResNet-34, with whatever last layer; name what they are."""
    found = next((name for name in FAMILY if shapes(read) == shapes(meta_weights(name))), None)
    if found != "resnet34":
        what = f"weights of {found}" if found else "weights of no ResNet of torchvision"
        raise DataError(f"--model.weights: {source} holds {what}, not of resnet34.", HINT)


def meta_weights(name: str) -> dict[str, Tensor]:
    import torchvision.models

    with torch.device("meta"):
        return getattr(torchvision.models, name)().state_dict()


def shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    """All but the last layer's; older files do not count the batches that BatchNorm has seen."""
    return {
        name: value.shape
        for name, value in weights.items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
