"""The table of decompositions: every operator by plain PyTorch, as the reference defines it; programs without ours."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import ffvt
from ffvt.kernels import reference
from tests.helpers import SHAPES, heads, tiny_model

OPERATORS = torch.ops.ffvt
QUICK_SHAPES = {name: shape for name, shape in SHAPES.items() if name != "real"}


def decomposed(operator, *arguments):
    return ffvt.decompositions()[operator.default](*arguments, "")


def test_the_table_has_every_operator_that_a_forward_calls():
    forwards = {
        name for name in dir(OPERATORS) if name.startswith(("maws", "attention", "gather")) and "backward" not in name
    }
    assert {operator.name().removeprefix("ffvt::") for operator in ffvt.decompositions()} == forwards


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", QUICK_SHAPES.values(), ids=QUICK_SHAPES)
def test_attention_and_picks_are_the_references(shape, dtype):
    q, k, v = (t.detach() for t in heads(shape, dtype))
    picks = (shape[1] + 1) // 2
    expected = reference.maws_attention_forward(q, k, v, picks, 0.3, 0)
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    rounded = 2e-2 if dtype == torch.bfloat16 else exact
    for found in (
        decomposed(OPERATORS.maws_attention, q, k, v, picks, 0.3, 0),
        decomposed(OPERATORS.maws_attention_qkvpacked, torch.stack([q, k, v], 2), picks, 0.3, 0),
    ):
        torch.testing.assert_close(found[0], expected[0], rtol=rounded, atol=rounded)
        assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(found[3], expected[3], rtol=exact, atol=exact)
        assert [t.dtype for t in found] == [t.dtype for t in expected]
    index, score = decomposed(OPERATORS.maws_select, q, k, picks, 0.3, 0)
    assert torch.equal(index, expected[1])
    torch.testing.assert_close(score, expected[2], rtol=1e-5, atol=1e-9)


def test_the_scale_is_one_over_the_root_of_the_width_by_default():
    q, k, v = (t.detach() for t in heads((2, 9, 2, 16)))
    for found, expected in zip(
        decomposed(OPERATORS.maws_attention, q, k, v, 3, None, 0),
        decomposed(OPERATORS.maws_attention, q, k, v, 3, 0.25, 0),
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize(
    "score",
    [
        torch.zeros(1, 50),
        torch.full((1, 50), 1e-45),  # the smallest fp32 number
        torch.full((1, 50), 0.25),
        torch.tensor([[0.5, torch.nan, 0.5, torch.nan, 0.0, 0.0, 0.5, 1e-45, torch.nan, 0.25]]),
        torch.tensor([[1.0, torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)), 1.0, 1.0]]).expand(2, -1),
        torch.rand(4, 5000).mul(2**12).round().div(2**12),
    ],
    ids=["zeros", "subnormal", "equal", "NaN", "one bit apart", "many ties"],
)
def test_ties_go_to_the_lower_index_and_nan_ranks_last(score, first):
    from ffvt.kernels.decompositions import select_top

    count = score.shape[1] - first
    assert torch.equal(select_top(score, count, first), reference.select_top(score, count, first))


def test_neighbouring_scores_keep_their_order_at_any_position():
    from ffvt.kernels.decompositions import select_top

    low = torch.tensor(0.7)
    score = torch.full((1, 4097), 0.7)
    score[0, -1] = torch.nextafter(low, torch.tensor(1.0))
    assert select_top(score, 2, 0).tolist() == [[4096, 0]]


def test_gather_takes_rows():
    x, index = torch.randn(2, 5, 3), torch.tensor([[4, 0, 4], [1, 2, 3]])
    assert torch.equal(decomposed(OPERATORS.gather_tokens, x, index), reference.gather_tokens(x, index))


class Everything(nn.Module):
    """All four operators."""

    def forward(self, x):
        qkv = x.view(*x.shape[:2], 3, 2, -1)
        out, index, score = ffvt.maws_attention_qkvpacked(qkv, 3)
        separate = ffvt.maws_attention(*qkv.unbind(2), 2, 0.5, 1)
        picked, _ = ffvt.maws_select(qkv[:, :, 0], qkv[:, :, 1], 4)
        return out, index, score, *separate, ffvt.gather_tokens(x, picked)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_program_without_our_operators_gives_the_same_for_any_batch(batch):
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(Everything(), (torch.randn(2, 11, 48),), dynamic_shapes=shapes)
    assert any("ffvt" in str(node.target) for node in program.graph.nodes)
    plain = program.run_decompositions(ffvt.decompositions())
    assert not [node for node in plain.graph.nodes if "ffvt" in str(node.target)]
    x = torch.randn(batch, 11, 48)
    torch.testing.assert_close(plain.module()(x), Everything()(x), rtol=1e-5, atol=1e-6)


def test_what_nobody_reads_is_left_out():
    """The lse would be a map of N x N."""
    program = torch.export.export(Everything(), (torch.randn(2, 11, 48),)).run_decompositions(ffvt.decompositions())
    assert not [node for node in program.graph.nodes if "logsumexp" in str(node.target)]


@pytest.mark.slow
def test_the_program_loads_where_this_package_is_not_imported(tmp_path):
    model = tiny_model().eval()
    program = torch.export.export(model, (torch.randn(2, 3, 64, 64),)).run_decompositions(ffvt.decompositions())
    torch.export.save(program, tmp_path / "model.pt2")
    code = (
        "import sys, torch; module = torch.export.load('model.pt2').module(); "
        "print(tuple(module(torch.randn(2, 3, 64, 64)).shape)); assert 'ffvt' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert shown.stdout.strip() == "(2, 5)", shown.stderr
