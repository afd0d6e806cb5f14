"""Several networks as one: trained side by side, asked together.

Shapes: M members, B images of a batch, C channels, H rows, W columns, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """Images [B, C, H, W] to logits: in training each member's own, [M * B, K], else the mean of all, [B, K].

    As the loss is over each member's own answers, each learns as it would alone (but for `optim.clip_norm`, which is
    over all weights), and what they get wrong differs. Source: B. Lakshminarayanan et al., "Simple and Scalable
    Predictive Uncertainty Estimation using Deep Ensembles" (arXiv:1612.01474), which averages probabilities.
    """

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits_MBK = torch.stack([member(x_BCHW) for member in self.members])
        return logits_MBK.flatten(0, 1) if self.training else logits_MBK.mean(0)
