"""Forged folders of `save_pretrained`: config.json, model.safetensors, and what stands in their place."""

from __future__ import annotations

import functools
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

import ffvt
from tests.hostile.case import Case
from tests.hostile.memory import frugal

CONFIG, WEIGHTS = "config.json", "model.safetensors"
Forge = Callable[[Path], object]


@functools.cache
def intact() -> tuple[str, bytes]:
    """config.json and model.safetensors of a small model."""
    sizes = dict(image_size=64, num_classes=3, depth=3, num_select=2, embed_dim=32, num_heads=2, mlp_dim=48)
    model = ffvt.create_model("vit_s16", **sizes)
    return json.dumps(vars(model.config)), save(model.state_dict())


def loading(forge: Forge) -> Forge:
    """Saves a model, forges its folder, loads it with little memory."""

    def attempt(folder: Path) -> None:
        config, weights = intact()
        (folder / CONFIG).write_text(config)
        (folder / WEIGHTS).write_bytes(weights)
        forge(folder)
        with frugal():
            ffvt.FFVT.from_pretrained(folder)

    return attempt


def with_field(name: str, value: Any) -> Forge:
    return loading(lambda folder: (folder / CONFIG).write_text(json.dumps({**json.loads(intact()[0]), name: value})))


def with_config(text: str | bytes) -> Forge:
    return loading(lambda folder: (folder / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode()))


def with_tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Forge:
    return loading(lambda folder: (folder / WEIGHTS).write_bytes(save(change(load(intact()[1])))))


def with_weights(content: bytes | Callable[[], bytes]) -> Forge:
    return loading(lambda folder: (folder / WEIGHTS).write_bytes(content if isinstance(content, bytes) else content()))


def with_header(change: Callable[[dict[str, Any]], object]) -> Forge:
    """A safetensors file whose header was changed, its data not."""

    def forge(folder: Path) -> None:
        content = intact()[1]
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        change(header)
        (folder / WEIGHTS).write_bytes(safetensors(header, content[8 + length :]))

    return loading(forge)


def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def instead(name: str, make: Forge) -> Forge:
    """Something else in place of a file."""

    def forge(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return loading(forge)


def sparse_giant(path: Path) -> None:
    """128 MB of positions, of which nothing lies on the disk."""
    rows = 1 << 20
    with path.open("wb") as file:
        file.write(
            safetensors({"pos_embed": {"dtype": "F32", "shape": [1, rows, 32], "data_offsets": [0, rows * 128]}})
        )
        file.truncate(file.tell() + rows * 128)


FIELDS = [
    *(("depth", value) for value in (10**9, 10**4000, 0, -1, "3", 3.0, None, True, [3], {})),
    *(("embed_dim", value) for value in (10**9, 0, -32, 33, "32")),
    *(("image_size", value) for value in (10**9, 65, 0, 64.0)),
    *(("patch_size", value) for value in (0, 10**9, 7, None)),
    *(("num_classes", value) for value in (10**12, 0, "three", 1.5)),
    *(("num_heads", value) for value in (3, 10**9, 0)),
    *(("mlp_dim", value) for value in (10**9, "48")),
    *(("num_select", value) for value in (10**9, 0, 2.0, "2")),
    *(("first_candidate", value) for value in (-1, 10**9, False)),
    *(("feature_fusion", value) for value in ("no", 1, None)),
    *(("dropout", value) for value in (float("nan"), "0.1", 1, -0.1, 10**400)),
    *(("layer_scale", value) for value in (True, float("inf"), "1", 10**400)),
    *(("backbone", value) for value in ("r101", ["r50"], 50)),
    *(("qkv_bias", 0), ("prune_dead_rows", "yes"), ("gradient_checkpointing", {})),
]
OTHER_SIZES = [("depth", 256), ("embed_dim", 1 << 20), ("image_size", 1 << 20), ("num_classes", 1 << 24)]
OTHER_SIZES += [("mlp_dim", 1 << 20), ("patch_size", 32), ("depth", 2), ("feature_fusion", False), ("qkv_bias", False)]
OTHER_SIZES += [("layer_scale", 0.5), ("num_classes", 4)]
TEXTS = {
    "empty": ("", "Expecting value"),
    "cut in half": (b'{"image_size": 64, "patch', "Unterminated string"),
    "not UTF-8": (b'{"image_size": "\xff"}', "can't decode byte 0xff"),
    "UTF-16": ('{"image_size": 64}'.encode("utf-16"), "can't decode"),
    "a list": ("[]", "holds a list"),
    "a string": ('"vit"', "holds a str"),
    "null": ("null", "holds a NoneType"),
    "a number of 5,000 digits": ('{"depth": ' + "9" * 5000 + "}", "Exceeds the limit"),
    "lists in lists, 100,000 deep": ("[" * 100_000, "recursion"),
    "objects in objects, 50,000 deep": ('{"a":' * 50_000 + "1" + "}" * 50_000, "recursion"),
    "2 MB": (" " * (2 << 20), "more than 1048576 bytes"),
    "no fields": ("{}", "lacks image_size"),
    "escape codes as a name": ('{"\\u001b[2J": 1}', "lacks"),
    "a name of 100 kB": (json.dumps({"a" * 100_000: 1}), "lacks"),
    "of transformers": ('{"model_type": "vit", "hidden_size": 384}', "got one of 'vit'"),
    "of timm": ('{"architecture": "vit_base_patch16_224"}', "got one of 'vit_base_patch16_224'"),
}
TENSORS = {
    "head missing": (lambda t: {n: v for n, v in t.items() if "head" not in n}, "it lacks head."),
    "head bias missing": (lambda t: {n: v for n, v in t.items() if n != "head.bias"}, "it lacks head.bias"),
    "head of other classes": (lambda t: {**t, "head.weight": torch.zeros(9, 32)}, "head.weight (9, 32), not (3, 32)"),
    "head transposed": (lambda t: {**t, "head.weight": torch.zeros(32, 3)}, "head.weight (32, 3)"),
    "fusion block missing": (lambda t: {n: v for n, v in t.items() if "last" not in n}, "it lacks last_block."),
    "one block more": (lambda t: {**t, "blocks.2.norm1.bias": torch.zeros(32)}, "unknown blocks.2.norm1.bias"),
    "block number of 300 digits": (lambda t: {**t, f"blocks.{'9' * 300}.x": torch.zeros(1)}, "unknown blocks.999"),
    "escape codes as a name": (lambda t: {**t, "\x1b]0;x\x07": torch.zeros(1)}, "\\x1b]0;x"),
    "name of 1 MB": (lambda t: {**t, "x" * (1 << 20): torch.zeros(1)}, "unknown xxx"),
    "1,000 unknown names": (lambda t: {**t, **{f"x{n}": torch.zeros(1) for n in range(1000)}}, "and 998 more"),
    "scalar positions": (lambda t: {**t, "pos_embed": torch.zeros(())}, "pos_embed ()"),
    "no positions": (lambda t: {**t, "pos_embed": torch.zeros(1, 0, 32)}, "pos_embed (1, 0, 32)"),
    "nothing": (lambda t: {}, "it lacks"),
    "all integers": (lambda t: {n: v.int() for n, v in t.items()}, "in I32"),
    "one bool": (lambda t: {**t, "norm.bias": t["norm.bias"] > 0}, "norm.bias in BOOL"),
    "one complex": (lambda t: {**t, "norm.bias": t["norm.bias"].to(torch.complex64)}, "norm.bias in C64"),
    "one in 8 bits": (lambda t: {**t, "norm.bias": t["norm.bias"].to(torch.float8_e4m3fn)}, "norm.bias in F8_E4M3"),
    "weights of timm's shape": (lambda t: {f"model.{n}": v for n, v in t.items()}, "unknown model."),
}
HEADERS = {
    "offsets overlap": lambda h: h["head.bias"].update(data_offsets=[0, 12]),
    "offsets beyond the end": lambda h: h["head.bias"].update(data_offsets=[10**9, 10**9 + 12]),
    "offsets backwards": lambda h: h["head.bias"].update(data_offsets=[12, 0]),
    "negative shape": lambda h: h["head.bias"].update(shape=[-3]),
    "shape of 1e18": lambda h: h["head.bias"].update(shape=[10**9, 10**9]),
    "shape that overflows": lambda h: h["head.bias"].update(shape=[1 << 62, 1 << 62]),
    "shape larger than its data": lambda h: h["head.bias"].update(shape=[4]),
    "shape no list": lambda h: h["head.bias"].update(shape=3),
    "unknown dtype": lambda h: h["head.bias"].update(dtype="F31"),
    "no dtype": lambda h: h["head.bias"].pop("dtype"),
    "dtype of twice the size": lambda h: h["head.bias"].update(dtype="F64"),
    "entry a number": lambda h: h.update(extra=1),
    "metadata a list": lambda h: h.update(__metadata__=[1]),
}
RAW = {
    "empty": b"",
    "eight bytes": bytes(8),
    "header of 2^63 bytes": struct.pack("<Q", 1 << 63) + b"{}",
    "header longer than the file": struct.pack("<Q", 1 << 20) + b"{}",
    "header no JSON": safetensors(b"{{{{"),
    "header not UTF-8": safetensors(b'{"\xff":1}'),
    "header nested 100,000 deep": safetensors(b'{"a":' * 100_000),
    "cut in half": lambda: intact()[1][: len(intact()[1]) // 2],
    "last byte missing": lambda: intact()[1][:-1],
    "bytes behind the end": lambda: intact()[1] + b"more",
    "a page of HTML": b"<!DOCTYPE html><html><body>404</body></html>",
    "a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}
FILES = {
    "config a pipe": (CONFIG, os.mkfifo, "a pipe, device or socket"),
    "config a folder": (CONFIG, Path.mkdir, "config.json"),
    "config missing": (CONFIG, lambda path: None, "config.json"),
    "config a link to itself": (CONFIG, lambda path: path.symlink_to(path), "which has none"),
    "config a link to nothing": (CONFIG, lambda path: path.symlink_to("nothing"), "config.json"),
    "config a link to /dev/zero": (CONFIG, lambda path: path.symlink_to("/dev/zero"), "a pipe, device or socket"),
    "weights a pipe": (WEIGHTS, os.mkfifo, "a pipe, device or socket"),
    "weights a folder": (WEIGHTS, Path.mkdir, "model.safetensors"),
    "weights missing": (WEIGHTS, lambda path: None, "model.safetensors"),
    "weights a link to /dev/zero": (WEIGHTS, lambda path: path.symlink_to("/dev/zero"), "a pipe, device or socket"),
    "weights of 128 MB": (WEIGHTS, sparse_giant, "pos_embed (1, 1048576, 32)"),
}


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else f"10**{len(str(value)) - 1}"
    return f"{type(value).__name__} {text}"


CASES = [
    *(Case("model", f"config.json: {name} = {_shown(value)}", with_field(name, value), name) for name, value in FIELDS),
    *(
        Case("model", f"config.json of another model: {name} = {value}", with_field(name, value), WEIGHTS)
        for name, value in OTHER_SIZES
    ),
    *(Case("model", f"config.json: {name}", with_config(text), told) for name, (text, told) in TEXTS.items()),
    *(Case("model", f"saved weights: {name}", with_tensors(change), told) for name, (change, told) in TENSORS.items()),
    *(Case("model", f"saved header: {name}", with_header(change), WEIGHTS) for name, change in HEADERS.items()),
    *(Case("model", f"saved file: {name}", with_weights(content), WEIGHTS) for name, content in RAW.items()),
    *(Case("model", f"saved folder: {name}", instead(file, make), told) for name, (file, make, told) in FILES.items()),
]
