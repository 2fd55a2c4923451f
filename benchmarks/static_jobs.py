"""What the compiler's report compiles: every row of the Triton kernels' tables, as Triton's compiler takes it.

A job is one kernel in one configuration for one architecture. Few of them stand for all (`representative`), and a hash
of the code behind each says which of them a change has touched (`changed`).
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import triton.language as tl
from triton.backends.compiler import GPUTarget

from ffvt.kernels import (
    attention_stats_triton,
    attention_vecmat_triton,
    gather_tokens_triton,
    maws_attention_backward_triton,
    maws_attention_triton,
    maws_select_triton,
    tuning,
)

TARGETS = {
    **{f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 86, 89, 90, 100)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp16": 2, "bf16": 2, "fp32": 4}
HEAD_DIMS = (32, 64, 80, 96, 128)
ATTENTION = {
    "forward": maws_attention_triton.attention_forward_kernel,
    "query_gradient": maws_attention_backward_triton.query_gradient_kernel,
    "key_gradient": maws_attention_backward_triton.key_gradient_kernel,
    "vecmat": attention_vecmat_triton.attention_vecmat_kernel,
}
KERNELS = {
    **ATTENTION,
    "log_sum_exp": maws_attention_triton.attention_forward_kernel,  # without values
    "class_lines": attention_stats_triton.class_lines_kernel,
    "class_logits": maws_select_triton.class_logits_kernel,
    "select": maws_select_triton.select_kernel,
    "gather": gather_tokens_triton.gather_kernel,
    "scatter": gather_tokens_triton.scatter_kernel,
}
FEW_TOKENS = (16, 64, 256)
QUICK_TARGETS = ("sm_80", "sm_90", "gfx942")
QUICK_HEAD_DIMS = {"fp16": 80, "bf16": 32, "fp32": 32}  # two column blocks a tile, and one; small ones compile fast

# Types of the kernels' arguments, in which * stands for a pointer to the dtype of the inputs and 1 for a stride of 1,
# which Triton compiles in. All else but the scales is i32.
HEADS = ("*", ("i32", "i32", "i32"))
TYPES = {
    **dict.fromkeys(("q", "k", "v", "do", "dq", "dk", "dv"), HEADS),
    **dict.fromkeys(("x", "grad"), ("*", ("i32", "i32", "1"))),
    **dict.fromkeys(("lse_ptr", "delta_ptr", "row_ptr", "col_ptr", "score_ptr"), "*fp32"),
    **dict.fromkeys(("weight_ptr", "product_ptr"), "*fp32"),
    **dict.fromkeys(("scale", "scale_log2"), "fp32"),
    "out_ptr": "*",
    "index": ("*i64", ("i32", "1")),
    "index_ptr": "*i64",
}
UNALIGNED = {"N", "H", "K", "first_candidate"}


@dataclass(frozen=True)
class Job:
    """One kernel in one configuration for one architecture."""

    name: str
    architecture: str
    dtype: str
    head_dim: int
    constants: tuple[tuple[str, int | None], ...]
    options: tuple[tuple[str, int], ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields of a record that say what is compiled."""
        plain = {"constants": dict(self.constants), "options": dict(self.options)}
        return {**asdict(self), **plain, "source": source_hash(self.name)}


def jobs() -> Iterator[Job]:
    """Every row of the tables that these architectures reach, at the usual head dimensions."""
    for arch in TARGETS:
        for dtype, size in DTYPES.items():
            for head_dim in HEAD_DIMS:
                for name in ATTENTION:
                    config = tuning.attention_config(name, arch, size, head_dim)
                    left_out = maws_attention_backward_triton.KEY_LAUNCHES[size] if name == "key_gradient" else (None,)
                    for gradient in left_out:
                        extra = {gradient: None} if gradient else {}
                        yield _job(name, arch, dtype, head_dim, {"D": head_dim, **extra}, config)
                lse_alone = {"D": head_dim, "v": None, "out_ptr": None}
                config = tuning.attention_config("log_sum_exp", arch, size, head_dim)
                yield _job("log_sum_exp", arch, dtype, head_dim, lse_alone, config)
                yield _job("class_logits", arch, dtype, head_dim, {"D": head_dim}, tuning.CLASS_LOGITS)
            yield _job("gather", arch, dtype, 0, {}, tuning.GATHER)
            yield _job("scatter", arch, dtype, 0, {}, tuning.SCATTER)
        for tokens in (*FEW_TOKENS, *tuning.SELECT):
            yield _job("class_lines", arch, "fp32", 0, {}, tuning.lines_config(tokens))
            for num_select in (12, 64):
                yield _job("select", arch, "fp32", 0, {}, tuning.select_config(arch, tokens, num_select))


def _job(name: str, arch: str, dtype: str, head_dim: int, extra: dict[str, Any], config: tuning.Config) -> Job:
    constants = {**extra, **config.constants}
    return Job(name, arch, dtype, head_dim, tuple(constants.items()), tuple(config.options.items()))


def representative(selected: Iterable[Job]) -> list[Job]:
    """One row per kernel, dtype and target of QUICK_TARGETS; two of the key gradient where it takes two launches."""
    found: dict[tuple, Job] = {}
    for job in selected:
        if job.architecture in QUICK_TARGETS and job.head_dim in (0, QUICK_HEAD_DIMS[job.dtype]):
            left_out = tuple(name for name, value in job.constants if value is None)
            found.setdefault((job.name, job.architecture, job.dtype, left_out), job)
    return list(found.values())


def changed(selected: Iterable[Job], recorded: Sequence[dict[str, Any]]) -> list[Job]:
    """The rows that are not recorded with the source that their kernel has now."""
    known = {_compiled(record) for record in recorded}
    return [job for job in selected if _compiled(job.to_dict()) not in known]


def of_jobs(selected: Iterable[Job], records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The record of each job with the source that its kernel has now, in the order of the jobs."""
    found = {_compiled(record): record for record in records}
    return [found[_compiled(job.to_dict())] for job in selected]


def _compiled(row: dict[str, Any]) -> str:
    """What was given to the compiler, as text."""
    fields = ("name", "architecture", "dtype", "head_dim", "constants", "options", "source")
    return json.dumps([row.get(field) for field in fields], sort_keys=True)


@cache
def source_hash(name: str) -> str:
    """Hash of a kernel's code and of all of this package that it uses; comments and docstrings do not count."""
    sources, waiting = {}, [KERNELS[name].fn]
    while waiting:
        function = waiting.pop()
        place = f"{function.__module__}.{function.__name__}"
        if place in sources:
            continue
        tree = ast.parse(inspect.getsource(function)).body[0]
        if ast.get_docstring(tree) is not None:
            del tree.body[0]
        sources[place] = ast.unparse(tree)
        for used in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
            value = function.__globals__.get(used)
            if isinstance(value, tl.constexpr):
                sources[f"{function.__module__}.{used}"] = repr(value.value)
            elif isinstance(value, type) and issubclass(value, tuple):
                sources[f"{function.__module__}.{used}"] = repr(value._fields)
            elif hasattr(value, "fn"):  # a device function, compiled or interpreted
                waiting.append(value.fn)
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:16]


def compiler_arguments(job: Job) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], list]]:
    """Signature, constants and attributes of a kernel as Triton's compiler takes them, the latter two by path."""
    given = dict(job.constants)
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}

    def convert(kind: Any, path: tuple[int, ...], aligned: bool) -> Any:
        if isinstance(kind, tuple):
            return tuple(convert(part, (*path, place), aligned) for place, part in enumerate(kind))
        if kind == "1":
            constants[path] = 1
            return "constexpr"
        if aligned and kind != "fp32":
            attributes[path] = [["tt.divisibility", 16]]
        return f"*{job.dtype}" if kind == "*" else kind

    for place, name in enumerate(KERNELS[job.name].arg_names):
        if name in given:
            constants[(place,)] = given[name]
            signature[name] = "constexpr"
        else:
            signature[name] = convert(TYPES.get(name, "i32"), (place,), name not in UNALIGNED)
    return signature, constants, attributes
