"""transformers' models under every criterion: attn_implementation="ffvt", and feature fusion."""

import copy
import importlib

import pytest
import torch
from torch import nn

import ffvt
from ffvt import criteria
from ffvt.kernels.reference import select_top
from tests.model.full_maps import SCORES, Seen

transformers = pytest.importorskip("transformers")
from ffvt.integrations.transformers import register  # noqa: E402
from tests.integrations.test_transformers import make, pixels  # noqa: E402
from tests.integrations.test_transformers_fusion import BUILDS, build, fused  # noqa: E402

OF_ONE_LAYER = ("maws", "class_row", "column", "vote", "ats", "received")
NEED_MORE = ("rollout", "psm", "similarity")


@torch.no_grad()
def seen_layers(model, layers, images):
    """What every layer computes, by their own attention."""
    calls, tokens = [], []
    attention = next(module for module in model.modules() if type(module).__name__.endswith("Attention"))
    eager = importlib.import_module(type(attention).__module__).eager_attention_forward

    def keep(module, query, key, value, mask, scaling, **options):
        calls.append((query @ key.mT * scaling, value))
        return eager(module, query, key, value, mask, scaling=scaling, **options)

    transformers.AttentionInterface.register("keeping_maps", keep)
    model.set_attn_implementation("keeping_maps")
    hooks = [layer.register_forward_hook(lambda *given: tokens.append(given[2])) for layer in layers]
    model(images)
    for hook in hooks:
        hook.remove()
    return [Seen(*call, output) for call, output in zip(calls, tokens)]


@pytest.mark.parametrize("family", BUILDS)
def test_a_fused_model_picks_as_whole_maps_say(family):
    model, images, prefix = build(family).eval(), pixels(family, 3), BUILDS[family][2]
    vit = ffvt.add_feature_fusion(copy.deepcopy(model), num_select=3, num_classes=5).vit
    blocks = seen_layers(vit, vit.get_submodule(BUILDS[family][0]), images)
    for name, score_of in SCORES.items():
        twin = ffvt.add_feature_fusion(
            copy.deepcopy(model), num_select=3, num_classes=5, first_candidate=prefix, criterion=name
        )
        _, selection = twin.eval().forward_with_selection(images)
        for number in range(2):
            expected = score_of(blocks[: number + 1], prefix)
            torch.testing.assert_close(
                selection.score[:, number], expected, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: name + text
            )
            assert torch.equal(selection.index[:, number], select_top(expected, 3, prefix)), name


@pytest.mark.parametrize("criterion", criteria.names())
def test_a_vit_picks_what_our_ffvt_picks(criterion):
    theirs = fused("vit", first_candidate=1, criterion=criterion).eval()
    sizes = dict(image_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, mlp_dim=48, num_classes=5)
    ours = ffvt.create_model("vit_b16", num_select=3, first_candidate=1, criterion=criterion, **sizes).eval()
    ffvt.load_weights(ours, theirs.vit.state_dict(), last_block="pretrained")
    for norm in (module for module in ours.modules() if isinstance(module, nn.LayerNorm)):
        norm.eps = theirs.vit.config.layer_norm_eps  # 1e-12
    ours.head.load_state_dict(theirs.head.state_dict())
    images = pixels("vit", 3)
    with torch.no_grad():
        (logits, selection), (expected, expected_selection) = (
            model.forward_with_selection(images) for model in (theirs, ours)
        )
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(selection.index, expected_selection.index)


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2_with_registers", "dinov3_vit"])
@pytest.mark.parametrize("criterion", OF_ONE_LAYER)
def test_an_attention_scores_as_its_whole_map_says(family, criterion):
    model, images, prefix = make(family), pixels(family, 3), BUILDS[family][2]
    layers = [
        module
        for module in model.modules()
        if isinstance(module, transformers.modeling_layers.GradientCheckpointingLayer)
    ]
    blocks = seen_layers(model, layers, images)
    register("scoring", num_select=3, first_candidate=prefix, criterion=criterion)
    model.set_attn_implementation("scoring")
    with torch.no_grad():
        found = []
        scores = model(images, output_attentions=True, selections=found).attentions
    for score, (index, same), block in zip(scores, found, blocks, strict=True):
        expected = SCORES[criterion]([block], prefix)
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-7)
        assert torch.equal(index, select_top(expected, 3, prefix))
        assert torch.equal(same, score)


def test_a_call_can_ask_for_another_criterion():
    register(num_select=3)
    model, found = make("vit"), []
    model.set_attn_implementation("ffvt")
    for criterion in ("vote:4", criteria.Vote(4), "random:1"):
        model(pixels("vit"), selections=found, criterion=criterion)
    assert torch.equal(found[4][1], found[5][1])  # random knows nothing of the layer
    with pytest.raises(ValueError, match="^ffvt attention: criterion must be maws, class_row"):
        model(pixels("vit"), criterion="psm")


@pytest.mark.parametrize("criterion", NEED_MORE)
def test_what_reads_more_than_one_layer_is_refused(criterion):
    with pytest.raises(ValueError, match=f"^register: criterion must be maws, .*alone; got criterion='{criterion}'"):
        register(criterion=criterion)


def test_a_position_bias_is_for_maws_alone():
    register("scoring", num_select=3, criterion="class_row")
    model = make("beit, biases")
    model.set_attn_implementation("scoring")
    with pytest.raises(ValueError, match="criterion must be maws where the model has a position bias"):
        model(pixels("beit"))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("criterion", ["class_row", "psm"])
def test_activation_checkpointing_changes_nothing(criterion, reentrant):
    model, labels = fused("dinov3_vit", criterion=criterion).train(), torch.tensor([0, 3])
    images = pixels("dinov3_vit").requires_grad_()  # reentrant checkpointing asks for an input with a gradient
    results = []
    for recompute in (False, True):
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(images, labels).loss.backward()
        results.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*results)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["vote", "psm"])
def test_a_fused_model_compiles_in_one_graph(criterion):
    torch.compiler.reset()
    model, images = fused("vit", criterion=criterion).eval(), pixels("vit")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images).logits, model(images).logits)


@pytest.mark.slow
def test_the_attention_compiles_in_one_graph():
    torch.compiler.reset()
    register("scoring", num_select=3, criterion="vote:4")
    model, images = make("dinov2"), pixels("dinov2")
    model.set_attn_implementation("scoring")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images).logits, model(images).logits)


@pytest.mark.slow
def test_a_fused_model_is_exported(tmp_path):
    model = fused("dinov3_vit", criterion="psm")
    ffvt.export_model(model, tmp_path / "m.pt2", with_selection=True, check=3)
    images = pixels("dinov3_vit", 2)
    found = torch.export.load(tmp_path / "m.pt2").module()(images)
    torch.testing.assert_close(found[0], model.eval()(images).logits, rtol=1e-5, atol=1e-5)


def test_token_reduction_is_refused():
    with pytest.raises(ValueError, match="keep_rate must be 1 for a model of transformers.*got keep_rate=0.5"):
        ffvt.add_feature_fusion(build("vit"), num_select=3, keep_rate=0.5)


@pytest.mark.parametrize(
    ("criterion", "error", "message"),
    [("attention", ValueError, "criterion must be one of maws"), (None, TypeError, "got NoneType")],
)
def test_an_unknown_criterion_is_refused(criterion, error, message):
    model = build("vit")
    before = model.config._attn_implementation
    with pytest.raises(error, match=message):
        ffvt.add_feature_fusion(model, num_select=3, criterion=criterion)
    assert model.config._attn_implementation == before
