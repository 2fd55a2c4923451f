"""An exported file against its model: the same logits, and the same picks wherever these do not hang on rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ffvt.model.selection import SelectingModel, Selection

TOLERANCE = 1e-4  # largest accepted difference of the logits, and of the scores, as a share of the largest
CLEAR = 4  # picks are clear where the gap after the K-th score is more than CLEAR times the scores' error


@dataclass(frozen=True)
class Comparison:
    """How a file compares with its model, on random images.

    Attributes:
        images: images that were compared.
        excused: those among them whose logits differ by more than TOLERANCE, as the picks of a layer hang on rounding.
        difference: largest difference of the logits of all others, as a share of the largest.
        picks: layers of images whose picks are clear, and were compared; 0 where the file does not return them.
        is_zero: whether the model's logits are all zero, as those of a new head are: they would hide any difference.
    """

    images: int
    excused: int
    difference: float
    picks: int
    is_zero: bool

    def summary(self) -> str:
        said = f"compared on {self.images} random images: logits within {self.difference:.1e} of the largest"
        excused = f" but for {self.excused} images whose picks hang on rounding" if self.excused else ""
        picks = f", the same picks in {self.picks} layers of them" if self.picks else ""
        zero = "; the logits are all zero (an untrained head), which says nothing of the rest" if self.is_zero else ""
        return said + excused + picks + zero


class Expected(NamedTuple):
    """What a model gives for some images; index, score and clear are None for a plain ViT.

    logits (B, classes), index (B, L-1, K), score (B, L-1, N), and clear (B, L-1) bool: whether the gap between the K-th
    score and the next is larger than CLEAR times the error of the scores, which fp64 tells. Of a TransFG each head is
    such a line, with one pick.
    """

    logits: Tensor
    index: Tensor | None
    score: Tensor | None
    clear: Tensor | None


@torch.no_grad()
def compare(
    model: nn.Module, run: Callable[[Tensor], list[Tensor]], image_size: int, batch_sizes: Sequence[int]
) -> Comparison:
    """Runs a model and its file on random images, once per batch size.

    Args:
        model: the model, in evaluation mode, on the CPU, fp32.
        run: the file: images (B, 3, S, S) -> [logits] or [logits, index, score].
        image_size: S.
        batch_sizes: each B.

    Raises:
        ValueError: logits, picks or scores differ, or no image has clear picks.
    """
    generator = torch.Generator().manual_seed(0)
    exact = copy.deepcopy(model).double()
    images = excused = picks = 0
    difference, is_zero = 0.0, True
    for size in batch_sizes:
        batch = torch.randn(size, 3, image_size, image_size, generator=generator)
        expected = expect(model, exact, batch)
        logits, *selection = run(batch)
        kept = _comparable(logits, expected)
        difference = max(difference, _close("logits", logits[kept], expected.logits[kept]))
        is_zero = is_zero and not expected.logits.any()
        images, excused = images + size, excused + int((~kept).sum())
        if selection:
            picks += _compare_picks(Selection(*selection), expected)
    if excused == images:
        raise ValueError(f"export: an image must have clear picks to be compared; got none among {images}")
    return Comparison(images, excused, difference, picks, is_zero)


def expect(model: nn.Module, exact: nn.Module, images: Tensor) -> Expected:
    """What `model` gives for images (B, 3, S, S), and which picks are clear; `exact` is the same model in fp64."""
    if not isinstance(model, SelectingModel):
        return Expected(model(images), None, None, None)
    logits, selection = model.forward_with_selection(images)
    index, score = selection.lines, selection.score
    truth = exact.forward_with_selection(images.double())[1].score
    error = (score - truth).abs().amax(-1)  # (B, L-1)
    candidates = truth[..., model.first_candidate :]
    best = candidates.topk(min(index.shape[-1] + 1, candidates.shape[-1])).values
    gap = best[..., -2] - best[..., -1] if best.shape[-1] > index.shape[-1] else torch.inf
    return Expected(logits, index, score, gap > CLEAR * error)


def _comparable(logits: Tensor, expected: Expected) -> Tensor:
    """Which images (B,) must have the model's logits: those with clear picks, and those that have them anyway."""
    if expected.clear is None:
        return torch.ones(len(logits), dtype=torch.bool)
    near = (logits - expected.logits).abs().amax(1) <= TOLERANCE * expected.logits.abs().max()
    return expected.clear.all(1) | near


def _compare_picks(selection: Selection, expected: Expected) -> int:
    """How many layers of images have clear picks; they are the file's too."""
    _close("scores", selection.score, expected.score)
    same = (selection.lines.sort(-1).values == expected.index.sort(-1).values).all(-1)  # (B, L-1)
    wrong = int((expected.clear & ~same).sum())
    if wrong:
        raise ValueError(f"export: the file must pick as the model; got other picks in {wrong} layers of images")
    return int(expected.clear.sum())


def _close(name: str, found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value.

    Raises:
        ValueError: it is above TOLERANCE, or not a number.
    """
    if not found.numel():
        return 0.0
    largest = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    difference = float((found - expected).abs().max() / largest)
    if not difference <= TOLERANCE:
        raise ValueError(f"export: {name} must be the model's to {TOLERANCE} of the largest; got {difference:.1e}")
    return difference
