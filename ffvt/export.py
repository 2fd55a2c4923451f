"""A model as one file for other run times, compared with it before it is written: ONNX, or a torch.export program.

Both hold plain operations only (`kernels/decompositions.py`), so that neither needs this package to run.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ffvt.errors import as_integer, require
from ffvt.export_check import Comparison, compare
from ffvt.files import write_whole
from ffvt.kernels.decompositions import decompositions
from ffvt.model.ffvt import ViT
from ffvt.model.selection import SelectingModel
from ffvt.model.timm_base import OfTimm

if TYPE_CHECKING:
    from ffvt.inference import Classifier

NAME = "export_model"
FACTS = "ffvt"  # where a file keeps its facts, as JSON
OLDEST_OPSET = 18  # of what PyTorch's exporter writes
LARGEST_ONNX = 2**31 - 1  # bytes of a Protocol Buffers message


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it compares with the model.

    Attributes:
        path: the file.
        num_bytes: its size.
        images: shape of its input; "batch" where any batch size is taken.
        compared: how the file compares with the model on random images; None where they were not compared.
    """

    path: Path
    num_bytes: int
    images: tuple[str | int, ...]
    compared: Comparison | None

    def summary(self) -> str:
        shape = ", ".join(map(str, self.images))
        lines = [f"{self.path}: {self.num_bytes / 1e6:.1f} MB, takes images ({shape}), fp32"]
        lines.append(self.compared.summary() if self.compared else "not compared with the model")
        return "\n".join([*lines, f"to run it: {_FORMATS[self.path.suffix].usage.format(path=str(self.path))}"])


def export_model(
    model: nn.Module,
    path: str | Path,
    *,
    image_size: int | None = None,
    with_selection: bool = False,
    batch_size: int | None = None,
    opset: int | None = None,
    check: int = 8,
    facts: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Writes a model as one file that other run times load, after comparing the two.

    The file appears only once its logits, computed by onnxruntime or by the loaded program, are the model's to 1e-4 of
    the largest one, and its picks the model's wherever these do not hang on rounding.

    Args:
        model: an `FFVT`, a plain `ViT`, what `add_feature_fusion` returns, or a plain `create_model("timm:NAME")`;
            fp32. It is not changed.
        path: `.onnx` for ONNX, `.pt2` for a program that `torch.export.load` reads. An older file is replaced.
        image_size: S, pixels; by default what the model was built for.
        with_selection: whether the file also returns `index` (B, L-1, K) int64 and `score` (B, L-1, N) fp32.
        batch_size: B, if the file is to take no other; None for any.
        opset: ONNX operator set; None for PyTorch's choice.
        check: random images to compare the file and the model on, beside batches of 1 and 3; 0 writes it unchecked.
        facts: what else the file has to say, as JSON has it: classes, mean, std. Its "image_size" is added. In ONNX
            they are the metadata property "ffvt", in a program the extra file "ffvt".

    Returns:
        What was written and compared.

    Raises:
        ValueError: an argument does not hold, the file would be too large for ONNX, or the two differ.
        TypeError: not such a model, or not fp32.
        ImportError: what ONNX needs is missing.
        OSError: the file cannot be written.
    """
    path = Path(path)
    check = as_integer(NAME, "check", check)
    require(check >= 0, NAME, "check", "0 or positive", check)
    if batch_size is not None:
        batch_size = as_integer(NAME, "batch_size", batch_size)
        require(batch_size >= 1, NAME, "batch_size", "positive", batch_size)
    form, opset = _check_target(path, opset, check)
    _check_model(model, with_selection)
    image_size = as_integer(NAME, "image_size", _built_for(model) if image_size is None else image_size)
    require(image_size >= 1, NAME, "image_size", "positive", image_size)
    traced = _Traced(copy.deepcopy(model).cpu(), with_selection).eval()
    facts = json.dumps({**(facts or {}), "image_size": image_size}, allow_nan=False)
    program = _trace(traced, image_size, batch_size)
    content = form.write(program, facts, opset)
    sizes = (batch_size,) if batch_size else (1, 3, check)
    compared = compare(traced.model, form.load(content), image_size, sizes) if check else None
    write_whole(path, content)
    return ExportReport(path, len(content), (batch_size or "batch", 3, image_size, image_size), compared)


def export_classifier(classifier: Classifier, path: str | Path, **options: Any) -> ExportReport:
    """`export_model` of a trained classifier, with all that its images go through among the facts of the file.

    The facts: "classes" in the order of the logits; "resize_size", to whose square an image is resized, bilinear, as
    "fit" says (`to_square`), before its middle `image_size` x `image_size` is taken, or, with "whole", all of it is
    resized to that; "upright", whether an image is first turned as its EXIF orientation says; "mean" and "std" of the
    channels R, G, B, after a division by 255.
    """
    recipe = classifier.recipe
    facts = {
        "classes": classifier.classes,
        "upright": True,
        "fit": classifier.fit,
        "resize_size": classifier.facts["resize_size"],
        "whole": recipe.whole,
        "mean": recipe.mean,
        "std": recipe.std,
    }
    return export_model(classifier.model, path, facts=facts, **options)


def load_exported(path: str | Path) -> Callable[[Tensor], list[Tensor]]:
    """An exported file as a function on the CPU: images (B, 3, S, S) fp32 -> [logits], or [logits, index, score]."""
    path = Path(path)
    return _FORMATS[path.suffix].load(path.read_bytes())


class _Format(NamedTuple):
    """How a file is made and run."""

    write: Callable[[ExportedProgram, str, int | None], bytes]
    load: Callable[[bytes], Callable[[Tensor], list[Tensor]]]
    usage: str


class _Traced(nn.Module):
    """Images (B, 3, S, S) -> logits, and with_selection index and score: what is exported."""

    def __init__(self, model: nn.Module, with_selection: bool) -> None:
        super().__init__()
        self.model, self.with_selection = model, with_selection

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.with_selection:
            logits, selection = self.model.forward_with_selection(images)
            return logits, selection.index, selection.score
        if isinstance(self.model, SelectingModel):  # a fused model of transformers wraps its logits
            return (self.model.head(self.model.forward_features(images)),)
        return (self.model(images),)


def _check_target(path: Path, opset: int | None, check: int) -> tuple[_Format, int | None]:
    must = f"a file that ends in {' or '.join(_FORMATS)}"
    require(path.suffix in _FORMATS and not path.is_dir(), NAME, "path", must, str(path))
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{NAME}: path must be in a folder that is there; got path={path!r}")
    if path.suffix != ".onnx":
        require(opset is None, NAME, "opset", "left out but for .onnx", opset)
        return _FORMATS[path.suffix], None
    try:
        import onnx
        import onnxscript  # noqa: F401  PyTorch's exporter writes with it
    except ImportError as error:
        raise ImportError(f"{NAME}: .onnx needs onnx and onnxscript: pip install 'ffvt[onnx]'") from error
    if check:
        try:
            import onnxruntime  # noqa: F401
        except ImportError as error:
            do = "pip install 'ffvt[onnx]', or pass check=0 to write it without a comparison"
            raise ImportError(f"{NAME}: comparing an .onnx file needs onnxruntime: {do}") from error
    if opset is not None:
        newest, opset = onnx.defs.onnx_opset_version(), as_integer(NAME, "opset", opset)
        require(OLDEST_OPSET <= opset <= newest, NAME, "opset", f"in [{OLDEST_OPSET}, {newest}]", opset)
    return _FORMATS[path.suffix], opset


def _check_model(model: nn.Module, with_selection: bool) -> None:
    if not isinstance(model, (ViT, SelectingModel, OfTimm)):
        raise TypeError(f"{NAME}: model must be one of this package's; got a {type(model).__name__}")
    others = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if others:
        raise TypeError(f"{NAME}: model must be fp32 (model.float()); got {others.pop()}")
    selects = isinstance(model, SelectingModel)
    require(selects or not with_selection, NAME, "with_selection", "False for a plain ViT", with_selection)


def _built_for(model: nn.Module) -> int | None:
    """Side of the square images that a model of ours, of timm's or of transformers' was built for."""
    vit = getattr(model, "vit", model)
    config = getattr(vit, "config", None)
    size = config.image_size if config is not None else vit.patch_embed.img_size
    sides = {size} if isinstance(size, int) else set(size or ())
    require(len(sides) == 1, NAME, "image_size", "given, the model does not name one", size)
    return sides.pop()


def _trace(model: nn.Module, image_size: int, batch_size: int | None) -> ExportedProgram:
    images = torch.zeros(batch_size or 2, 3, image_size, image_size)
    shapes = None if batch_size else ({0: Dim("batch", min=1, max=2**16)},)
    with torch.no_grad():
        return torch.export.export(model, (images,), dynamic_shapes=shapes).run_decompositions(decompositions())


def _write_onnx(program: ExportedProgram, facts: str, opset: int | None) -> bytes:
    names = ["logits", "index", "score"][: len(program.graph_signature.user_outputs)]
    exported = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        opset_version=opset,
        input_names=["images"],
        output_names=names,
        dynamic_shapes=({0: "batch"},) if program.range_constraints else None,  # names the dimension
    )
    proto = exported.model_proto
    proto.metadata_props.add(key=FACTS, value=facts)
    size = proto.ByteSize()
    require(size <= LARGEST_ONNX, NAME, "path", f".pt2, ONNX has no file of {size / 1e9:.1f} GB", ".onnx")
    return proto.SerializeToString()


def _load_onnx(content: bytes) -> Callable[[Tensor], list[Tensor]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(found) for found in session.run(None, {"images": images.numpy()})]


def _write_program(program: ExportedProgram, facts: str, opset: int | None) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={FACTS: facts})
    return file.getvalue()


def _load_program(content: bytes) -> Callable[[Tensor], list[Tensor]]:
    module = torch.export.load(io.BytesIO(content)).module()
    return lambda images: list(module(images))


_FORMATS = {
    ".onnx": _Format(
        _write_onnx,
        _load_onnx,
        "onnxruntime.InferenceSession({path!r}).run(None, {{'images': images}})",
    ),
    ".pt2": _Format(_write_program, _load_program, "torch.export.load({path!r}).module()(images)"),
}
