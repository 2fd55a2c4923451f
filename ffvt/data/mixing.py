"""MixUp and CutMix: a batch's images and labels, mixed with those of their neighbours in the batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2

from ffvt.data.transforms import global_generator_from


class Mixing:
    """MixUp, CutMix, or of both one by the toss of a coin.

    Image i becomes lambda times itself and 1 - lambda times image i - 1 (MixUp), or gets a rectangle of that one
    (CutMix); its label is a share of each. One lambda, from Beta(alpha, alpha), for the whole batch.

    Args:
        mixup, cutmix: alpha of each, 0 for none; not both 0.
        num_classes: C.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int) -> None:
        kinds = [kind for kind in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if kind[1]]
        self.transform = v2.RandomChoice([kind(alpha=float(alpha), num_classes=num_classes) for kind, alpha in kinds])

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) and labels (B,) as new images and shares of the classes, (B, C) fp32.

        seed: decides alone what is drawn, on every device.
        """
        with global_generator_from(torch.Generator().manual_seed(seed)):
            return self.transform(images, labels)
