"""Token reduction: which tokens stay, what becomes of the others, and in a model what is left of the picks."""

import math

import pytest
import torch

import ffvt
from ffvt import criteria
from ffvt.model.config import FFVTConfig, make_config
from ffvt.model.reduction import TokenReduction
from tests.helpers import tiny_model

SMALL = dict(image_size=64, embed_dim=32, depth=5, num_heads=4, mlp_dim=32, num_select=3)
REDUCED = dict(keep_rate=0.6, locations=(0, 2))


def layer_of(row, prefix=1):
    return criteria.Layer(None, None, None, ffvt.AttentionStats(row, None, None), num_prefix_tokens=prefix)


def test_the_patches_of_largest_row_stay_in_order_and_the_rest_become_their_weighted_sum():
    row = torch.tensor([[[0.4, 0.1, 0.05, 0.3, 0.15], [0.4, 0.1, 0.05, 0.3, 0.15]]])
    x = torch.randn(1, 5, 6)
    reduction = TokenReduction(0.5, 5)
    found = reduction.reduce(x, layer_of(row))
    expected = torch.cat([x[:, [0, 3, 4]], 0.1 * x[:, [1]] + 0.05 * x[:, [2]]], 1)
    torch.testing.assert_close(found, expected)
    assert reduction.positions.tolist() == [[0, 3, 4]]


def test_heads_are_averaged_and_the_share_is_rounded_up():
    row = torch.rand(2, 3, 12).softmax(-1)
    found = TokenReduction(0.55, 12).reduce(torch.randn(2, 12, 4), layer_of(row, prefix=2))
    assert found.shape == (2, 2 + math.ceil(0.55 * 10) + 1, 4)


def test_a_second_reduction_takes_the_fused_token_into_the_rest():
    reduction, x = TokenReduction(0.5, 6), torch.randn(1, 6, 4)
    first = reduction.reduce(x, layer_of(torch.tensor([[[0.0, 0.1, 0.4, 0.3, 0.2, 0.05]]])))
    assert reduction.positions.tolist() == [[0, 2, 3, 4]]
    row = torch.tensor([[[0.0, 0.1, 0.3, 0.2, 0.9]]])  # class, 2, 3, 4, fused: however large, it never stays
    second = reduction.reduce(first, layer_of(row))
    assert reduction.positions.tolist() == [[0, 3, 4]]
    expected = torch.cat([first[:, [0, 2, 3]], 0.1 * first[:, [1]] + 0.9 * first[:, [4]]], 1)
    torch.testing.assert_close(second, expected)
    index, score = reduction.original(torch.tensor([[2, 3, 0]]), torch.tensor([[0.5, 0.2, 0.3, 0.9]]))
    assert index.tolist() == [[4, 6, 0]]  # the fused token is none of the six
    torch.testing.assert_close(score, torch.tensor([[0.5, 0, 0, 0.2, 0.3, 0]]))


def test_gradients_reach_what_stays_and_what_is_fused():
    x, row = torch.randn(1, 5, 3, requires_grad=True), torch.tensor([[[0.2, 0.1, 0.3, 0.25, 0.15]]])
    TokenReduction(0.5, 5).reduce(x, layer_of(row)).sum().backward()
    expected = torch.tensor([1.0, 0.1, 1.0, 1.0, 0.15]).view(1, 5, 1).expand(1, 5, 3)
    torch.testing.assert_close(x.grad, expected)


def reduced_by_hand(model, images):
    """The features of a plain ViT whose tokens are dropped by a few lines on full maps."""
    x, config = model.embed(images), model.config
    for number, block in enumerate(model.blocks):
        if not config.reduces(number):
            x = block(x)
            continue
        q, k, _ = block.attn.project_qkv(block.norm1(x)).unbind(2)
        row = (torch.einsum("bhd,bmhd->bhm", q[:, 0], k) * q.shape[-1] ** -0.5).softmax(-1).mean(1)
        x = block(x)[0]
        patches = x.shape[1] - 1 - (number > config.locations[0])
        kept = 1 + row[:, 1 : 1 + patches].topk(math.ceil(config.keep_rate * patches)).indices.sort().values
        rest = row.scatter(1, kept, 0.0)
        rest[:, 0] = 0
        stay = torch.stack([image[index] for image, index in zip(x, kept)])
        x = torch.cat([x[:, :1], stay, torch.einsum("bn,bnc->bc", rest, x).unsqueeze(1)], 1)
    return model.norm(x[:, 0])


@pytest.mark.parametrize("changes", [{}, {"prune_dead_rows": False}, {"keep_rate": 0.3}, {"locations": (1, 2, 3)}])
def test_a_plain_vit_drops_them_as_a_few_lines_do(changes):
    model = tiny_model(**{**SMALL, **REDUCED, "feature_fusion": False, **changes}).eval()
    images = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(model.forward_features(images), reduced_by_hand(model, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion", [False, True])
def test_keeping_all_changes_nothing(fusion):
    images = torch.randn(2, 3, 64, 64)
    results = []
    for changes in ({}, {"keep_rate": 1.0, "locations": (0, 1)}):
        torch.manual_seed(0)
        model = tiny_model(**{**SMALL, "feature_fusion": fusion, **changes}).eval()
        results.append((model.forward_features(images), [type(block) for block in model.blocks]))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("criterion", ["maws", "class_row", "received", "random"])
def test_an_ffvt_picks_from_what_is_left_and_says_where_it_stood(criterion):
    model = tiny_model(**{**SMALL, **REDUCED, "criterion": criterion, "first_candidate": 1}).eval()
    images = torch.randn(3, 3, 64, 64)
    _, selection = model.forward_with_selection(images)
    assert selection.index.shape == (3, 4, 3)
    assert selection.score.shape == (3, 4, 17)
    left = (selection.score > 0).sum(-1)
    assert left.tolist() == [[17, 11, 11, 7]] * 3  # 1 + 16, 1 + 10, 1 + 10, 1 + 6
    for index, score in zip(selection.index.flatten(0, 1), selection.score.flatten(0, 1)):
        patches = index[index < 17]  # of 17 tokens; 17 is the fused one
        assert (score[patches] > 0).all(), "a token that was dropped cannot be picked"
        assert len(patches.unique()) == len(patches)


def test_training_reaches_every_parameter_also_recomputed():
    images, grads = torch.randn(2, 3, 64, 64), []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = tiny_model(**{**SMALL, **REDUCED, "dropout": 0.0, "gradient_checkpointing": recompute}).train()
        torch.nn.init.normal_(model.head.weight)
        model(images).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads[0][:-1])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fusion", [False, True])
def test_it_compiles_in_one_graph(fusion):
    model = tiny_model(**{**SMALL, **REDUCED, "feature_fusion": fusion}).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.compiler.reset()
    compiled = torch.compile(model.forward_features, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model.forward_features(images))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "pt2"])
@pytest.mark.parametrize("fusion", [False, True])
def test_it_becomes_a_file(fusion, form, tmp_path):
    if form == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    model = tiny_model(**{**SMALL, **REDUCED, "feature_fusion": fusion}).eval()
    torch.nn.init.normal_(model.head.weight)
    report = ffvt.export_model(model, tmp_path / f"model.{form}", with_selection=fusion, check=2)
    assert report.compared.images == 6


def test_a_saved_configuration_keeps_its_locations(tmp_path):
    model = tiny_model(**{**SMALL, **REDUCED})
    model.save_pretrained(tmp_path)
    assert ffvt.load_pretrained(tmp_path).config == model.config


def test_tokens_are_counted():
    config = make_config("vit_b16", keep_rate=0.7)
    assert [config.tokens_after(blocks) for blocks in (0, 3, 4, 7, 10, 11)] == [785, 785, 551, 387, 272, 272]


BAD = {
    "none kept": (dict(keep_rate=0.0), r"keep_rate must be in \(0, 1\]; got keep_rate=0.0"),
    "more than all": (dict(keep_rate=1.5), "got keep_rate=1.5"),
    "a location twice": (dict(keep_rate=0.5, locations=(3, 3)), "locations must be in rising order"),
    "out of order": (dict(keep_rate=0.5, locations=(6, 3)), "locations must be in rising order"),
    "behind the picks": (dict(keep_rate=0.5, locations=(10,)), r"in \[0, 10\); got locations=\(10,\)"),
    "negative": (dict(keep_rate=0.5, locations=(-1,)), "locations must be"),
    "no integers": (dict(keep_rate=0.5, locations=(1.5,)), "locations must be integers"),
    "text": (dict(locations="3,6"), "locations must be integers"),
    "history": (
        dict(keep_rate=0.5, criterion="psm"),
        "criterion must be one that does without .*; got criterion='psm'",
    ),
    "a square": (dict(keep_rate=0.5, criterion="vote:3"), "criterion must be"),
    "transfg": (dict(keep_rate=0.5, head="transfg"), "keep_rate must be 1 with transfg"),
    "too few left": (dict(keep_rate=0.02, num_select=12), "num_select must be at most the .* tokens left"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FFVTConfig(**changes)
