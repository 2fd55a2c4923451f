"""`record_attention`: what the class token looks at, and what looks at it, in every block of a timm ViT.

How: a torch-function mode sees each block's call of scaled_dot_product_attention (or, without fused attention, of
softmax) and takes the one row and the one column from its arguments; hooks say which block runs. The call itself goes
through unchanged.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ffvt.kernels.backend_torch import class_logits
from ffvt.kernels.reference import maws_score
from ffvt.model.timm_attention import given_options, observed_selections
from ffvt.model.timm_base import OfTimm, check_is_vit

NAME = "record_attention"
SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)


class _BlockRecord(NamedTuple):
    row: Tensor
    column: Tensor
    score: Tensor


class AttentionRecord:
    """What `record_attention` saw in the last forward, a list per block, first to last: detached fp32 tensors.

    Attributes:
        row: (B, H, N) each, the softmax of the logits' row 0: how much the class token looks at every token.
        column: (B, H, N) each, the softmax of the logits' column 0 over the tokens: how much each looks at the class
            token, compared with the others.
        score: (B, N) each, the MAWS score, the product of the two head-means.

    N counts the prefix too: the class token is token 0, then come a distillation token or registers, then the patches.
    In the fusion block of an FFVT, N counts the fused tokens; behind a token reduction, those left.

    Raises:
        ValueError: at reading, no forward has run.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, _BlockRecord] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def row(self) -> list[Tensor]:
        return [block.row for block in self._in_order()]

    @property
    def column(self) -> list[Tensor]:
        return [block.column for block in self._in_order()]

    @property
    def score(self) -> list[Tensor]:
        return [block.score for block in self._in_order()]

    def _in_order(self) -> list[_BlockRecord]:
        if not self._blocks:
            raise ValueError(f"{NAME}: a forward must have run within the context, in its thread; got none")
        return [self._blocks[number] for number in sorted(self._blocks)]


@contextmanager
def record_attention(model: nn.Module) -> Iterator[AttentionRecord]:
    """Within this context, each forward of a timm ViT leaves its class token's attention in the `AttentionRecord`.

    Nothing of N x N elements is made for it with fused attention, and what the model computes stays timm's own, bit for
    bit. The last forward is kept, so memory does not grow: two lines of N per head and block. Contexts can be nested;
    at the end, by an error too, the model is as before. Without gradients, under autocast and with activation
    checkpointing it works the same. A compiled model is recorded too, slower: every block breaks its graph, so
    fullgraph=True fails while the context is open. Forwards in other threads are not recorded.

    Args:
        model: a timm VisionTransformer or Eva (ViT, DeiT, CLIP, DINOv2, DINOv3, EVA, Perception Encoder, ...) with a
            class token and one attention per block, or a model that `add_feature_fusion` made of one.

    Raises:
        TypeError: another model.
        ValueError: no class token; and in the forward: a mask, causality, dropout of attention
            that is switched on, grouped heads, a block that does not attend exactly once. The forward then ends.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    vit = model.vit if isinstance(model, OfTimm) else model
    check_is_vit(NAME, "model", vit)
    if vit.cls_token is None:
        raise ValueError(f"{NAME}: model must have a class token; got {type(vit).__name__} with cls_token=None")
    record = AttentionRecord()
    recorder = _Recorder(record)
    with ExitStack() as stack:
        for number, block in enumerate(vit.blocks):
            begin = functools.partial(recorder.begin, number)
            stack.enter_context(block.register_forward_pre_hook(begin, with_kwargs=True))
            stack.enter_context(block.register_forward_hook(recorder.end, always_call=True))
        stack.enter_context(observed_selections(recorder.note_operands))
        stack.enter_context(recorder)
        yield record


class _Recorder(TorchFunctionMode):
    """Fills a record while it is the mode of its thread."""

    def __init__(self, record: AttentionRecord) -> None:
        super().__init__()
        self.record = record
        self.thread = threading.get_ident()
        self.block: int | None = None  # the one that runs
        self.found: list[_BlockRecord] = []  # its attentions

    @torch.compiler.disable(reason=NAME)
    def begin(self, number: int, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        recomputes = torch._C._current_graph_task_id() != -1  # in a backward
        if recomputes or threading.get_ident() != self.thread:
            return
        if number == 0:
            self.record._blocks.clear()
        self.block, self.found = number, []
        given = inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments
        rate = getattr(getattr(getattr(block, "attn", block), "attn_drop", None), "p", 0.0)
        self._refuse(attn_mask=given.get("attn_mask"), is_causal=given.get("is_causal"))
        self._refuse(attn_drop=rate if block.training else 0.0)

    @torch.compiler.disable(reason=NAME)
    def end(self, block: nn.Module, args: tuple, output: Tensor | None) -> None:
        if self.block is None or threading.get_ident() != self.thread:
            return
        number, self.block = self.block, None
        if output is None:  # it raised
            self.record._blocks.clear()
        elif len(self.found) != 1:
            raise ValueError(
                f"{NAME}: every block must attend exactly once; got {len(self.found)} calls of "
                f"scaled_dot_product_attention in block {number}, a {type(block).__name__}"
            )
        else:
            self.record._blocks[number] = self.found[0]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.block is not None and func is F.scaled_dot_product_attention:
            self.note_call(*args, **kwargs)
        elif self.block is not None and func in SOFTMAX and args[0].ndim == 4:  # without fused attention
            self._note(args[0][:, :, 0], args[0][..., 0])
        return func(*args, **kwargs)

    def note_call(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
        """The arguments of scaled_dot_product_attention."""
        self._refuse(**given_options(*args, **kwargs))
        self.note_operands(query, key, kwargs.get("scale"))

    def note_operands(self, query: Tensor, key: Tensor, scale: float | None) -> None:
        """query, key: (B, H, N, D), as attention multiplies them."""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        self._note(*class_logits(query.transpose(1, 2), key.transpose(1, 2), scale))

    @torch.no_grad()
    def _note(self, row: Tensor, column: Tensor) -> None:
        """row, column: (B, H, N), logits."""
        if self.block is not None:
            row, column = row.float(), column.float()
            self.found.append(_BlockRecord(row.softmax(-1), column.softmax(-1), maws_score(row, column)))

    def _refuse(self, **given: Any) -> None:
        named = [name for name, value in given.items() if isinstance(value, Tensor) or value]
        if named:
            raise ValueError(
                f"{NAME}: attention must be without mask, causality, dropout and grouped heads; got {', '.join(named)}"
            )
