"""The contrastive loss of TransFG: features of one class together, those of different classes no closer than a margin.

Over several ranks the pairs are those of all ranks' images, as if one process had the whole batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ffvt.errors import require
from ffvt.train.distributed import World

MARGIN = 0.4  # the authors'


def contrastive_loss(features: Tensor, labels: Tensor, margin: float = MARGIN) -> Tensor:
    """The mean over all B * B pairs of images, each with itself too, of 1 - cosine for one class, and of what the
    cosine is above the margin for different ones.

    Args:
        features: (B, C), fp32, fp64, fp16 or bf16; what a model's head sees. The cosines are computed in at least fp32.
        labels: (B,), integers.
        margin: from which a cosine between different classes counts, in [-1, 1].

    Returns:
        The loss, a scalar, fp32 (fp64 for fp64). Its gradient goes to the features.

    Raises:
        TypeError: a dtype does not hold. ValueError: a shape or the margin does not.

    Source: He et al., TransFG (arXiv 2103.07976), section 3.3, equation 9.
    """
    if not features.is_floating_point() or labels.is_floating_point() or labels.is_complex():
        must = "features floating point and labels integers"
        raise TypeError(f"contrastive_loss: dtypes must be {must}; got {features.dtype} and {labels.dtype}")
    shape = tuple(features.shape)
    require(len(shape) == 2 and features.numel() > 0, "contrastive_loss", "features", "(B, C)", shape)
    must = f"({shape[0]},), one for each image"
    require(labels.shape == features.shape[:1], "contrastive_loss", "labels", must, tuple(labels.shape))
    is_number = isinstance(margin, (int, float)) and not isinstance(margin, bool)
    require(is_number and -1 <= margin <= 1, "contrastive_loss", "margin", "in [-1, 1]", margin)
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)
        cosine = unit @ unit.T
        alike = labels[:, None] == labels[None]
        return torch.where(alike, 1 - cosine, (cosine - margin).clamp(min=0)).sum() / len(labels) ** 2


def contrastive_loss_of_all(features: Tensor, labels: Tensor, world: World, margin: float = MARGIN) -> Tensor:
    """`contrastive_loss` of the images of all ranks, the same on each.

    Its gradient goes to this rank's features, as many times the whole batch's as there are ranks: the mean over the
    ranks, which data parallelism takes of the weights' gradients, is that of one process with the whole batch.

    Args:
        features, labels: of this rank, (B, C) and (B,); of one shape on all ranks.
        world: of the ranks.
        margin: as above.
    """
    if world.size == 1:
        return contrastive_loss(features, labels, margin)
    own = features + (world.size - 1) * (features - features.detach())  # the features, size times their gradient
    others = world.tensors(features.detach())
    others[world.rank] = own
    return contrastive_loss(torch.cat(others), torch.cat(world.tensors(labels)), margin)
