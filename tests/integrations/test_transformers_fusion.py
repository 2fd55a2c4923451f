"""add_feature_fusion of transformers' models: equal to a slow explicit form; checkpointing, compiling, the Trainer."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ffvt
from ffvt.kernels import reference

transformers = pytest.importorskip("transformers")
from tests.integrations.test_transformers import make, pixels  # noqa: E402

BUILDS = {  # family: (its layers, its final norm, prefix tokens)
    "vit": ("layers", "layernorm", 1),
    "deit": ("layers", "layernorm", 2),
    "vit_msn": ("layers", "layernorm", 1),
    "dinov2": ("encoder.layer", "layernorm", 1),
    "dinov2_with_registers": ("encoder.layer", "layernorm", 5),
    "dinov3_vit": ("model.layer", "norm", 4),
    "clip_vision_model": ("encoder.layers", "post_layernorm", 1),
    "metaclip_2_vision_model": ("encoder.layers", "post_layernorm", 1),
}


def build(family):
    still = {"pos_embed_rescale": None} if family == "dinov3_vit" else {}  # else its positions are random in training
    return make(family, num_hidden_layers=3, **still)


def fused(family, **options):
    model = ffvt.add_feature_fusion(build(family), **{"num_select": 3, "num_classes": 5, **options})
    nn.init.normal_(model.head.weight)
    return model


def explicit(family, vit, images, picks, first):
    """FFVT by the book, with eager attention, image by image and token by token: the feature, and the picks.

    The attention of `vit` is replaced.
    """
    layers, norm, prefix = BUILDS[family]
    layers, norm = vit.get_submodule(layers), vit.get_submodule(norm)
    logits = []

    def attention(module, query, key, value, mask, scaling, **_):
        logits.append(query @ key.mT * scaling)
        return (logits[-1].softmax(-1) @ value).transpose(1, 2), None

    transformers.AttentionInterface.register("explicit", attention)
    vit.set_attn_implementation("explicit")
    x = vit.embeddings(images)
    x = vit.pre_layrnorm(x) if hasattr(vit, "pre_layrnorm") else x
    rope = vit.rope_embeddings(images) if family == "dinov3_vit" else None
    options = {} if rope is None else {"position_embeddings": rope}
    tokens, rows = [[image[0]] for image in x], [[0] for _ in x]
    for layer in layers[:-1]:
        x = layer(x, attention_mask=None, **options)
        score = reference.maws_score(logits[-1][:, :, 0, :], logits[-1][:, :, :, 0])
        for number, chosen in enumerate(reference.select_top(score, picks, first).tolist()):
            tokens[number] += [x[number, row] for row in chosen]
            rows[number] += chosen
    features = []
    for number, (image_tokens, image_rows) in enumerate(zip(tokens, rows)):
        image_tokens[0] = x[number, 0]
        if rope is not None:
            cosine, sine = rope
            still = torch.ones_like(cosine[0]), torch.zeros_like(sine[0])
            table = [still if row < prefix else (cosine[row - prefix], sine[row - prefix]) for row in image_rows]
            options = {"position_embeddings": tuple(torch.stack(part)[None, None] for part in zip(*table))}
        fused_tokens = layers[-1](torch.stack(image_tokens)[None], attention_mask=None, **options)
        features.append(norm(fused_tokens[0, 0]))
    return torch.stack(features), torch.tensor([row[1:] for row in rows])


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("family", BUILDS)
def test_features_and_picks_are_those_of_the_explicit_form(family, first):
    first = first * BUILDS[family][2]
    model, images = fused(family, first_candidate=first).eval(), pixels(family, 3)
    with torch.no_grad():
        features, picks = explicit(family, copy.deepcopy(model.vit), images, 3, first)
        logits, selection = model.forward_with_selection(images)
        assert torch.equal(selection.index.flatten(1), picks)
        torch.testing.assert_close(model.forward_features(images), features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits, model.head(features), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(images).logits, logits)
    assert int(selection.index.min()) >= first
    assert (model.num_selecting, model.num_prefix_tokens) == (2, BUILDS[family][2])


@pytest.mark.parametrize("family", ["dinov3_vit", "clip_vision_model"])
def test_gradients_are_those_of_the_explicit_form(family):
    model, images = fused(family).eval(), pixels(family)
    model.forward_features(images).square().sum().backward()
    found = {name: parameter.grad for name, parameter in model.vit.named_parameters()}
    twin = copy.deepcopy(model.vit)
    twin.zero_grad()
    features, _ = explicit(family, twin, images, 3, 0)
    features.square().sum().backward()
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", BUILDS)
def test_every_parameter_learns_and_their_own_forward_stays(family):
    images, model = pixels(family), build(family)
    backbone = model if hasattr(model, "embeddings") else model.base_model
    before = backbone(images).last_hidden_state
    full = ffvt.add_feature_fusion(model, num_select=3, num_classes=5)
    nn.init.normal_(full.head.weight)
    assert torch.equal(full.vit(images).last_hidden_state, before)
    found = full(images, labels=torch.tensor([1, 4]))
    torch.testing.assert_close(found.loss, nn.functional.cross_entropy(found.logits, torch.tensor([1, 4])))
    found.loss.backward()
    assert [name for name, p in full.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_model_inside_another_is_found():
    config = transformers.CLIPVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32)
    config.patch_size = 8
    whole = transformers.CLIPVisionModelWithProjection(config)
    assert ffvt.add_feature_fusion(whole, num_select=2).vit is whole.vision_model


def test_the_head_has_the_labels_of_the_config_unless_told():
    assert ffvt.add_feature_fusion(make("vit", num_labels=9), num_select=2).head.out_features == 9
    assert ffvt.add_feature_fusion(make("vit", num_labels=9), num_select=2, num_classes=4).head.out_features == 4


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["vit", "dinov3_vit"])
def test_activation_checkpointing_changes_nothing(family, reentrant):
    model, labels = fused(family).train(), torch.tensor([0, 3])
    images = pixels(family).requires_grad_()  # reentrant checkpointing asks for an input with a gradient
    results = []
    for recompute in (False, True):
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        calls = []
        layers = model.vit.get_submodule(BUILDS[family][0])
        hook = layers[0].attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(images, labels).loss.backward()
        hook.remove()
        results.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        assert len(calls) == 1 + recompute
    torch.testing.assert_close(*results)
    model.set_grad_checkpointing(False)
    assert not model.vit.is_activation_checkpointing


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "dinov3_vit"])
def test_a_fused_model_compiles_in_one_graph(family):
    torch.compiler.reset()
    model, images = fused(family).eval(), pixels(family)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images).logits, model(images).logits)


@pytest.mark.slow
def test_a_fused_model_is_exported(tmp_path):
    model = fused("dinov3_vit")
    report = ffvt.export_model(model, tmp_path / "m.pt2", with_selection=True, check=3)
    assert report.compared.picks > 0
    images = pixels("dinov3_vit", 2)
    found = torch.export.load(tmp_path / "m.pt2").module()(images)
    torch.testing.assert_close(found[0], model.eval()(images).logits, rtol=1e-5, atol=1e-5)


def test_changing_the_attention_afterwards_is_said():
    model = fused("vit")
    model.vit.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="must stay 'ffvt_fusion'; got 0 selections with attn_implementation='eager'"):
        model(pixels("vit"))


def test_integer_images_are_refused():
    with pytest.raises(TypeError, match="floating point, normalised; got dtype=torch.uint8"):
        fused("vit")(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.slow
def test_the_example_trains_to_the_end(capsys):
    pytest.importorskip("accelerate")
    path = Path(__file__).parents[2] / "examples" / "finetune_transformers.py"
    spec = importlib.util.spec_from_file_location("finetune_transformers", path)
    example = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = example
    spec.loader.exec_module(example)
    torch.use_deterministic_algorithms(False)  # as a user runs it
    assert example.main()["eval_accuracy"] > 0.9


@pytest.mark.slow
def test_the_trainer_recomputes_saves_and_evaluates_in_bf16(tmp_path):
    pytest.importorskip("accelerate")
    model = fused("vit")

    class Noise(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, number):
            generator = torch.Generator().manual_seed(number)
            return {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": number % 5}

    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        activation_checkpointing=True,
        bf16=True,
        use_cpu=True,
        report_to=[],
        save_steps=2,
        disable_tqdm=True,
    )
    torch.use_deterministic_algorithms(False)
    trainer = transformers.Trainer(model, arguments, train_dataset=Noise(), eval_dataset=Noise())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
