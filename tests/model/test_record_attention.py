"""record_attention: the class token's row and column of every block, with timm's own outputs untouched."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import ffvt
from ffvt.kernels.reference import maws_score
from tests.model.test_timm_builds import Logits, spread, unfused
from tests.model.timm_builds import (
    MADE,
    NAMED,
    SMALL,
    ParallelScalingBlock,
    ParallelThingsBlock,
    VisionTransformer,
    build,
    image_size,
    timm,
)

RECORDED = {  # beside the builds that select
    "parallel scaling": lambda: VisionTransformer(**SMALL, block_fn=ParallelScalingBlock),
    "attention dropout, not training": lambda: VisionTransformer(**SMALL, attn_drop_rate=0.5),
}


def explicit(vit, images):
    """Row and column of every block, (B, H, N), out of timm's explicit maps."""
    with torch.no_grad(), Logits() as maps:
        unfused(copy.deepcopy(vit))(images)
    lines = [(logits[:, :, 0], logits[..., 0]) for logits in maps.found if logits.shape[2] == logits.shape[3]]
    return lines[: len(vit.blocks)]


@pytest.fixture
def vit():
    return spread(VisionTransformer(**SMALL, reg_tokens=2)).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("name", [*NAMED, *MADE, *RECORDED])
def test_it_is_what_timms_explicit_maps_hold_and_the_output_is_timms(name):
    vit = spread(RECORDED[name]() if name in RECORDED else build(name)).eval()
    images = torch.randn(2, 3, image_size(vit), image_size(vit))
    output = vit(images)
    with ffvt.record_attention(vit) as stats:
        recorded = vit(images)
    assert torch.equal(recorded, output)
    expected = explicit(vit, images)
    assert len(stats) == len(expected) == len(vit.blocks)
    for number, (row, column) in enumerate(expected):
        torch.testing.assert_close(stats.row[number], row.softmax(-1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.column[number], column.softmax(-1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.score[number], maws_score(row, column), rtol=1e-5, atol=1e-6)


def test_shapes_and_dtypes_are_as_documented(vit, images):
    with ffvt.record_attention(vit) as stats:
        vit(images)
    tokens = 1 + 2 + 16
    for lines, shape in ((stats.row, (2, 4, tokens)), (stats.column, (2, 4, tokens)), (stats.score, (2, tokens))):
        assert [line.shape for line in lines] == [shape] * 3
        assert all(line.dtype == torch.float32 and not line.requires_grad for line in lines)
    torch.testing.assert_close(stats.row[0].sum(-1), torch.ones(2, 4))
    torch.testing.assert_close(stats.column[0].sum(-1), torch.ones(2, 4))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "gated, registers"])
def test_attention_that_is_not_fused_is_recorded_too(name):
    vit = unfused(spread(build(name)).eval())
    images = torch.randn(2, 3, image_size(vit), image_size(vit))
    output = vit(images)
    with ffvt.record_attention(vit) as stats:
        assert torch.equal(vit(images), output)
    for number, (row, _) in enumerate(explicit(vit, images)):
        torch.testing.assert_close(stats.row[number], row.softmax(-1))


def test_a_fused_model_is_recorded_with_the_scores_that_it_selects_by(vit, images):
    model = ffvt.add_feature_fusion(vit, num_select=3, num_classes=5)
    with ffvt.record_attention(model) as stats:
        _, selection = model.forward_with_selection(images)
    torch.testing.assert_close(torch.stack(stats.score[:2], dim=1), selection.score)
    assert stats.row[2].shape == (2, 4, 1 + 2 * 3)  # the fusion block: the fused tokens
    with ffvt.record_attention(vit) as stats:
        vit.forward_features(images)
    assert stats.row[2].shape == (2, 4, 19)


def test_the_fusion_block_with_rotary_positions_is_recorded_as_it_attends(images):
    model = ffvt.add_feature_fusion(spread(build("vit_small_patch16_dinov3")).eval(), num_select=3, num_classes=5)
    with ffvt.record_attention(model) as stats, torch.no_grad():
        model(images)
    model.vit.blocks[-1].attn.fused_attn = False
    with torch.no_grad():
        features = model.forward_features(images)
    assert features.shape == (2, 48)
    assert [row.shape[-1] for row in stats.row] == [21, 21, 7]


def test_the_last_forward_counts(vit, images):
    with ffvt.record_attention(vit) as stats:
        vit(images)
        first = stats.row[0]
        vit(images[:1])
        assert stats.row[0].shape[0] == 1
        assert len(stats) == 3
        vit.forward_intermediates(images, indices=[0], stop_early=True)
        assert len(stats) == 1
        assert torch.equal(stats.row[0], first)


def test_reading_before_any_forward_says_so(vit):
    with ffvt.record_attention(vit) as stats:
        assert len(stats) == 0
        with pytest.raises(ValueError, match="^record_attention: a forward must have run .*; got none"):
            stats.row  # noqa: B018


def test_gradients_are_timms_and_training_is_recorded(vit, images):
    twin = copy.deepcopy(vit)
    vit.train()(images).square().sum().backward()
    with ffvt.record_attention(twin) as stats:
        twin.train()(images).square().sum().backward()
    assert len(stats) == 3
    for own, other in zip(vit.parameters(), twin.parameters()):
        assert torch.equal(own.grad, other.grad)


@pytest.mark.parametrize("by", ["timm", "reentrant"])
def test_recomputation_in_a_backward_changes_nothing(vit, images, by):
    with ffvt.record_attention(vit) as stats:
        vit(images)
        expected = stats.row
        if by == "timm":
            vit.set_grad_checkpointing()
        else:
            for block in vit.blocks:
                block.forward = lambda x, run=block.forward, **_: checkpoint(run, x, use_reentrant=True)
        vit.train()(images.requires_grad_()).sum().backward()
        assert len(stats) == 3
        for found, row in zip(stats.row, expected):
            torch.testing.assert_close(found, row)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_lines_are_fp32_and_the_output_timms(vit, images, dtype):
    with torch.autocast("cpu", dtype):
        output = vit(images)
        with ffvt.record_attention(vit) as stats:
            assert torch.equal(vit(images), output)
    exact = explicit(vit, images)
    assert all(row.dtype == torch.float32 for row in stats.row)
    assert (stats.row[0] - exact[0][0].softmax(-1)).abs().max() < 0.05


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_works_the_same(vit, images, context):
    with context(), ffvt.record_attention(vit) as stats:
        vit(images)
    assert len(stats) == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wrapped", "in place"])
def test_a_compiled_model_is_recorded(vit, images, kind):
    torch.compiler.reset()
    output = vit(images)
    compiled = torch.compile(vit, backend="aot_eager") if kind == "wrapped" else copy.deepcopy(vit)
    if kind == "in place":
        compiled.compile(backend="aot_eager")
    compiled(images)
    with ffvt.record_attention(vit) as expected:
        vit(images)
    with ffvt.record_attention(compiled) as stats:
        torch.testing.assert_close(compiled(images), output)
    assert len(stats) == 3
    torch.testing.assert_close(stats.row, expected.row)
    torch.testing.assert_close(compiled(images), output)


def test_nested_contexts_both_record_and_both_end(vit, images):
    before = set(vit.blocks[0].__dict__)
    with ffvt.record_attention(vit) as outer:
        with ffvt.record_attention(vit) as inner:
            vit(images)
        assert torch.equal(inner.row[1], outer.row[1])
        vit(images[:1])
        assert (len(inner.row[0]), len(outer.row[0])) == (2, 1)
    vit(images)
    assert len(outer.row[0]) == 1
    assert set(vit.blocks[0].__dict__) == before
    for block in vit.blocks:
        assert not block._forward_hooks
        assert not block._forward_pre_hooks


def test_an_error_in_the_forward_leaves_no_record_and_the_model_as_it_was(vit, images):
    output = vit(images)
    with ffvt.record_attention(vit) as stats:
        vit(images)
        with pytest.raises(RuntimeError):
            vit.blocks[1](torch.randn(2, 4, 3))
        assert len(stats) == 0
        vit(images)
        assert len(stats) == 3
    with pytest.raises(RuntimeError, match="mine"), ffvt.record_attention(vit):
        raise RuntimeError("mine")
    assert not vit.blocks[0]._forward_hooks
    assert torch.equal(vit(images), output)


def test_softmax_and_attention_of_others_are_not_recorded(vit, images):
    with ffvt.record_attention(vit) as stats:
        vit(images)
        row = stats.row[0]
        F.scaled_dot_product_attention(*torch.randn(3, 1, 2, 5, 4))
        torch.randn(1, 2, 5, 5).softmax(-1)
        assert stats.row[0] is row
        assert len(stats) == 3


def test_another_thread_is_not_recorded(vit, images):
    with ffvt.record_attention(vit) as stats:
        thread = threading.Thread(target=lambda: vit(images))
        thread.start()
        thread.join()
        assert len(stats) == 0


def test_memory_grows_by_the_lines_alone(vit):
    """No tensor of N x N elements is made, and the record holds no view of a larger one."""
    vit = VisionTransformer(**{**SMALL, "img_size": 512, "embed_dim": 32, "num_heads": 2}).eval()
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return out

    images = torch.randn(1, 3, 512, 512)
    with torch.no_grad(), ffvt.record_attention(vit) as stats, Sizes():
        vit(images)
    assert largest <= images.nbytes  # the maps of two heads would be 8.4 MB
    assert all(line.untyped_storage().nbytes() == line.nbytes for line in (*stats.row, *stats.column, *stats.score))


NOT_RECORDED = {
    "no timm model": (lambda: torch.nn.Linear(2, 2), TypeError, "got Linear"),
    "no class token": (
        lambda: VisionTransformer(**SMALL, class_token=False, global_pool="avg"),
        ValueError,
        "a class token; got VisionTransformer with cls_token=None",
    ),
    "our own model": (lambda: ffvt.create_model("vit_s16", image_size=64, depth=2), TypeError, "got FFVT"),
    "NaFlexVit": (lambda: timm.create_model("naflexvit_base_patch16_gap"), TypeError, "got NaFlexVit"),
}


@pytest.mark.parametrize(("make", "error", "message"), NOT_RECORDED.values(), ids=NOT_RECORDED)
def test_models_that_cannot_be_recorded_are_refused_by_name(make, error, message):
    with torch.device("meta"):
        model = make()
    with pytest.raises(error, match=f"^record_attention: model must .*{message}"), ffvt.record_attention(model):
        pass


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("given", [dict(attn_mask=torch.ones(17, 17, dtype=torch.bool)), dict(is_causal=True)])
def test_masks_and_causality_are_refused_by_name(images, given, fused):
    vit = VisionTransformer(**SMALL).eval()
    vit = vit if fused else unfused(vit)
    with ffvt.record_attention(vit) as stats:
        vit(images)
        with pytest.raises(ValueError, match=f"^record_attention: .*got {next(iter(given))}$"):
            vit.forward_features(images, **given)
        assert len(stats) == 0


@pytest.mark.parametrize("fused", [True, False])
def test_dropout_of_attention_is_refused_where_it_drops(images, fused):
    vit = VisionTransformer(**SMALL, attn_drop_rate=0.1).train()
    vit = vit if fused else unfused(vit)
    with ffvt.record_attention(vit), pytest.raises(ValueError, match="^record_attention: .*got attn_drop$"):
        vit(images)


@pytest.mark.parametrize(("options", "calls"), [(dict(block_fn=ParallelThingsBlock), 2), (dict(attn_layer="diff"), 2)])
def test_blocks_that_attend_twice_are_refused(images, options, calls):
    vit = VisionTransformer(**SMALL, **options).eval()
    with (
        ffvt.record_attention(vit),
        pytest.raises(ValueError, match=f"^record_attention: .*exactly once; got {calls} calls .* in block 0"),
    ):
        vit(images)
