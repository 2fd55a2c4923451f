"""Hit rate: what share of the selected tokens lies on the mark that tells the classes apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ffvt.data.partbirds import PartBirds
from ffvt.data.transforms import normalize
from ffvt.model.ffvt import FFVT
from ffvt.train.evaluate import hits


def hit_rate(index: Tensor, on_mark: Tensor) -> Tensor:
    """Share of the selected tokens that lie on the mark, per layer.

    index: (B, L-1, K) int64, what each layer picked; on_mark: (B, N) bool, which tokens overlap the mark (the
    class token never does). Returns (L-1,) fp64.
    """
    return hits(index, on_mark).double().mean(dim=(0, 2))


def random_hit_rate(on_mark: Tensor, first_candidate: int = 0) -> float:
    """The expected hit rate of picks drawn at random from the candidates: the share of them that lies on the mark."""
    return on_mark[:, first_candidate:].double().mean().item()


@dataclass(frozen=True)
class SelectionStudy:
    """A model on some images: predictions (B,), selection index (B, L-1, K), on_mark (B, N), all on the CPU."""

    predictions: Tensor
    index: Tensor
    on_mark: Tensor


@torch.no_grad()
def study_selection(model: FFVT, birds: PartBirds, count: int, batch_size: int = 64) -> SelectionStudy:
    """Runs the first `count` birds through the model and keeps what it picked and predicted."""
    device = next(model.parameters()).device
    count = min(count, len(birds))
    predictions, index = [], []
    model.eval()
    for start in range(0, count, batch_size):
        images = torch.stack([birds[i][0] for i in range(start, min(start + batch_size, count))])
        logits, selection = model.forward_with_selection(normalize(images.to(device)))
        predictions.append(logits.argmax(1).cpu())
        index.append(selection.index.cpu())
    patches = torch.stack([birds.mark_tokens(i, model.config.patch_size) for i in range(count)])
    on_mark = torch.nn.functional.pad(patches, (1, 0))  # the class token is no patch
    return SelectionStudy(torch.cat(predictions), torch.cat(index), on_mark)
