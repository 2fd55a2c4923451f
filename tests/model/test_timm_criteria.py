"""A timm ViT under every criterion, against whole maps and against our own FFVT."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ffvt
from ffvt import criteria
from ffvt.kernels.reference import select_top
from ffvt.model.timm_record import record_attention
from tests.model.full_maps import SCORES, Seen, Watch
from tests.model.test_timm_attention import recompute_by_timm, recompute_lambda, recompute_wrapped
from tests.model.test_timm_builds import spread
from tests.model.timm_builds import BUILDS, SMALL, VisionTransformer
from tests.model.timm_counts import counted_forwards, gradients

ONE_OF_EACH_KIND = ("vote", "received", "psm", "similarity")  # a line, a vector times a map, a history, tokens


def fused(build, **options):
    model = ffvt.add_feature_fusion(BUILDS[build]().eval(), num_select=3, num_classes=5, **options)
    return spread(model)


@torch.no_grad()
def seen_blocks(vit, images):
    """What every block of a plain timm ViT computes."""
    tokens = []
    hooks = [block.register_forward_hook(lambda *given: tokens.append(given[2])) for block in vit.blocks]
    for block in vit.blocks:
        block.attn.fused_attn = True
    with Watch() as watch:
        vit.forward_features(images)
    for hook in hooks:
        hook.remove()
    return [Seen(*call, output) for call, output in zip(watch.calls, tokens)]


@pytest.mark.parametrize("build", BUILDS)
def test_scores_and_picks_are_those_of_whole_maps(build):
    vit = spread(BUILDS[build]().eval())
    images = torch.randn(2, 3, 64, 64)
    blocks, prefix = seen_blocks(vit, images), vit.num_prefix_tokens
    for name, score_of in SCORES.items():
        model = ffvt.add_feature_fusion(
            copy.deepcopy(vit), num_select=3, num_classes=5, first_candidate=prefix, criterion=name
        )
        _, selection = model.forward_with_selection(images)
        for number in range(2):
            expected = score_of(blocks[: number + 1], prefix)
            found = selection.score[:, number]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: name + text)
            assert torch.equal(selection.index[:, number], select_top(expected, 3, prefix)), name


@pytest.mark.parametrize("criterion", [*criteria.names(), "vote:5", "random:7"])
def test_a_plain_timm_vit_picks_what_our_ffvt_picks(criterion):
    vit = spread(VisionTransformer(**SMALL).eval())
    sizes = dict(image_size=64, num_classes=7, num_select=3, embed_dim=64, depth=3, num_heads=4, mlp_dim=256)
    ours = ffvt.create_model("vit_b16", **sizes, first_candidate=1, criterion=criterion).eval()
    ffvt.load_weights(ours, vit.state_dict(), last_block="pretrained")
    theirs = ffvt.add_feature_fusion(vit, num_select=3, num_classes=7, first_candidate=1, criterion=criterion)
    theirs.head.load_state_dict(ours.head.state_dict())
    images = torch.randn(3, 3, 64, 64)
    (logits, selection), (expected, expected_selection) = (m.forward_with_selection(images) for m in (theirs, ours))
    torch.testing.assert_close(logits, expected)
    assert torch.equal(selection.index, expected_selection.index)
    assert theirs.criterion == ours.criterion == criteria.find(criterion)


def test_a_criterion_of_ones_own_is_taken():
    class Last(criteria.Criterion):
        kind = "last"

        def score(self, layers):
            return torch.arange(layers[-1].tokens.shape[1]).expand(len(layers[-1].tokens), -1)

    model = fused("layer scale, registers", criterion=Last())
    index = model.forward_with_selection(torch.randn(2, 3, 64, 64))[1].index
    assert index.unique(dim=0).tolist() == [[[19, 18, 17]] * 2]


class Operators(TorchDispatchMode):
    """Counts the operators of ours that run."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ffvt":
            self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "selecting", "observed"),
    [({}, 2, 0), (dict(criterion="class_row"), 0, 2), (dict(keep_rate=0.5, locations=(0,)), 1, 1)],
)
def test_maws_alone_stays_the_fused_operator(options, selecting, observed):
    model = fused("plain", **options)
    with Operators() as operators, torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert (operators.found["maws_attention"], operators.found["attention_stats"]) == (selecting, observed)


@pytest.mark.parametrize("recompute", [recompute_lambda, recompute_wrapped, recompute_by_timm])
@pytest.mark.parametrize("options", [dict(criterion="psm"), dict(keep_rate=0.5, locations=(0,))], ids=str)
@pytest.mark.parametrize("build", ["plain", "rope, registers, swiglu"])
def test_recomputation_meets_the_operators_of_the_forward(build, options, recompute):
    images = torch.randn(2, 3, 64, 64)
    model = fused(build, **options)
    expected = gradients(model, images)
    recompute(model.vit)
    calls = counted_forwards(model)
    with Operators() as operators:
        found = gradients(model, images)
    assert calls == [2, 2, 2]
    assert operators.found["attention_stats"] == 2 * sum(map(model.observes, range(2)))
    assert operators.found["maws_attention"] == 4 - operators.found["attention_stats"]
    torch.testing.assert_close(found, expected)


def test_timms_own_forward_works_as_before():
    vit = BUILDS["rope, registers, swiglu"]().eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = vit.forward_features(images)
        model = ffvt.add_feature_fusion(vit, num_select=3, criterion="class_row", keep_rate=0.5, locations=(0,))
        model(images)
        torch.testing.assert_close(vit.forward_features(images), features)
    again = ffvt.add_feature_fusion(vit, num_select=3)  # by maws, without reduction
    with Operators() as operators, torch.no_grad():
        again(images)
    assert operators.found["attention_stats"] == 0


@pytest.mark.parametrize("options", [dict(criterion="vote:3"), dict(keep_rate=0.5, locations=(0,))], ids=str)
def test_copies_and_pickles_compute_the_same(options):
    model = fused("layer scale, registers", **options)
    images = torch.randn(2, 3, 64, 64)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), model(images))
        assert twin.criterion == model.criterion


@pytest.mark.parametrize("criterion", criteria.names())
def test_half_precision_picks_as_many(criterion):
    model, images = fused("q/k norm", criterion=criterion), torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits, selection = model.forward_with_selection(images)
    logits.float().sum().backward()
    assert selection.index.shape == (2, 2, 3)
    assert selection.score.dtype == torch.float32
    assert selection.score.isfinite().all()


CASES = {name: dict(criterion=name) for name in criteria.names()} | {"reduced": dict(keep_rate=0.6, locations=(0,))}
COMPILED = [pytest.param(name, marks=[] if name in ("psm", "reduced") else pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("case", COMPILED)
@pytest.mark.parametrize("build", ["plain", pytest.param("rope, registers, swiglu", marks=pytest.mark.slow)])
def test_it_compiles_in_one_graph(case, build):
    torch.compiler.reset()
    model, images = fused(build, **CASES[case]), torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images))


def test_it_compiles_with_recomputation():
    torch.compiler.reset()
    model, images = fused("plain", criterion="psm", keep_rate=1), torch.randn(2, 3, 64, 64)
    expected = gradients(model, images)
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(torch.compile(model, backend="aot_eager"), images), expected)


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name == "reduced" else pytest.mark.slow) for name in CASES]
)
def test_it_is_exported_and_decomposed(case):
    model, images = fused("layer scale, registers", **CASES[case]), torch.randn(3, 3, 64, 64)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=shapes)
        assert "ffvt.attention_stats.default" in {str(node.target) for node in program.graph.nodes} or case == "maws"
        plain = program.run_decompositions(ffvt.decompositions())
        assert not [node for node in plain.graph.nodes if str(node.target).startswith("ffvt.")]
        for found in (program, plain):
            torch.testing.assert_close(found.module()(images), model(images), rtol=1e-4, atol=1e-5)


def test_attention_is_recorded_as_it_is_picked_from():
    model, images = fused("layer scale, registers", criterion="class_row"), torch.randn(2, 3, 64, 64)
    with torch.no_grad(), record_attention(model) as record:
        _, selection = model.forward_with_selection(images)
    for number in range(2):
        torch.testing.assert_close(record.row[number].mean(1), selection.score[:, number])


REFUSED = {
    "an unknown name": (dict(criterion="attention"), ValueError, "criterion must be one of maws, class_row"),
    "no criterion": (dict(criterion=3), TypeError, "criterion must be a name or a Criterion; got int"),
    "no rate": (dict(keep_rate=0.0), ValueError, r"keep_rate must be in \(0, 1\]; got keep_rate=0.0"),
    "places as numbers": (dict(keep_rate=0.5, locations=(0.0,)), ValueError, "locations must be integers"),
    "the last but one": (dict(keep_rate=0.5, locations=(1,)), ValueError, r"in \[0, 1\); got locations=\(1,\)"),
    "votes, reduced": (dict(keep_rate=0.5, locations=(0,), criterion="vote:3"), ValueError, "got criterion='?vote:3"),
    "history, reduced": (dict(keep_rate=0.5, locations=(0,), criterion="psm"), ValueError, "got criterion='?psm"),
    "picks, reduced": (
        dict(keep_rate=0.25, locations=(0,), num_select=7),
        ValueError,
        "at most the 6 tokens left with keep_rate=0.25; got num_select=7",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_picked_is_named(options, error, message):
    vit = BUILDS["plain"]()
    before = repr(vit)
    with pytest.raises(error, match=message):
        ffvt.add_feature_fusion(vit, **{"num_select": 3, **options})
    assert repr(vit) == before


NAMED = "timm:deit_tiny_distilled_patch16_224"
SIZES = dict(image_size=64, num_classes=5, num_select=3, embed_dim=48, depth=4, num_heads=3)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    options = dict(criterion="class_row", keep_rate=0.5, locations=[0, 1])  # a list, as config.json has it
    model = spread(ffvt.create_model(NAMED, **SIZES, **options).eval())
    model.save_pretrained(tmp_path)
    loaded = ffvt.load_pretrained(tmp_path)
    images = torch.randn(2, 3, 64, 64)
    assert loaded.config == model.config
    assert (loaded.config.locations, loaded.locations) == ((0, 1), (0, 1))
    assert (loaded.criterion.name, loaded.keep_rate) == ("class_row", 0.5)
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(criterion="attention"), "criterion must be one of maws"),
        (dict(criterion=3), "^TimmConfig: criterion must be a name"),
        (dict(keep_rate=1.5), "^TimmConfig: keep_rate must be in"),
        (dict(locations="0"), "^TimmConfig: locations must be integers"),
        (dict(keep_rate=0.5, feature_fusion=False), "^TimmConfig: keep_rate must be 1 without feature fusion"),
        (dict(keep_rate=0.5, locations=(5,)), "^add_feature_fusion: locations must be in rising order"),
        (dict(head="transfg"), "^create_model: head must be left out with a model of timm; got head='transfg'"),
        (dict(patch_stride=12), "patch_stride must be left out with a model of timm; got patch_stride=12"),
    ],
)
def test_values_that_do_not_hold_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ffvt.create_model(NAMED, **SIZES, **options)


@pytest.mark.parametrize("feature_fusion", [True, False])
def test_features_come_with_the_logits(feature_fusion):
    model = spread(ffvt.create_model(NAMED, **SIZES, feature_fusion=feature_fusion).eval())
    images = torch.randn(2, 3, 64, 64)
    logits, features = model(images, need_features=True)
    assert features.shape == (2, 48)
    assert torch.equal(logits, model(images))
    assert torch.equal(features, model.forward_features(images))
    assert torch.equal(model.forward_head(features, pre_logits=True), features)


def test_two_heads_do_not_see_the_mean_of_their_tokens():
    model = ffvt.create_model(NAMED, **SIZES, feature_fusion=False)
    with pytest.raises(ValueError, match="^forward_head: head must be one module .*got head='tuple'"):
        model.forward_head(torch.zeros(2, 48))


def test_a_plain_model_gives_all_tokens_by_its_vit():
    model = ffvt.create_model("timm:vit_tiny_patch16_224", image_size=64, num_classes=5, feature_fusion=False).eval()
    nn.init.normal_(model.get_classifier().weight)
    images = torch.randn(2, 3, 64, 64)
    logits, features = model(images, need_features=True)
    assert torch.equal(features, model.vit.forward_features(images)[:, 0])
    assert torch.equal(model.forward_head(features), logits)
