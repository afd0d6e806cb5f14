"""What is done to an image's bytes before anything else: torchvision's policies, saturation, hue.

A policy makes two strokes on an image, each an operation of torchvision's with its magnitude. Which ones is drawn with
everything else (`augment.draw`); here all images of a batch that get the same stroke get it at once: with one thread
14,600 images/s of RandAugment in batches of 1,000, 8,200 in batches of 125, where one image at a time makes 1,300. The
threads are torch's; measured while others used the same two cores, a second one gained nothing.

Shapes: N images of the data set, B of a batch, H rows, W columns, C = 3 channels, P parts of a policy.
"""

from functools import cache
from typing import cast

import torch
from torch import Tensor

from fastcifar.data.download import import_torchvision
from fastcifar.settings import Augment

Stroke = tuple[str, float]  # torchvision's name of an operation, its magnitude
NOTHING: Stroke = ("Identity", 0.0)


@cache
def policy_parts(policy: str, side_px: int) -> tuple[list[Stroke], Tensor, Tensor]:
    """(all strokes, which of them each part makes [P, 2 strokes, 2 directions] int64, how likely [P, 2])."""
    import_torchvision()
    from torchvision.transforms import v2

    if policy == "randaugment":
        how = v2.RandAugment()
        bins = how.num_magnitude_bins
        parts = [[(name, 1.0, how.magnitude)] * 2 for name in how._AUGMENTATION_SPACE]
    else:
        how = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
        bins, parts = 10, how._policies
    strokes = [NOTHING]

    def place(name: str, index: int | None, direction: int) -> int:
        magnitudes, signed = how._AUGMENTATION_SPACE[name]
        scale = magnitudes(bins, side_px, side_px)
        size = 0.0 if scale is None else float(scale[index])
        stroke = name, size * direction if signed else size
        if stroke not in strokes:
            strokes.append(stroke)
        return strokes.index(stroke)

    places = [[[place(name, index, way) for way in (1, -1)] for name, _, index in part] for part in parts]
    return strokes, torch.tensor(places), torch.tensor([[share for _, share, _ in part] for part in parts])


def draw_strokes(policy: str, images: int, side_px: int, generator: torch.Generator) -> Tensor:
    """Two strokes for each image, int64 [N, 2], as torchvision draws them: AutoAugment's come in pairs."""
    _, places_P22, share_P2 = policy_parts(policy, side_px)
    picks = 2 if policy == "randaugment" else 1
    part_N2 = torch.randint(len(places_P22), (images, picks), generator=generator).expand(images, 2)
    made_N2 = torch.rand(images, 2, generator=generator) <= share_P2[part_N2, torch.arange(2)]
    way_N2 = torch.randint(2, (images, 2), generator=generator)
    return torch.where(made_N2, places_P22[part_N2, torch.arange(2), way_N2], 0)


def repaint(images_BHWC: Tensor, augment: Augment, strokes_B2: Tensor, saturation_B: Tensor, hue_B: Tensor) -> Tensor:
    """Bytes to bytes, on any device; a policy waits for a GPU, to know which images get which stroke."""
    x_BCHW = images_BHWC.permute(0, 3, 1, 2)
    if augment.policy != "none":
        for strokes_B in strokes_B2.unbind(1):
            x_BCHW = make_strokes(x_BCHW, augment.policy, strokes_B)
    if augment.saturation:
        x_BCHW = saturate(x_BCHW, saturation_B[:, None, None, None])
    if augment.hue:
        x_BCHW = turn_hue(x_BCHW, hue_B[:, None, None])
    return x_BCHW.permute(0, 2, 3, 1).contiguous()


def make_strokes(x_BCHW: Tensor, policy: str, strokes_B: Tensor) -> Tensor:
    """One of its strokes on each image."""
    from torchvision.transforms import v2

    painter, (strokes, _, _) = v2.RandAugment(), policy_parts(policy, x_BCHW.size(3))
    painted_BCHW = x_BCHW.clone()
    for stroke in strokes_B.unique().tolist():
        if strokes[stroke] != NOTHING:
            ids_M = (strokes_B == stroke).nonzero()[:, 0]
            x_MCHW = painter._apply_image_or_video_transform(
                x_BCHW[ids_M], *strokes[stroke], interpolation=painter.interpolation, fill=painter._fill
            )
            painted_BCHW[ids_M] = cast(Tensor, x_MCHW)
    return painted_BCHW


def saturate(x_BCHW: Tensor, factor_B111: Tensor) -> Tensor:
    """Away from grey by this factor, or towards it if it is below 1: torchvision's adjust_saturation."""
    red, green, blue = x_BCHW.unbind(1)
    grey_B1HW = (0.2989 * red + 0.587 * green + 0.114 * blue).floor()[:, None]
    return (x_BCHW * factor_B111 + grey_B1HW * (1 - factor_B111)).clamp(0, 255).to(torch.uint8)


def turn_hue(x_BCHW: Tensor, turns_B11: Tensor) -> Tensor:
    """Round the colour wheel by this many turns: torchvision's adjust_hue."""
    red, green, blue = (x_BCHW.float() / 255).unbind(1)
    most, least = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    span = most - least
    sixth = 1 / torch.where(span == 0, 1.0, span)
    hue = torch.where(most == red, (green - blue) * sixth, 4 + (red - green) * sixth)
    hue = torch.where((most == green) & (most != red), 2 + (blue - red) * sixth, hue) + 6 * turns_B11
    channels = []
    for begin in (5, 3, 1):  # sixths of a turn before a channel is at its least: red, green, blue
        place = (hue + begin) % 6
        channels.append(most - span * torch.minimum(place, 4 - place).clamp(0, 1))
    return (torch.stack(channels, 1) * 255.999).to(torch.uint8)  # as torchvision makes bytes of 0..1
