"""timm's models: names that are none, forged config.json and weights, models and calls that cannot be served."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import ffvt
from ffvt.model.registry import load_weights
from ffvt.train.options import TrainOptions
from tests.hostile.basics import Touch
from tests.hostile.case import Case

NAME = "vit_tiny_patch16_224"
SIZES = dict(image_size=32, num_classes=3, num_select=2, embed_dim=16, depth=2, num_heads=2)
MEMORY = 1 << 30  # bytes by which a refusal may grow the process


def model(name: str = NAME, **changes: Any) -> torch.nn.Module:
    return ffvt.create_model(f"timm:{name}", **{**SIZES, **changes})


def frugally(attempt: Callable[[Path], object]) -> Callable[[Path], object]:
    """The attempt, with an error of another kind where it takes memory for what it is asked to make."""

    def run(folder: Path) -> object:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            return attempt(folder)
        finally:
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            if grown > MEMORY:
                raise AssertionError(f"it took {grown} bytes")

    return run


def named(name: str) -> Callable[[Path], object]:
    return lambda folder: model(name)


def sized(name: str = NAME, **changes: Any) -> Callable[[Path], object]:
    return frugally(lambda folder: model(name, **changes))


def forged(**changes: Any) -> Callable[[Path], object]:
    """A saved model whose config.json has other values; a value of `...` takes the field out."""

    def attempt(folder: Path) -> object:
        model().save_pretrained(folder)
        fields = json.loads((folder / "config.json").read_text()) | changes
        kept = {name: value for name, value in fields.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))
        return ffvt.load_pretrained(folder)

    return frugally(attempt)


def written(text: bytes) -> Callable[[Path], object]:
    """A saved model whose config.json has other contents."""

    def attempt(folder: Path) -> object:
        model().save_pretrained(folder)
        (folder / "config.json").write_bytes(text)
        return ffvt.load_pretrained(folder)

    return frugally(attempt)


def with_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], object]:
    """A saved model whose weights are changed in place."""

    def attempt(folder: Path) -> object:
        model().save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")
        return ffvt.load_pretrained(folder)

    return frugally(attempt)


def without(file: str) -> Callable[[Path], object]:
    def attempt(folder: Path) -> object:
        model().save_pretrained(folder)
        (folder / file).unlink()
        return ffvt.load_pretrained(folder)

    return attempt


def truncated(folder: Path) -> None:
    model().save_pretrained(folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    ffvt.load_pretrained(folder)


def pickled(folder: Path) -> None:
    model().save_pretrained(folder)
    torch.save({"head.weight": Touch(folder / "escaped.txt")}, folder / "model.safetensors")
    ffvt.load_pretrained(folder)


def pickled_start(folder: Path) -> None:
    torch.save({"cls_token": Touch(folder / "escaped.txt")}, folder / "weights.pth")
    load_weights(model(), folder / "weights.pth")


def start(entries: Callable[[], dict[str, Any]], **changes: Any) -> Callable[[Path], object]:
    """Weights to start from."""
    return lambda folder: load_weights(model(**changes), entries(), "pretrained")


def timms(**changes: Any) -> dict[str, torch.Tensor]:
    return {name.removeprefix("vit."): t for name, t in model(feature_fusion=False, **changes).state_dict().items()}


def option(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: TrainOptions(**changes)


def recorded(name: str = NAME, training: bool = False, call: dict[str, Any] | None = None, **changes: Any):
    """A forward under record_attention."""

    def attempt(folder: Path) -> object:
        import timm

        vit = timm.create_model(name, img_size=32, embed_dim=16, depth=2, num_heads=2, **changes).train(training)
        with ffvt.record_attention(vit):
            return vit.forward_features(torch.zeros(1, 3, 32, 32), **(call or {}))

    return attempt


def fused(**changes: Any) -> Callable[[Path], object]:
    def attempt(folder: Path) -> object:
        import timm

        vit = timm.create_model(NAME, img_size=32, embed_dim=16, depth=2, num_heads=2, **changes)
        return ffvt.add_feature_fusion(vit, num_select=2)

    return attempt


def masked_batch(folder: Path) -> None:
    import timm

    naflex = timm.create_model("naflexvit_base_patch16_gap", embed_dim=16, depth=2, num_heads=2)
    with ffvt.record_attention(naflex):
        pass


def transposed(weights: dict[str, torch.Tensor]) -> None:
    weights["vit.cls_token"] = weights["vit.cls_token"].transpose(1, 2).contiguous()


def deep_json() -> bytes:
    return b'{"timm": ' + b"[" * 100000 + b"]" * 100000 + b"}"


GROUP = "timm"
CASES = [
    Case(GROUP, f"name: {what}", named(name), said)
    for what, name, said in [
        ("a letter off", "vit_tiny_patch16_244", "vit_tiny_patch16_224"),
        ("weights that it has not", f"{NAME}.openai", f"{NAME}.openai"),
        ("no ViT", "resnet50", "'resnet50'"),
        ("BEiT", "beit_base_patch16_224", "beit_base_patch16_224"),
        ("empty", "", "''"),
        ("the Hub's", "hf-hub:someone/model", "hf-hub:someone/model"),
        ("a local folder's", "local-dir:/tmp", "local-dir:/tmp"),
        ("a path", "../../etc/passwd", "../../etc/passwd"),
        ("code", "__import__('os').system('touch escaped.txt')", "__import__"),
        ("control letters", "vit\x1b[2J\n", "got 'vit"),
        ("a million letters", "v" * 1_000_000, "got 'vvv"),
        ("a wildcard", "vit_*", "vit_*"),
        ("capitals", "ViT_Tiny_Patch16_224", NAME),
    ]
]
CASES += [
    Case(GROUP, f"made with {what}", attempt, said)
    for what, attempt, said in [
        ("no class token", sized("vit_base_patch16_siglip_224"), "cls_token=None"),
        ("average pooling only", sized("vit_base_patch16_gap_224"), "cls_token=None"),
        ("parallel blocks", sized("vit_small_patch16_18x2_224"), "ParallelThingsBlock"),
        ("a side that patches do not divide", sized(image_size=40), "got image_size=40"),
        ("a side of less than a patch", sized(image_size=8), "image_size=8"),
        ("a side of a billion", sized(image_size=10**9), "got image_size=1000000000"),
        ("more picks than tokens", sized(num_select=6), "got num_select=6"),
        ("one block", sized(depth=1), "got depth=1"),
        ("heads that do not divide", sized(num_heads=3), "num_heads"),
        ("an option that it has not", sized(qkv_bias=False), "qkv_bias"),
        ("a first candidate behind the end", sized(first_candidate=5), "got first_candidate=5"),
        ("a dropout of 1", sized(dropout=1.0), "got dropout=1.0"),
    ]
]
CASES += [
    Case(GROUP, f"config.json: {what}", attempt, said)
    for what, attempt, said in [
        ("an unknown model", forged(timm="vit_unknown"), "vit_unknown"),
        ("another model", forged(timm="vit_tiny_patch16_384", embed_dim=32), "vit_tiny_patch16_384"),
        ("a giant", forged(timm="vit_7b_patch16_dinov3", embed_dim=None, depth=None, num_heads=None), "vit_7b"),
        ("a model of the Hub", forged(timm="hf-hub:someone/model"), "hf-hub:someone/model"),
        ("code as the name", forged(timm="__import__('os')"), "__import__"),
        ("a number as the name", forged(timm=7), "got timm=7"),
        ("a list as the name", forged(timm=[NAME]), "got timm=['vit"),
        ("null as the name", forged(timm=None), "got timm=None"),
        ("a depth of a billion", forged(depth=10**9), "got depth=1000000000"),
        ("a depth of a thousand", forged(depth=1000), "1000 blocks"),
        ("a width of 65,536", forged(embed_dim=65536), "model.safetensors"),
        ("a side of 65,536", forged(image_size=65536), "model.safetensors"),
        ("65,536 classes", forged(num_classes=65536), "head"),
        ("negative classes", forged(num_classes=-1), "got num_classes=-1"),
        ("a depth as text", forged(depth="2"), "got depth='2'"),
        ("a depth that is true", forged(depth=True), "got depth=True"),
        ("a dropout of NaN", forged(dropout=float("nan")), "got dropout=nan"),
        ("a switch as text", forged(feature_fusion="False"), "got feature_fusion='False'"),
        ("fusion switched off", forged(feature_fusion=False), "model.safetensors"),
        ("an attribute of Python", forged(__class__="os.system"), "__class__"),
        ("an argument of timm", forged(checkpoint_path="/etc/passwd"), "checkpoint_path"),
        ("pretrained asked for", forged(pretrained=True), "pretrained"),
        ("no image size", forged(image_size=...), "image_size"),
        ("not JSON", written(b"{'timm': 1}"), "config.json"),
        ("a list", written(b'["timm"]'), "holds a list"),
        ("empty", written(b""), "config.json"),
        ("not UTF-8", written(b'{"timm": "\xff"}'), "config.json"),
        ("nested 100,000 deep", written(deep_json()), "config.json"),
        ("two megabytes", written(b'{"timm": "' + b"v" * 2_000_000 + b'"}'), "more than 1048576 bytes"),
        ("missing", without("config.json"), "config.json"),
    ]
]
CASES += [
    Case(GROUP, f"model.safetensors: {what}", attempt, said)
    for what, attempt, said in [
        ("missing", without("model.safetensors"), "model.safetensors"),
        ("cut in half", truncated, "model.safetensors"),
        ("a pickle", pickled, "model.safetensors"),
        ("no head", with_weights(lambda weights: weights.pop("head.weight")), "head.weight"),
        ("one more tensor", with_weights(lambda weights: weights.update(more=torch.ones(1))), "more"),
        ("another shape", with_weights(transposed), "vit.cls_token"),
        ("whole numbers", with_weights(lambda w: w.update({"head.bias": w["head.bias"].int()})), "I32"),
    ]
]
CASES += [
    Case(GROUP, f"weights to start from: {what}", attempt, said)
    for what, attempt, said in [
        ("a pickle", pickled_start, "weights.pth"),
        ("another width", start(lambda: timms(embed_dim=32)), "the model has"),
        ("more blocks", start(lambda: timms(depth=3)), "blocks.2."),
        ("of DINOv3", start(lambda: timms(name="vit_small_patch16_dinov3")), "the model has no such parameter"),
        ("nothing of it", start(lambda: {"a": torch.ones(2)}), "none of its names"),
        ("empty", start(dict), "none of its names"),
        ("text", start(lambda: {"cls_token": "code"}), "none of its names"),
        ("positions of no square", start(lambda: timms() | {"pos_embed": torch.ones(1, 8, 16)}), "weights"),
        ("positions of one number", start(lambda: timms() | {"pos_embed": torch.ones(())}), "weights"),
    ]
]
CASES += [
    Case(GROUP, f"option: {what}", option(model_type=name), said)
    for what, name, said in [
        ("prefix alone", "timm:", "got model_type='timm:'"),
        ("blanks", "timm:a b", "got model_type='timm:a b'"),
        ("another prefix", "hf:vit", "got model_type='hf:vit'"),
    ]
]
CASES += [
    Case(GROUP, f"record_attention: {what}", attempt, said)
    for what, attempt, said in [
        ("a mask", recorded(call=dict(attn_mask=torch.ones(5, 5))), "got attn_mask"),
        ("causality", recorded(call=dict(is_causal=True)), "got is_causal"),
        ("dropout", recorded(training=True, attn_drop_rate=0.1), "got attn_drop"),
        ("no class token", recorded(class_token=False, global_pool="avg"), "cls_token=None"),
        ("two attentions in a block", recorded("vit_small_patch16_18x2_224"), "got 2 calls"),
        ("differential attention", recorded(attn_layer="diff"), "got 2 calls"),
        ("another class of timm", masked_batch, "got NaFlexVit"),
    ]
]
CASES += [
    Case(GROUP, f"fusion: {what}", attempt, said)
    for what, attempt, said in [
        ("attention dropout", fused(attn_drop_rate=0.1), "attn_drop=0.1"),
        ("patch dropout", fused(patch_drop_rate=0.1), "patch dropout"),
        ("differential attention", fused(attn_layer="diff"), "DiffAttention"),
    ]
]
