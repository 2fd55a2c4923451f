"""What transformers' attention, fused models of it and exported files refuse, each by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ffvt
from ffvt.cli import main
from tests.helpers import tiny_model
from tests.hostile.case import Case

TINY = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
)
SHAPE = (1, 2, 5, 4)  # B, H, N, D
Attempt = Callable[[Path], object]


def model_of(config: str, model: str, **options: Any) -> nn.Module:
    import transformers

    ffvt.integrations.transformers.register(num_select=1)
    return getattr(transformers, model)(getattr(transformers, config)(**{**TINY, **options}))


def vit(**options: Any) -> nn.Module:
    return model_of("ViTConfig", "ViTModel", **options)


def forward(build: Callable[[], nn.Module], training: bool = False, **arguments: Any) -> Attempt:
    """A call of a model with our attention."""

    def attempt(folder: Path) -> None:
        model = build().train(training)
        model.set_attn_implementation("ffvt")
        given = {name: value() if callable(value) else value for name, value in arguments.items()}
        model(**{"pixel_values": torch.zeros(1, 3, 16, 16), **given})

    return attempt


def attention(
    mask: Tensor | None = None, shapes: dict[str, tuple[int, ...]] | None = None, **arguments: Any
) -> Attempt:
    """A call of the attention function as a model of transformers makes it."""

    def attempt(folder: Path) -> None:
        from transformers import AttentionInterface

        module = vit().layers[0].attention
        sizes = {"query": SHAPE, "key": SHAPE, "value": SHAPE, **(shapes or {})}
        tensors = {name: torch.zeros(shape) for name, shape in sizes.items()}
        AttentionInterface()["ffvt"](module, *tensors.values(), mask, **arguments)

    return attempt


def registering(**arguments: Any) -> Attempt:
    return lambda folder: ffvt.integrations.transformers.register(**arguments)


def fusing(build: Callable[[], Any], **arguments: Any) -> Attempt:
    """A model of transformers that cannot be fused stays as it was."""

    def attempt(folder: Path) -> None:
        model = build()
        before = repr(model)
        try:
            ffvt.add_feature_fusion(model, **{"num_select": 1, **arguments})
        finally:
            if repr(model) != before:
                raise AssertionError("the model was changed")

    return attempt


def exporting(name: str = "model.pt2", build: Callable[[], Any] = tiny_model, **arguments: Any) -> Attempt:
    """An export that is refused leaves no file."""

    def attempt(folder: Path) -> None:
        try:
            ffvt.export_model(build(), folder / name, **arguments)
        finally:
            if [path for path in folder.rglob("*") if path.is_file()]:
                raise AssertionError("a file was written")

    return attempt


def export_to_a_folder(folder: Path) -> None:
    (folder / "model.onnx").mkdir()
    ffvt.export_model(tiny_model(), folder / "model.onnx")


def export_to_a_folder_that_cannot_be_written(folder: Path) -> None:
    (folder / "file").write_text("no folder")
    ffvt.export_model(tiny_model(), folder / "file" / "model.pt2")


def export_of_no_checkpoint(folder: Path) -> None:
    if main(["export", "--checkpoint", str(folder), "--output", str(folder / "m.pt2")]) == 0:
        raise AssertionError("exported nothing")


def command_line(*flags: str) -> Attempt:
    """Flags that are wrong end with status 2 before anything is loaded."""

    def attempt(folder: Path) -> None:
        try:
            main(["export", "--checkpoint", str(folder), *flags])
        except SystemExit as stop:
            if stop.code == 2:
                return
        raise AssertionError("the flags were taken")

    return attempt


def other_attention_after_fusion(folder: Path) -> None:
    model = ffvt.add_feature_fusion(vit(), num_select=1)
    model.vit.set_attn_implementation("sdpa")
    model(torch.zeros(1, 3, 16, 16))


def fused_on(images: Tensor) -> Attempt:
    return lambda folder: ffvt.add_feature_fusion(vit(), num_select=1)(images)


def ours_on(images: Tensor) -> Attempt:
    return lambda folder: tiny_model()(images)


def nan_weights(folder: Path) -> None:
    model = tiny_model(image_size=32, depth=2, embed_dim=16, num_heads=2, mlp_dim=16)
    nn.init.constant_(model.head.bias, torch.nan)
    ffvt.export_model(model, folder / "m.pt2")


def beit() -> nn.Module:
    return model_of("BeitConfig", "BeitModel", use_relative_position_bias=True)


def siglip() -> nn.Module:
    return model_of("SiglipVisionConfig", "SiglipVisionModel")


def text() -> nn.Module:
    return model_of("CLIPTextConfig", "CLIPTextModel", max_position_embeddings=16, vocab_size=20)


def causal() -> nn.Module:
    model = vit()
    for layer in model.layers:
        layer.attention.is_causal = True
    return model


MASK = torch.ones(1, 1, 5, 5, dtype=torch.bool)
WORDS = {"pixel_values": None, "input_ids": lambda: torch.zeros(1, 5, dtype=torch.int64)}
NO_CLASS_TOKEN = "token 0 must be a class token"
TRANSFORMERS = [
    ("mask of patches", forward(vit, attention_mask=torch.ones(1, 5)), "attention_mask must be None"),
    ("mask of patches, all kept", forward(vit, attention_mask=torch.ones(1, 5, dtype=torch.int64)), "attention_mask"),
    ("mask of pairs", forward(vit, attention_mask=MASK), "attention_mask.shape=(1, 1, 5, 5)"),
    ("mask of pairs, additive", forward(vit, attention_mask=torch.zeros(1, 1, 5, 5)), "attention_mask must be None"),
    ("mask and biases", forward(beit, attention_mask=torch.ones(1, 5)), "attention_mask.shape=(1, 5)"),
    ("boolean mask to the function", attention(MASK), "attention_mask must be None"),
    ("attention dropout", forward(lambda: vit(attention_probs_dropout_prob=0.1), training=True), "got dropout=0.1"),
    (
        "attention dropout of CLIP",
        forward(lambda: model_of("CLIPVisionConfig", "CLIPVisionModel", attention_dropout=0.5), training=True),
        "got dropout=0.5",
    ),
    ("no class token: SigLIP", forward(siglip), NO_CLASS_TOKEN),
    ("no class token: I-JEPA", forward(lambda: model_of("IJepaConfig", "IJepaModel")), "model_type='ijepa'"),
    ("text of CLIP", forward(text, **WORDS), "model_type='clip_text_model'"),
    ("causal module", forward(causal), "got is_causal=True"),
    ("causal call", attention(is_causal=True), "got is_causal=True"),
    ("cross-attention", attention(shapes={"query": (1, 2, 3, 4)}), "query (1, 2, 3, 4), key (1, 2, 5, 4)"),
    ("cache of keys", attention(shapes={"key": (1, 2, 9, 4), "value": (1, 2, 9, 4)}), "no cache"),
    ("grouped heads", attention(shapes={"key": (1, 1, 5, 4), "value": (1, 1, 5, 4)}), "no grouped heads"),
    ("values of another width", attention(shapes={"value": (1, 2, 5, 8)}), "value (1, 2, 5, 8)"),
    ("position_bias", attention(position_bias=torch.zeros(1)), "got position_bias"),
    ("softcap", attention(softcap=30.0), "got softcap"),
    ("sliding_window", attention(sliding_window=4), "got sliding_window"),
    ("s_aux", attention(s_aux=torch.zeros(2)), "got s_aux"),
    ("sinks", attention(sinks=torch.zeros(2)), "got sinks"),
    ("head_mask", attention(head_mask=torch.ones(2)), "got head_mask"),
    ("position_ids", attention(position_ids=torch.zeros(1, 5)), "got position_ids"),
    ("packed lengths", attention(cu_seq_lens_q=torch.zeros(2), max_length_q=5), "got cu_seq_lens_q, max_length_q"),
    ("past_key_values", attention(past_key_values=object()), "got past_key_values"),
    ("something new", attention(temperature_of_tomorrow=0), "got temperature_of_tomorrow"),
    ("more picks than tokens", forward(vit, num_select=6), "got num_select=6"),
    ("no picks", forward(vit, num_select=0), "got num_select=0"),
    ("picks a float", forward(vit, num_select=2.0), "got num_select=2.0"),
    ("candidates past the end", forward(vit, first_candidate=5), "got first_candidate=5"),
    ("scale of zero", attention(scaling=0.0), "got scale=0.0"),
    ("integer heads", lambda folder: _integer_heads(), "q.dtype=torch.int64"),
    ("register over sdpa", registering(name="sdpa"), "got name='sdpa'"),
    ("register over eager", registering(name="eager"), "got name='eager'"),
    ("register a hub's name", registering(name="someone/kernel"), "got name='someone/kernel'"),
    ("register nothing", registering(name=""), "got name=''"),
    ("register no text", registering(name=3), "got name=3"),
    ("register no picks", registering(name="own", num_select=0), "got num_select=0"),
    ("register True picks", registering(name="own", num_select=True), "got num_select=True"),
    ("register candidates before 0", registering(name="own", first_candidate=-1), "got first_candidate=-1"),
]
FUSION = [
    ("SigLIP", fusing(siglip), "got model_type='siglip_vision_model'"),
    ("BEiT, whose positions are biases", fusing(beit), "got model_type='beit'"),
    ("ViT-MAE, which hides patches", fusing(lambda: model_of("ViTMAEConfig", "ViTMAEModel")), "'vit_mae'"),
    ("text of CLIP", fusing(text), "got model_type='clip_text_model'"),
    ("one layer", fusing(lambda: vit(num_hidden_layers=1)), "got num_hidden_layers=1"),
    ("attention dropout", fusing(lambda: vit(attention_probs_dropout_prob=0.2)), "attention_probs_dropout_prob=0.2"),
    ("no picks", fusing(vit, num_select=0), "got num_select=0"),
    ("picks a float", fusing(vit, num_select=1.5), "got num_select=1.5"),
    ("no classes", fusing(vit, num_classes=0), "got num_classes=0"),
    ("candidates before 0", fusing(vit, first_candidate=-1), "got first_candidate=-1"),
    ("neither timm nor transformers", fusing(lambda: nn.Linear(2, 2)), "got Linear"),
    ("a config", fusing(lambda: vit().config), "got ViTConfig"),
    ("another attention afterwards", other_attention_after_fusion, "must stay 'ffvt_fusion'"),
    ("integer images", fused_on(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)), "got dtype=torch.uint8"),
    ("images of another size", fused_on(torch.zeros(1, 3, 24, 24)), "24*24"),
]
EXPORT = [
    ("no suffix", exporting("model"), "must be a file that ends in .onnx or .pt2"),
    ("TorchScript", exporting("model.pt"), "model.pt"),
    ("a folder", export_to_a_folder, "model.onnx"),
    ("a folder that is not there", exporting("nowhere/model.pt2"), "nowhere/model.pt2"),
    ("into a file", export_to_a_folder_that_cannot_be_written, "file/model.pt2"),
    ("operator set of a program", exporting(opset=20), "got opset=20"),
    ("batch of none", exporting(batch_size=0), "got batch_size=0"),
    ("batch of half", exporting(batch_size=0.5), "got batch_size=0.5"),
    ("less than no check", exporting(check=-1), "got check=-1"),
    ("check as True", exporting(check=True), "got check=True"),
    ("image of another size", exporting(image_size=48), "must be (B, 3, 64, 64)"),
    ("picks of a plain ViT", exporting(build=lambda: tiny_model(feature_fusion=False), with_selection=True), "plain"),
    ("another's model", exporting(build=lambda: nn.Linear(2, 2)), "got a Linear"),
    ("half precision", exporting(build=lambda: tiny_model().half()), "got torch.float16"),
    ("facts that JSON has not", exporting(facts={"mean": torch.nan}), "JSON compliant"),
    ("images of integers", ours_on(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)), "got images.dtype=torch.uint8"),
]
ONNX = [
    ("operator set of the past", exporting("model.onnx", opset=9), "got opset=9"),
    ("operator set of the future", exporting("model.onnx", opset=1000), "got opset=1000"),
    ("operator set as text", exporting("model.onnx", opset="20"), "got opset='20'"),
]
COMMANDS = [
    ("no checkpoint", export_of_no_checkpoint),
    ("no output", command_line()),
    ("batch that is no number", command_line("--output", "m.pt2", "--batch_size", "many")),
    ("check that is no number", command_line("--output", "m.pt2", "--check", "yes")),
    ("operator set that is no number", command_line("--output", "m.onnx", "--opset", "new")),
]


def _integer_heads() -> None:
    from transformers import AttentionInterface

    heads = torch.zeros(SHAPE, dtype=torch.int64)
    AttentionInterface()["ffvt"](vit().layers[0].attention, heads, heads, heads, None)


def _cases() -> list[Case]:
    cases = [Case("export", *row) for row in EXPORT] + [Case("export", *row, None) for row in COMMANDS]
    cases.append(Case("export", "weights that are not numbers", nan_weights, "logits", slow=True))
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        cases += [Case("export", *row) for row in ONNX]
    if importlib.util.find_spec("transformers"):
        cases += [Case("transformers", *row) for row in TRANSFORMERS]
        cases += [Case("transformers, fused", *row) for row in FUSION]
    return cases


CASES = _cases()
