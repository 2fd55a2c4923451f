"""What a model picked, as pictures show it: one line for each layer of an FFVT, one for each head of a TransFG."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ffvt.criteria import find


class PatchGrid(NamedTuple):
    """Where the patches lie in the square that the model sees.

    Attributes:
        columns: patches along a side.
        size: side of a patch, in any unit.
        stride: from one patch to the next; less than size where they overlap.
        side: of the square.
    """

    columns: int
    size: float
    stride: float
    side: float

    def box(self, token: int) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of the patch that is token 1, 2, ..."""
        row, column = divmod(token - 1, self.columns)
        left, top = column * self.stride, row * self.stride
        return left, top, left + self.size, top + self.size

    def times(self, factor: float) -> PatchGrid:
        """The same in a square that is so many times larger."""
        return PatchGrid(self.columns, *(factor * length for length in self[1:]))


def patch_grid(config: Any) -> PatchGrid:
    """Of a model's configuration, in pixels of its images."""
    stride = getattr(config, "patch_stride", None)
    size = config.patch_size if stride else config.image_size / config.grid_size
    return PatchGrid(config.grid_size, size, stride or size, config.image_size)


def picks_by_head(config: Any) -> bool:
    """Whether each head picks, and not each layer."""
    return getattr(config, "head", "ffvt") == "transfg"


def noun(config: Any) -> str:
    """What each line of a selection is of: "layer" or "head"."""
    return "head" if picks_by_head(config) else "layer"


def reason(config: Any) -> str:
    """By what the tokens are picked, in words."""
    return find("psm" if picks_by_head(config) else getattr(config, "criterion", "maws")).reason


def panels(index: Tensor, config: Any) -> tuple[Tensor, list[str]]:
    """Picks (B, lines, K) as the panels of a figure, (B, P, K'), and their titles: of each layer one, of all heads one,
    which shows their parts together."""
    if picks_by_head(config):
        return index.flatten(1).unsqueeze(1), [f"parts of {index.shape[1]} heads"]
    return index, [f"layer {number}" for number in range(1, index.shape[1] + 1)]
