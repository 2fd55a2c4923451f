"""`add_feature_fusion`: the public function, for the models of timm and of transformers alike."""

from __future__ import annotations

from torch import nn

from ffvt.criteria import Criterion
from ffvt.errors import require
from ffvt.model.selection import SelectingModel

TIMM_CLASSES = 200  # CUB's


def add_feature_fusion(
    model: nn.Module,
    num_select: int = 12,
    num_classes: int | None = None,
    first_candidate: int = 0,
    criterion: str | Criterion = "maws",
    keep_rate: float = 1.0,
    locations: tuple[int, ...] = (3, 6, 9),
) -> SelectingModel:
    """Turns a ViT of timm or transformers into an FFVT with the same weights; its last block becomes the fusion block.

    A timm ViT becomes a `ffvt.model.timm_adapter.FeatureFusion`, images -> logits. A ViT of transformers becomes a
    `ffvt.integrations.transformers_fusion.FusedTransformer`, pixel_values and labels -> loss and logits, which
    `transformers.Trainer` takes. Either module says what it takes and what it refuses.

    Args:
        model: the ViT, with a class token. It is used, not copied, and loses its own head.
        num_select: K, tokens picked by each block but the last.
        num_classes: classes of the new, zero-initialised head; None for 200 (timm), or for `model.config.num_labels`
            (transformers).
        first_candidate: tokens [0, first_candidate) are never picked. 0 is the authors' choice; 1 leaves out the class
            token, and 1 + the number of registers these too.
        criterion: what picks the tokens, a name or an object of `ffvt.criteria`. "maws" picks within the attention's
            own launch; the others read the statistics that it leaves behind.
        keep_rate: fraction of the patches that stay after each block of `locations`; the others become one token. 1,
            which keeps all, for a model of transformers.
        locations: numbers of these blocks, from 0, in order; not read with keep_rate=1.

    Returns:
        A module with `forward_with_selection` and `forward_features`.

    Raises:
        TypeError: the model is of neither library, a count is no integer, or the criterion is none.
        ValueError: a model that cannot be fused, or a value that does not hold. The model is unchanged.
        ImportError: timm is missing.

    Source: FFVT (arXiv 2107.02341), section 3.2.
    """
    if any(base.__module__.startswith("transformers.") for base in type(model).__mro__):
        from ffvt.integrations import transformers_fusion

        must = "1 for a model of transformers, where every token stays"
        require(keep_rate == 1, transformers_fusion.NAME, "keep_rate", must, keep_rate)
        return transformers_fusion.add_feature_fusion(model, num_select, num_classes, first_candidate, criterion)
    from ffvt.model import timm_adapter

    num_classes = TIMM_CLASSES if num_classes is None else num_classes
    selection = (criterion, keep_rate, locations)
    return timm_adapter.add_feature_fusion(model, num_select, num_classes, first_candidate, *selection)
