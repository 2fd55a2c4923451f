"""The parts of the model: the drop-in attention, and the forms that compute fewer rows."""

import numpy as np
import pytest
import torch
from torch import nn

import ffvt
from ffvt.model.layers import Attention, ClassAttention, PrunedMAWSAttention


def test_the_drop_in_module_attends_and_selects():
    module = ffvt.MAWSAttention(32, 4, 3)
    x = torch.randn(2, 9, 32, requires_grad=True)
    out, index = module(x)
    qkv = module.qkv(x).view(2, 9, 3, 4, 8)
    expected, picks, scores = ffvt.reference.maws_attention_qkvpacked(qkv, 3)
    torch.testing.assert_close(out, module.proj(expected.flatten(2)))
    assert torch.equal(index, picks)
    same, again, score = module(x, need_score=True)
    assert torch.equal(same, out)
    assert torch.equal(again, index)
    torch.testing.assert_close(score, scores)
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert ffvt.MAWSAttention(32, 4, 3, qkv_bias=False).qkv.bias is None


def test_the_drop_in_module_makes_a_block_of_ones_own_select():
    class MyBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2, self.mlp = nn.LayerNorm(32), nn.LayerNorm(32), nn.Linear(32, 32)
            self.attn = ffvt.MAWSAttention(32, 4, 3)

        def forward(self, x):
            attended, index = self.attn(self.norm1(x))
            x = x + attended
            x = x + self.mlp(self.norm2(x))
            return x, ffvt.gather_tokens(x, index)

    x, tokens = MyBlock()(torch.randn(2, 9, 32))
    assert x.shape == (2, 9, 32)
    assert tokens.shape == (2, 3, 32)


def test_the_model_selects_with_the_public_module():
    model = ffvt.create_model("vit_s16", image_size=64, depth=4, embed_dim=32, num_heads=2, mlp_dim=32, num_select=3)
    assert [type(block.attn) for block in model.blocks[:-1]] == [ffvt.MAWSAttention] * 2
    assert isinstance(model.blocks[-1].attn, ffvt.MAWSAttention)


def test_fewer_rows_are_the_same_rows():
    x = torch.randn(2, 9, 32)
    full, row = Attention(32, 4), ClassAttention(32, 4)
    row.load_state_dict(full.state_dict())
    torch.testing.assert_close(row(x), full(x)[:, :1])
    full, few = ffvt.MAWSAttention(32, 4, 3, first_candidate=1), PrunedMAWSAttention(32, 4, 3, first_candidate=1)
    few.load_state_dict(full.state_dict())
    expected, index, score = full(x, need_score=True)
    attended, rows, few_index, few_score = few(x)
    assert torch.equal(few_index, index)
    assert torch.equal(rows, torch.cat([torch.zeros(2, 1, dtype=torch.int64), index], dim=1))
    torch.testing.assert_close(few_score, score)
    torch.testing.assert_close(attended, ffvt.gather_tokens(expected, rows))


def test_numpy_integers_are_integers():
    module = ffvt.MAWSAttention(np.int64(32), np.int32(4), np.int64(3), first_candidate=np.uint8(1))
    _, index = module(torch.randn(2, 9, 32))
    assert index.shape == (2, 3)
    assert index.min() >= 1
    assert type(module.num_select) is int


BAD = {
    "width": (dict(dim=30), ValueError, "dim must be a multiple of num_heads=4; got dim=30"),
    "no heads": (dict(num_heads=0), ValueError, "num_heads must be at least 1; got num_heads=0"),
    "no picks": (dict(num_select=0), ValueError, "num_select must be at least 1; got num_select=0"),
    "candidate": (dict(first_candidate=-1), ValueError, "first_candidate must be at least 0; got first_candidate=-1"),
    "a bool": (dict(num_select=True), TypeError, "num_select must be an integer; got num_select=True"),
    "a float": (dict(num_select=3.0), TypeError, "num_select must be an integer; got num_select=3.0"),
    "a float of numpy": (dict(num_select=np.float64(3)), TypeError, "num_select must be an integer"),
    "a float candidate": (dict(first_candidate=1.0), TypeError, "first_candidate must be an integer"),
    "a float width": (dict(dim=32.0), TypeError, "dim must be an integer; got dim=32.0"),
    "a bool of heads": (dict(num_heads=True), TypeError, "num_heads must be an integer; got num_heads=True"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=f"^MAWSAttention: {message}"):
        ffvt.MAWSAttention(**{"dim": 32, "num_heads": 4, "num_select": 3, **change})


def test_bad_tokens_are_named():
    module = ffvt.MAWSAttention(32, 4, 3)
    with pytest.raises(ValueError, match=r"x must be \(B, N, 32\); got x.shape=\(9, 32\)"):
        module(torch.zeros(9, 32))
    with pytest.raises(ValueError, match="num_select must be in .*got num_select=3"):
        module(torch.zeros(1, 2, 32))
