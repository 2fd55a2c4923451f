"""Criteria: each against its published formula on full maps, and in a model through every way to run one."""

import subprocess
import sys

import pytest
import torch

import ffvt
from ffvt import criteria
from tests.helpers import heads, skip_unserved, tiny_model, worst

SIDE, PREFIX = 4, 1
SHAPE = (2, SIDE * SIDE + PREFIX, 2, 8)  # B, N, H, D
SMALL = dict(image_size=64, embed_dim=32, depth=5, num_heads=4, mlp_dim=32, num_select=3, first_candidate=1)


# The formulas, on the maps (B, H, N, N) of all layers so far in fp64, the logits and values of the last, its tokens.


def by_maws(maps, logits, v, tokens):
    return maps[-1][:, :, 0].mean(1) * logits[..., 0].softmax(-1).mean(1)


def by_class_row(maps, logits, v, tokens):
    return maps[-1].mean(1)[:, 0]


def by_column(maps, logits, v, tokens):
    return logits[..., 0].softmax(-1).mean(1)


def by_vote(maps, logits, v, tokens, votes=24):
    row = maps[-1][:, :, 0, PREFIX:]
    counts = torch.zeros(row.shape[0], SIDE + 2, SIDE + 2, dtype=torch.float64)
    for image, head in ((b, h) for b in range(row.shape[0]) for h in range(row.shape[1])):
        for patch in row[image, head].topk(min(votes, SIDE * SIDE)).indices.tolist():
            counts[image, 1 + patch // SIDE, 1 + patch % SIDE] += 1
    kernel = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=torch.float64)
    blurred = torch.nn.functional.conv2d(counts.unsqueeze(1), kernel[None, None]).flatten(1)
    return torch.cat([torch.zeros(row.shape[0], PREFIX, dtype=torch.float64), blurred], 1)


def by_ats(maps, logits, v, tokens):
    significance = maps[-1][:, :, 0] * v.double().norm(dim=-1).transpose(1, 2)  # (B, H, N)
    return (significance / significance[..., PREFIX:].sum(-1, keepdim=True)).mean(1)


def by_received(maps, logits, v, tokens):
    return maps[-1].mean((1, 2))


def by_rollout(maps, logits, v, tokens):
    joint = torch.eye(maps[0].shape[-1], dtype=torch.float64)
    for layer in maps:
        joint = (layer.mean(1) + torch.eye(layer.shape[-1])) / 2 @ joint
    return joint[:, 0]


def by_psm(maps, logits, v, tokens):
    product = maps[0]
    for layer in maps[1:]:
        product = layer @ product
    return product[:, :, 0].mean(1)


def by_similarity(maps, logits, v, tokens):
    unit = tokens.double() / tokens.double().norm(dim=-1, keepdim=True)
    return (1 + (unit * unit[:, :1]).sum(-1)) / 2


FORMULAS = {
    "maws": by_maws,
    "class_row": by_class_row,
    "column": by_column,
    "vote": by_vote,
    "ats": by_ats,
    "received": by_received,
    "rollout": by_rollout,
    "psm": by_psm,
    "similarity": by_similarity,
}


def test_every_criterion_has_a_formula_but_the_control():
    assert {*FORMULAS, "random"} == set(criteria.names())


def layers_of(count, dtype=torch.float32):
    """Layers with their attention, and beside them their maps and the logits of the last, in fp64."""
    layers, maps = [], []
    for number in range(count):
        q, k, v = (t.detach() for t in heads(SHAPE, dtype))
        stats = ffvt.attention_stats(q, k, v)[1]
        tokens = torch.randn(SHAPE[0], SHAPE[1], 32)
        layers.append(criteria.Layer(q, k, v, stats, tokens, num_prefix_tokens=PREFIX, number=number))
        logits = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * SHAPE[3] ** -0.5
        maps.append(logits.softmax(-1))
    return layers, maps, logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_scores_and_picks_are_those_of_the_published_formula(backend, name, dtype):
    skip_unserved(backend, dtype)
    with ffvt.use_backend(backend):
        layers, maps, logits = layers_of(4, dtype)
        score = criteria.find(name)(layers)
    expected = FORMULAS[name](maps, logits, layers[-1].v, layers[-1].tokens)
    assert score.dtype == torch.float32
    assert not score.requires_grad
    torch.testing.assert_close(score.double(), expected, rtol=1e-4, atol=1e-6)
    candidates = expected[:, 1:]
    ranked = candidates.sort(dim=-1, descending=True).values
    index = criteria.pick(score, 5, first_candidate=1)
    clear = ranked[:, 4] - ranked[:, 5] > 4 * worst(score[:, 1:], candidates)
    chosen = candidates.topk(5).indices + 1
    assert torch.equal(index[clear].sort().values, chosen[clear].sort().values)
    if name != "vote":  # whose counts tie
        assert clear.any()


@pytest.mark.parametrize("name", ["rollout", "psm"])
def test_one_layer_has_no_history(name):
    layers, maps, logits = layers_of(1)
    torch.testing.assert_close(criteria.find(name)(layers).double(), FORMULAS[name](maps, logits, None, None))


def test_psm_gives_the_row_of_every_head():
    layers, maps, _ = layers_of(3)
    expected = (maps[2] @ maps[1] @ maps[0])[:, :, 0]
    found = criteria.psm.per_head(layers)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-8)
    assert torch.equal(found[:, :, 1:].argmax(-1), expected[:, :, 1:].argmax(-1))


def test_fewer_votes_are_fewer_votes():
    layers, maps, logits = layers_of(1)
    score = criteria.Vote(3)(layers)
    assert torch.equal(score.double(), by_vote(maps, logits, None, None, votes=3))
    assert score.max() < criteria.vote(layers).max()


def test_a_vote_needs_a_square_of_patches():
    layer = layers_of(1)[0][0]
    with pytest.raises(ValueError, match="vote: patches must be a grid of 3 x 3; got patches=14"):
        criteria.vote([layer._replace(num_prefix_tokens=3)])


def test_votes_spread_along_the_grid_that_a_layer_names():
    row = torch.zeros(1, 1, 13)
    row[..., 4] = 1.0  # the last patch of the first row of 3 x 4
    layer = criteria.Layer(None, None, None, ffvt.AttentionStats(row, None, None), grid=(3, 4))
    expected = torch.tensor([[0.0, 0, 0, 2, 4, 0, 0, 1, 2, 0, 0, 0, 0]])
    assert torch.equal(criteria.Vote(1)([layer]), expected)


@pytest.mark.parametrize("layers", [(), [], criteria.Layer(None, None, None, None)])
def test_no_layers_are_refused(layers):
    with pytest.raises(ValueError, match="maws: layers must be a sequence of at least one Layer"):
        criteria.maws(layers)


def test_ats_needs_values_and_bears_none_of_length():
    layer = layers_of(1)[0][0]
    with pytest.raises(ValueError, match="ats: v must be given in the Layer"):
        criteria.ats([layer._replace(v=None)])
    assert not criteria.ats([layer._replace(v=torch.zeros_like(layer.v))]).any()


def test_similarity_needs_the_tokens():
    layer = layers_of(1)[0][0]
    with pytest.raises(ValueError, match="similarity: tokens must be given in the Layer"):
        criteria.similarity([layer._replace(tokens=None)])


def test_random_knows_its_seed_layer_and_place_and_nothing_else():
    (layer,), _, _ = layers_of(1)
    other = layers_of(1)[0][0]
    score = criteria.random([layer])
    assert torch.equal(score, criteria.random([other]))
    assert torch.equal(score, criteria.Random(0)([layer]))
    assert not torch.equal(score, criteria.Random(1)([layer]))
    assert not torch.equal(score, criteria.random([layer._replace(number=1)]))
    assert not torch.equal(score[0], score[1])


def test_random_is_the_same_in_another_process():
    program = (
        "import torch, ffvt; m = ffvt.AttentionStats(torch.zeros(2, 1, 9), None, None);"
        "print(ffvt.criteria.random([ffvt.criteria.Layer(None, None, None, m, number=3)]).flatten().tolist())"
    )
    runs = {subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(runs) == 1


def test_random_scores_are_spread_evenly():
    stats = ffvt.AttentionStats(torch.zeros(500, 1, 101), None, None)
    layers = [criteria.Layer(None, None, None, stats, number=number) for number in range(4)]
    scores = torch.stack([criteria.Random(seed)([layer]) for seed in (0, 1, 2) for layer in layers])
    shares = scores.flatten().histc(10, 0, 1) / scores.numel()
    assert (shares - 0.1).abs().max() < 0.005
    picked = torch.stack([criteria.pick(score, 10) for score in scores])  # every token is picked about as often
    often = picked.flatten().bincount(minlength=101) / picked.numel() * 101
    assert often.min() > 0.75
    assert often.max() < 1.25
    pairs = torch.corrcoef(scores[:, :50].flatten(1))  # of layers and seeds
    assert (pairs - torch.eye(len(scores))).abs().max() < 0.06


@pytest.mark.parametrize(
    ("text", "name"),
    [("maws", "maws"), ("vote", "vote"), ("vote:24", "vote"), ("vote:12", "vote:12"), ("random:7", "random:7")],
)
def test_a_name_finds_its_criterion_and_back(text, name):
    found = criteria.find(text)
    assert found.name == name
    assert criteria.find(found) is found
    assert criteria.find(name) == found


@pytest.mark.parametrize("text", ["", "MAWS", "maws:3", "vote:", "vote:-1", "vote:0", "vote:x", "random:1.5", "cls:1"])
def test_an_unknown_name_is_refused_by_name(text):
    with pytest.raises(ValueError, match="must be .*; got"):
        criteria.find(text)


def test_neither_a_name_nor_a_criterion_is_refused():
    with pytest.raises(TypeError, match="criterion must be a name or a Criterion; got int"):
        criteria.find(3)


def test_picks_order_any_scores():
    score = torch.tensor([[-2.0, torch.nan, -1.0, -1.0, torch.inf, -torch.inf, 0.0, -0.0]])
    assert criteria.pick(score, 8).tolist() == [[4, 6, 7, 2, 3, 0, 5, 1]]
    assert criteria.pick(score, 2, first_candidate=5).tolist() == [[6, 7]]


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((torch.zeros(2, 3), 4), ValueError, "pick: num_select .*got num_select=4"),
        ((torch.zeros(2, 3), 1, 3), ValueError, "pick: first_candidate"),
        ((torch.zeros(2, 3, 1), 1), ValueError, r"pick: score must be \(B, N\)"),
        (([1.0], 1), TypeError, "pick: score must be a tensor"),
        ((torch.zeros(2, 3), 1.5), TypeError, "pick: num_select must be an int"),
    ],
)
def test_bad_picks_are_refused(args, error, message):
    with pytest.raises(error, match=message):
        criteria.pick(*args)


# In a model


def made(name, **changes):
    model = tiny_model(**{**SMALL, "criterion": name, **changes}).eval()
    torch.nn.init.normal_(model.head.weight)
    for block in model.blocks:  # maps that are not flat
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.3)
    return model


def formula_of_model(model, images, name):
    """What the formula says of every selecting block: (B, L-1, N), in fp64, from the model's own q, k, v and tokens."""
    projected, tokens = [], []
    with torch.no_grad():
        x = model.embed(images)
        for block in model.blocks:
            projected.append(block.attn.project_qkv(block.norm1(x)))
            x = block(x)[0]
            tokens.append(x)
    maps, scores = [], []
    for qkv, x in zip(projected, tokens):
        q, k, v = qkv.double().unbind(2)
        logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
        maps.append(logits.softmax(-1))
        scores.append(FORMULAS[name](maps, logits, v, x))
    return torch.stack(scores, 1)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_model_picks_by_its_criterion(name):
    model, images = made(name, prune_dead_rows=False), torch.randn(3, 3, 64, 64)
    logits, selection = model.forward_with_selection(images)
    expected = formula_of_model(model, images, name)
    torch.testing.assert_close(selection.score.double(), expected, rtol=1e-3, atol=1e-6)
    flat = selection.score.flatten(0, 1)
    assert torch.equal(selection.index.flatten(0, 1), criteria.pick(flat, 3, 1))
    torch.testing.assert_close(model(images), logits)
    features = model.forward_features(images)
    torch.testing.assert_close(model.head(features), logits)
    both = model(images, need_features=True)
    torch.testing.assert_close(both, (logits, features))


@pytest.mark.parametrize("name", criteria.names())
def test_a_model_trains_recomputes_and_prunes_alike(name):
    images = torch.randn(2, 3, 64, 64)
    results = []
    for changes in ({}, {"gradient_checkpointing": True}, {"prune_dead_rows": False}):
        torch.manual_seed(1)
        model = made(name, dropout=0.0, **changes).train()
        logits, selection = model.forward_with_selection(images)
        logits.square().sum().backward()
        results.append((logits.detach(), selection.index, [p.grad for p in model.parameters()]))
    for other in results[1:]:
        torch.testing.assert_close(other[0], results[0][0], rtol=1e-4, atol=1e-4)
        assert torch.equal(other[1], results[0][1])
        assert all(grad is not None for grad in other[2])
        torch.testing.assert_close(other[2], results[0][2], rtol=1e-3, atol=1e-3)


QUICK = ("psm", "similarity")  # of those that are compiled in `make test`


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in criteria.names()]
)
def test_a_model_compiles_in_one_graph(name):
    model, images = made(name), torch.randn(2, 3, 64, 64)
    logits, selection = model.forward_with_selection(images)
    torch.compiler.reset()
    compiled = torch.compile(model.forward_with_selection, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found, picks = compiled(images)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(picks.index, selection.index)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "pt2"])
@pytest.mark.parametrize("name", criteria.names())
def test_a_model_becomes_a_file_that_picks_alike(name, form, tmp_path):
    if form == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    report = ffvt.export_model(made(name), tmp_path / f"model.{form}", with_selection=True, check=2)
    assert report.compared.images == 6


def test_a_saved_model_keeps_its_criterion(tmp_path):
    model, images = made("vote:5"), torch.randn(2, 3, 64, 64)
    model.save_pretrained(tmp_path)
    loaded = ffvt.FFVT.from_pretrained(tmp_path)
    assert loaded.config.criterion == "vote:5"
    assert torch.equal(loaded(images), model(images))
    other = ffvt.FFVT.from_pretrained(tmp_path, criterion="random:3")
    assert not torch.equal(other.forward_with_selection(images)[1].index, model.forward_with_selection(images)[1].index)


@pytest.mark.parametrize("name", ["nobody", "maws:2", "vote:0", 3, None])
def test_a_bad_criterion_is_refused_before_there_is_a_model(name):
    with pytest.raises(ValueError, match="criterion|votes"):
        tiny_model(criterion=name)
    if isinstance(name, str):
        with pytest.raises(ValueError, match="criterion|votes"):
            tiny_model(criterion=name, feature_fusion=False)


def test_a_model_takes_a_criterion_itself():
    assert ffvt.create_model("vit_s16", criterion=criteria.Vote(7)).config.criterion == "vote:7"


def test_a_transfg_takes_no_other_criterion_than_its_own():
    assert tiny_model(head="transfg", criterion="psm").config.kind == "transfg"
    with pytest.raises(ValueError, match="criterion must be left out or 'psm' with transfg; got criterion='vote'"):
        tiny_model(head="transfg", criterion="vote")
