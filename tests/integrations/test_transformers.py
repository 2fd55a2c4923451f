"""attn_implementation="ffvt": the numbers of transformers' own attention, forward and gradients, family by family."""

import importlib

import pytest
import torch

import ffvt
from ffvt.kernels import reference

transformers = pytest.importorskip("transformers")
from ffvt.integrations.transformers import CLASS_TOKEN_MODELS, register  # noqa: E402

SMALL = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
)
MAE = dict(mask_ratio=0.0, decoder_hidden_size=32, decoder_num_attention_heads=2, decoder_num_hidden_layers=1)
FAMILIES = {  # config, model, options, tokens; a class of transformers, or module:class
    "vit": ("ViTConfig", "ViTForImageClassification", {}, 17),
    "deit": ("DeiTConfig", "DeiTForImageClassification", {}, 18),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", {}, 17),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification", {}, 21),
    "dinov3_vit": ("DINOv3ViTConfig", "DINOv3ViTModel", {"num_register_tokens": 3}, 20),
    "vit_msn": ("ViTMSNConfig", "ViTMSNForImageClassification", {}, 17),
    "vit_mae": ("ViTMAEConfig", "ViTMAEForPreTraining", MAE, 17),
    "beit": ("BeitConfig", "BeitForImageClassification", {"use_absolute_position_embeddings": True}, 17),
    "beit, biases": ("BeitConfig", "BeitForImageClassification", {"use_relative_position_bias": True}, 17),
    "beit, one bias": ("BeitConfig", "BeitForImageClassification", {"use_shared_relative_position_bias": True}, 17),
    "yolos": ("YolosConfig", "YolosModel", {"image_size": [32, 32], "num_detection_tokens": 5}, 22),
    "vivit": ("VivitConfig", "VivitModel", {"tubelet_size": [2, 8, 8], "num_frames": 2}, 17),
    "clip_vision_model": ("CLIPVisionConfig", "CLIPVisionModel", {}, 17),
    "metaclip_2_vision_model": ("MetaClip2VisionConfig", "MetaClip2VisionModel", {}, 17),
    "chinese_clip_vision_model": ("ChineseCLIPVisionConfig", "ChineseCLIPVisionModel", {}, 17),
    "altclip_vision_model": ("AltCLIPVisionConfig", "AltCLIPVisionModel", {}, 17),
    "clipseg_vision_model": ("CLIPSegVisionConfig", "CLIPSegVisionModel", {}, 17),
    "owlvit_vision_model": ("OwlViTVisionConfig", "OwlViTVisionModel", {}, 17),
    "mlcd_vision_model": ("MLCDVisionConfig", "MLCDVisionModel", {}, 17),
    "blip_2_vision_model": ("Blip2VisionConfig", "Blip2VisionModel", {}, 17),
    "git_vision_model": ("models.git.configuration_git:GitVisionConfig", "GitVisionModel", {}, 17),
    "kosmos_2_vision_model": (
        "models.kosmos2.configuration_kosmos2:Kosmos2VisionConfig",
        "models.kosmos2.modeling_kosmos2:Kosmos2VisionModel",
        {},
        17,
    ),
}


def named(name):
    module, _, found = name.rpartition(":")
    return getattr(importlib.import_module(f"transformers.{module}" if module else "transformers"), found)


def make(family, **options):
    """A small model with weights large enough for scores to differ."""
    config, model, more, _ = FAMILIES[family]
    model = named(model)(named(config)(**{**SMALL, **more, **options})).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def pixels(family, batch=2):
    return torch.randn(batch, *((2,) if family == "vivit" else ()), 3, 32, 32)


def run(model, implementation, images, **options):
    """What the model returns, and the gradient of every parameter."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    torch.manual_seed(1)  # ViT-MAE shuffles
    found = model(images, **options)
    out = found.logits if "logits" in found else found.last_hidden_state
    out.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found, out.detach(), grads


def relative(found, expected, floor=0.0):
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=max(floor, 1e-30)))


@pytest.fixture(autouse=True)
def _registered():
    register(num_select=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_states_and_gradients_are_those_of_their_own_attention(family):
    model, images = make(family), pixels(family)
    expected, out, grads = run(model, "eager", images, output_hidden_states=True)
    found, ours, our_grads = run(model, "ffvt", images, output_hidden_states=True, output_attentions=True)
    assert relative(ours, out) < 1e-5
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    for state, expected_state in zip(found.hidden_states, expected.hidden_states):
        assert relative(state, expected_state) < 1e-5
    assert our_grads.keys() == grads.keys()
    largest = max(float(grad.abs().max()) for grad in grads.values() if grad.numel())
    for name, grad in grads.items():  # that of a key's bias is zero, up to rounding
        assert not grad.numel() or relative(our_grads[name], grad, floor=1e-3 * largest) < 1e-5, name
    tokens = FAMILIES[family][3]
    assert [score.shape for score in found.attentions] == [(2, tokens)] * len(expected.hidden_states[1:])


def test_every_family_that_is_taken_is_tested():
    assert {family.partition(",")[0] for family in FAMILIES} == set(CLASS_TOKEN_MODELS)


@pytest.mark.parametrize("family", ["vit", "dinov3_vit", "beit, biases"])
def test_scores_and_picks_are_the_references_of_the_map(family):
    """The map is transformers' own; its row 0 tells the row, and its logarithm the column."""
    model, images = make(family, num_hidden_layers=1), pixels(family)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        attention = next(module for module in model.modules() if type(module).__name__.endswith("Attention"))
        logits = []
        eager = importlib.import_module(type(attention).__module__).eager_attention_forward

        def keep(module, query, key, value, mask, scaling, **kwargs):
            logits.append(query @ key.mT * scaling + (0 if mask is None else mask))
            return eager(module, query, key, value, mask, scaling=scaling, **kwargs)

        transformers.AttentionInterface.register("keeping_logits", keep)
        model.set_attn_implementation("keeping_logits")
        model(images)
        selections = []
        model.set_attn_implementation("ffvt")
        scores = model(
            images, output_attentions=True, selections=selections, num_select=5, first_candidate=1
        ).attentions
    expected = reference.maws_score(logits[0][:, :, 0, :], logits[0][:, :, :, 0])
    ((index, score),) = selections
    torch.testing.assert_close(scores[0], expected, rtol=1e-5, atol=1e-8)
    assert torch.equal(score, scores[0])
    assert torch.equal(index, reference.select_top(expected, 5, 1))


def test_values_of_a_call_go_before_those_of_the_registration():
    model, images = make("vit"), pixels("vit")
    register(num_select=2, first_candidate=1)
    model.set_attn_implementation("ffvt")
    for asked, count, first in (({}, 2, 1), ({"num_select": 7}, 7, 1), ({"first_candidate": 9}, 2, 9)):
        selections = []
        model(images, selections=selections, **asked)
        assert [index.shape for index, _ in selections] == [(2, count)] * 2
        assert all(int(index.min()) >= first for index, _ in selections)


def test_a_name_of_ones_own_leaves_others_alone():
    register("ffvt_few", num_select=1)
    model, selections = make("vit"), []
    for name in ("ffvt_few", "ffvt"):
        model.set_attn_implementation(name)
        model(pixels("vit"), selections=selections)
    assert [index.shape[1] for index, _ in selections] == [1, 1, 3, 3]


def test_a_saved_model_loads_with_our_attention(tmp_path):
    model = make("dinov2")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="ffvt").eval()
    images = pixels("dinov2")
    torch.testing.assert_close(again(images).logits, model(images).logits, rtol=1e-5, atol=1e-6)
    assert again(images, output_attentions=True).attentions[0].shape == (2, 17)


def test_the_bias_of_beit_learns():
    _, _, grads = run(make("beit, one bias"), "ffvt", pixels("beit"))
    assert grads["beit.shared_position_bias.relative_position_bias_table"].abs().max() > 0


def test_other_models_with_a_class_token_are_taken_where_one_says_so():
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL)).eval()
    register("vouched", num_select=2, more_models=("siglip_vision_model",))
    model.set_attn_implementation("vouched")
    assert model(pixels("siglip"), output_attentions=True).attentions[0].shape == (2, 16)


def test_half_precision_and_training_mode_work():
    model = make("vit").bfloat16().train()
    model.set_attn_implementation("ffvt")
    out = model(pixels("vit").bfloat16(), labels=torch.tensor([0, 1]))
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16


@pytest.mark.slow
def test_it_compiles_in_one_graph_with_its_backward():
    torch.compiler.reset()
    model, images = make("dinov2_with_registers"), pixels("dinov2")
    _, expected, grads = run(model, "ffvt", images)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    out = compiled(images).logits
    out.square().mean().backward()
    torch.testing.assert_close(out.detach(), expected, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_it_is_exported_for_any_batch_and_decomposed():
    model = make("vit")
    model.set_attn_implementation("ffvt")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model(images).logits

    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with torch.no_grad():
        program = torch.export.export(Logits(), (pixels("vit"),), dynamic_shapes=shapes)
        assert "ffvt.maws_attention.default" in {str(node.target) for node in program.graph.nodes}
        plain = program.run_decompositions(ffvt.decompositions())
        images = pixels("vit", 5)
        torch.testing.assert_close(plain.module()(images), model(images).logits, rtol=1e-5, atol=1e-6)
