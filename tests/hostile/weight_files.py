"""Files and mappings for `load_weights`: damaged, forged, of another kind; names of the Hub; sizes that do not fit."""

from __future__ import annotations

import argparse
import functools
import gzip
import io
import json
import os
import pickle
import socket
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

import ffvt
from tests.hostile.basics import Touch
from tests.hostile.case import Case
from tests.hostile.memory import frugal
from tests.hostile.saved_models import HEADERS, safetensors


@functools.cache
def model() -> torch.nn.Module:
    sizes = dict(image_size=64, num_classes=3, depth=3, num_select=2, embed_dim=32, num_heads=2, mlp_dim=48)
    return ffvt.create_model("vit_s16", **sizes)


def refusing(source: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Loads what `source` makes in a folder, with little memory, and looks whether the model was touched."""

    def attempt(folder: Path) -> None:
        given = source(folder)
        before = {name: value.clone() for name, value in model().state_dict().items()}
        try:
            with frugal():
                ffvt.load_weights(model(), given)
        finally:
            touched = [name for name, value in model().state_dict().items() if not torch.equal(value, before[name])]
            if touched:
                raise RuntimeError(f"the model was changed: {touched}")

    return attempt


def file(name: str, write: bytes | Callable[[Path], object]) -> Callable[[Path], None]:
    """A file of this content, or written by a function."""

    def source(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(write) if isinstance(write, bytes) else write(path)
        return path

    return refusing(source)


def container(kind: str) -> bytes:
    """The model's weights in a container."""
    state, buffer = model().state_dict(), io.BytesIO()
    if kind == "safetensors":
        return save(state)
    if kind == "npz":
        np.savez(buffer, **{name: value.numpy() for name, value in state.items()})
    else:
        torch.save(state, buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


def cut(kind: str, share: float) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(container(kind)[: int(len(container(kind)) * share)])


def flipped(kind: str, share: float) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        content = bytearray(container(kind))
        content[int(len(content) * share)] ^= 0xFF
        path.write_bytes(content)

    return write


def saved(value: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(value, path)


def arrays(**given: Any) -> Callable[[Path], object]:
    return lambda path: np.savez(path, **given)


def npy_with_header(header: str) -> Callable[[Path], object]:
    """An .npz whose one member, the class token, has this header and 16 bytes of data."""

    def write(path: Path) -> None:
        text = header.encode() + b"\n"
        content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(16)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("cls.npy", content)

    return write


def bomb(path: Path) -> None:
    """10 GB of zeros in 10 MB: one compressed megabyte, again and again."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    megabyte = squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    data = megabyte * (10 << 10) + squeeze.flush()
    info = zipfile.ZipInfo("cls.npy")
    info.compress_type, info.CRC, info.header_offset = zipfile.ZIP_DEFLATED, 0, 0
    info.compress_size, info.file_size = len(data), 10 << 30
    with zipfile.ZipFile(path, "w") as archive:
        archive.fp.write(info.FileHeader(zip64=True) + data)
        archive.filelist.append(info)
        archive.NameToInfo[info.filename], archive.start_dir, archive._didModify = info, archive.fp.tell(), True


def script(path: Path) -> None:
    with warnings.catch_warnings():  # TorchScript is deprecated, its files are about
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path.relative_to(Path.cwd())) if len(str(path)) > 100 else str(path))


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        content = container("safetensors")
        length = struct.unpack("<Q", content[:8])[0]
        found = json.loads(content[8 : 8 + length])
        change(found)
        path.write_bytes(safetensors(found, content[8 + length :]))

    return write


def state(**changes: torch.Tensor | None) -> dict[str, Any]:
    """The model's state dict with other values of some entries; None leaves one out."""
    names = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in {**model().state_dict(), **names}.items() if value is not None}


def picture(path: Path) -> None:
    Image.new("RGB", (8, 8)).save(path, "PNG")


KINDS = ("npz", "zip", "legacy", "safetensors")
DAMAGED = {f"{kind} cut at {share:.0%}": ("w.bin", cut(kind, share)) for kind in KINDS for share in (0.02, 0.5, 0.99)}
DAMAGED |= {f"{kind}, a byte of its start flipped": ("w.bin", flipped(kind, 0.0002)) for kind in ("npz", "safetensors")}
DAMAGED |= {"npz, a byte of an array flipped": ("w.npz", flipped("npz", 0.5))}
FORGED = {
    "npz of 10 GB in 10 MB": ("bomb.npz", bomb),
    "npz array of 4 TB in 16 bytes": (
        "w.npz",
        npy_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }"),
    ),
    "npz array of a negative size": (
        "w.npz",
        npy_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-4,), }"),
    ),
    "npz array whose header is code": ("w.npz", npy_with_header("__import__('os').system('touch escaped.txt')")),
    "npz array of objects by its header": (
        "w.npz",
        npy_with_header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"),
    ),
    "npz array with a header nested 1,000 deep": ("w.npz", npy_with_header("(" * 1000)),
    "npz of other names": ("w.npz", arrays(weights=np.zeros(3, np.float32))),
    "npz of nothing": ("w.npz", arrays()),
    "npz of strings": ("w.npz", arrays(cls=np.array(["a", "b"]))),
    "npz of dates": ("w.npz", arrays(cls=np.zeros(3, "M8[s]"))),
    "npz of complex numbers": ("w.npz", arrays(cls=np.zeros((1, 1, 32), complex))),
    "npz of escape codes": ("w.npz", arrays(**{"\x1b[31mred": np.zeros(1, np.float32)})),
    "npz of a structure": ("w.npz", arrays(cls=np.zeros(2, [("a", "f4"), ("b", "f4")]))),
    "pickle in the old format": ("w.bin", pickle.dumps({"head.weight": Touch(Path("escaped.txt"))}, 2)),
    "pickle beside tensors": (
        "w.bin",
        saved({**{"cls_token": torch.zeros(1, 1, 32)}, "x": Touch(Path("escaped.txt"))}),
    ),
    "pickle of options": ("w.pth", saved({"args": argparse.Namespace(lr=1)})),
    "a whole model": ("w.pt", saved(torch.nn.Linear(2, 2))),
    "a list of tensors": ("w.pt", saved([torch.zeros(2)])),
    "a tensor": ("w.pt", saved(torch.zeros(2))),
    "a number": ("w.pt", saved(3)),
    "an empty state dict": ("w.pt", saved({})),
    "numbers for names": ("w.pt", saved({1: torch.zeros(2)})),
    "an optimiser's state": ("w.pt", saved(torch.optim.SGD([torch.zeros(2, requires_grad=True)]).state_dict())),
    "a program of TorchScript": ("w.pt", script),
    "a picture": ("w.npz", picture),
    "a zip without weights": ("w.zip", lambda path: zipfile.ZipFile(path, "w").writestr("readme.txt", "x")),
    "gzip of a state dict": ("w.pt.gz", lambda path: path.write_bytes(gzip.compress(container("zip")))),
    "one .npy": ("w.npy", lambda path: np.save(path, np.zeros(3, np.float32))),
    "text": ("w.npz", b"not an archive\n" * 100),
    "one letter": ("w.npz", b"x"),
    "zeros": ("w.npz", bytes(100_000)),
    "escape codes in the file's name": ("\x1b[2J.npz", b"x"),
    "a name of 200 letters": ("n" * 200 + ".npz", b"x"),
}
NOT_FILES = {
    "a pipe": (lambda folder: _made(os.mkfifo, folder / "pipe.npz"), "pipe.npz"),
    "a socket": (lambda folder: _made(listening, folder / "s"), "a pipe, device or socket"),
    "/dev/zero": (lambda folder: "/dev/zero", "'/dev/zero', a pipe, device or socket"),
    "/dev/null": (lambda folder: "/dev/null", "'/dev/null', a pipe, device or socket"),
    "an empty folder": (lambda folder: folder, "a folder with model.safetensors"),
    "a link to nothing": (lambda folder: _made(lambda path: path.symlink_to("no"), folder / "link.npz"), "link.npz"),
    "a link to itself": (lambda folder: _made(lambda path: path.symlink_to(path), folder / "link.npz"), "link.npz"),
    "nothing there": (lambda folder: folder / "nothing.npz", "nothing.npz"),
    "a file for a folder": (lambda folder: _made(Path.touch, folder / "file") / "w.npz", "file/w.npz"),
    "a NUL in its name": (lambda folder: "a\0b.npz", "a\\x00b.npz"),
    "a name of 100,000 letters": (lambda folder: "n" * 100_000 + ".npz", "nnn"),
    "timm's name with escape codes": (lambda folder: "timm:\x1b[2J", "\\x1b[2J"),
    "timm's name of 100,000 letters": (lambda folder: "timm:" + "n" * 100_000, "nnn"),
    "a repository that leads outside": (lambda folder: "hf:../..", "../.."),
    "a repository of three parts": (lambda folder: "hf:a/b/c", "hf:a/b/c"),
    "a repository with escape codes": (lambda folder: "hf:a/\x1b[2J", "\\x1b[2J"),
}
VALUES = {
    "class token of another width": (lambda: state(cls_token=torch.zeros(1, 1, 33)), "cls_token: (1, 1, 33)"),
    "class token of another rank": (lambda: state(cls_token=torch.zeros(32)), "cls_token: (32,)"),
    "positions that are no square": (lambda: state(pos_embed=torch.zeros(1, 8, 32)), "got 8 positions"),
    "no positions at all": (lambda: state(pos_embed=torch.zeros(1, 0, 32)), "got 0 positions"),
    "a model that is wider": (lambda: state(patch_embed__proj__weight=torch.zeros(64, 3, 16, 16)), "embed_dim=64"),
    "patches of another size": (lambda: state(patch_embed__proj__weight=torch.zeros(32, 3, 8, 8)), "patch_size=8"),
    "patches that are no square": (
        lambda: state(patch_embed__proj__weight=torch.zeros(32, 3, 8, 16)),
        "(32, 3, 8, 16)",
    ),
    "patches of four colours": (lambda: state(patch_embed__proj__weight=torch.zeros(32, 4, 16, 16)), "(32, 4, 16, 16)"),
    "a hidden layer of another size": (lambda: state(blocks__0__mlp__fc1__weight=torch.zeros(99, 32)), "mlp_dim=99"),
    "a block too many": (lambda: state(blocks__2__norm1__bias=torch.zeros(32)), "depth=4"),
    "a block number of 100 digits": (lambda: {f"blocks.{'9' * 100}.norm1.bias": torch.zeros(32)}, "blocks.999"),
    "a block number of 5,000 digits": (lambda: {f"blocks.{'9' * 5000}.norm1.bias": torch.zeros(32)}, "blocks.999"),
    "a sparse tensor": (lambda: state(norm__bias=torch.zeros(32).to_sparse()), "norm.bias"),
    "a tensor without values": (lambda: state(norm__bias=torch.zeros(32, device="meta")), "norm.bias"),
    "integers": (lambda: state(norm__bias=torch.zeros(32, dtype=torch.int64)), "norm.bias"),
    "a list": (lambda: state(norm__bias=[0.0] * 32), "norm.bias"),
    "an array of objects": (lambda: state(norm__bias=np.array([None] * 32)), "norm.bias"),
    "no class token": (lambda: state(cls_token=None), "a class token"),
    "registers": (lambda: state(reg_token=torch.zeros(1, 4, 32)), "'reg_token'"),
    "a norm before the blocks": (lambda: state(norm_pre__weight=torch.zeros(32)), "'norm_pre.weight'"),
    "LayerScale": (lambda: state(blocks__0__ls1__gamma=torch.ones(32)), "layer_scale=None"),
    "a block's part of 10,000 letters": (
        lambda: state(**{f"blocks__0__{'x' * 10_000}": torch.ones(1)}),
        "blocks.0.xxx",
    ),
    "a block's part of escape codes": (lambda: state(**{"blocks__0__\x1b[2J": torch.ones(1)}), "blocks.0.\\x1b[2J"),
    "20,000 unknown names": (lambda: {f"x{n}": torch.zeros(1) for n in range(20_000)}, "got entries 'x0'"),
}


def _made(make: Callable[[Path], object], path: Path) -> Path:
    make(path)
    return path


def _named(name: str) -> str:
    """What a message says of a file of this name."""
    return name if name.isprintable() and len(name) < 50 else {"\x1b": "\\x1b[2J.npz", "n": "nnnn"}[name[0]]


FILES = DAMAGED | FORGED
FILES |= {f"safetensors: {name}": ("w.safetensors", header(change)) for name, change in HEADERS.items()}
CASES = [
    *(Case("weights", name, file(path, write), _named(path)) for name, (path, write) in FILES.items()),
    *(Case("weights", f"source: {name}", refusing(source), told) for name, (source, told) in NOT_FILES.items()),
    *(
        Case("weights", f"mapping: {name}", refusing(lambda _, make=make: make()), told)
        for name, (make, told) in VALUES.items()
    ),
]
