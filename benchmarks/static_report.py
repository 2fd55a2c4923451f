"""Compiles every row of the Triton kernels' tables ahead of time and reads the binaries: no GPU needed.

    python -m benchmarks.static_report            compile all, rewrite the results and DESIGN.md
    python -m benchmarks.static_report --update   the same, compiling only the rows whose code or configuration changed
    python -m benchmarks.static_report --check    compile all; exit 1 where the file differs or a kernel spills
    python -m benchmarks.static_report --quick    check one row per kernel, dtype and GPU, and rows whose code changed
    python -m benchmarks.static_report --stale    compile nothing; exit 1 where the code of a kernel changed since

Head dimensions 32, 64, 80, 96, 128, aligned strides; selection of 12 and 64 tokens. Per kernel, architecture, dtype and
head dimension: registers, stack (spills), shared memory, warps, how many programs fit on one multiprocessor, how many
matrix instructions the binary holds, and a hash of the kernel's source. Another Triton version is measured by putting
it first on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.compiler import ASTSource

from benchmarks.static_jobs import (
    ATTENTION,
    DTYPES,
    KERNELS,
    TARGETS,
    Job,
    changed,
    compiler_arguments,
    jobs,
    of_jobs,
    representative,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DESIGN = ROOT / "DESIGN.md"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

LIMITS = {  # per multiprocessor: registers, bytes of shared memory, threads, programs
    "sm_80": (65536, 164 * 1024, 2048, 32),
    "sm_86": (65536, 100 * 1024, 1536, 16),
    "sm_89": (65536, 100 * 1024, 1536, 24),
    "sm_90": (65536, 228 * 1024, 2048, 32),
    "sm_100": (65536, 228 * 1024, 2048, 32),
}
SHOWN = (("fp16", 64), ("fp16", 80), ("fp16", 128), ("fp32", 64))  # what DESIGN.md's table shows
SHOWN_VERSION = "3.8.0"
RESERVED_SHARED = 1024  # bytes of shared memory that CUDA keeps per program


def compile_job(job: Job) -> dict[str, Any]:
    """What the compiler says of one job."""
    source = ASTSource(KERNELS[job.name], *compiler_arguments(job))
    compiled = triton.compile(source, target=TARGETS[job.architecture], options=dict(job.options))
    facts = _amd(compiled, job) if job.architecture.startswith("gfx") else _nvidia(compiled, job)
    return {**job.to_dict(), **facts}


def _nvidia(compiled: Any, job: Job) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        dump = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", dump).group(1)) for key in ("REG", "STACK", "LOCAL"))
    threads = 32 * dict(job.options)["num_warps"]
    shared = compiled.metadata.shared
    return {
        "registers": registers,
        "spilled_bytes": stack + local,
        "shared_bytes": shared,
        "programs_per_multiprocessor": occupancy(job.architecture, registers, shared, threads),
        "matrix_instructions": count_instructions(compiled.asm["ptx"], ("wgmma.mma_async", "tcgen05.mma", "mma.sync")),
    }


def _amd(compiled: Any, job: Job) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    facts = {key: int(re.search(rf"\.{key}:\s+(\d+)", text).group(1)) for key in ("vgpr_count", "vgpr_spill_count")}
    return {
        "registers": facts["vgpr_count"],
        "spilled_bytes": 4 * facts["vgpr_spill_count"],
        "shared_bytes": compiled.metadata.shared,
        "programs_per_multiprocessor": amd_occupancy(
            facts["vgpr_count"], compiled.metadata.shared, dict(job.options)["num_warps"]
        ),
        "matrix_instructions": count_instructions(text, ("v_mfma",)),
    }


def count_instructions(assembly: str, names: Sequence[str]) -> dict[str, int]:
    """How often each instruction occurs; those that do not are left out."""
    counts = {name: len(re.findall(rf"^\s*(?:@\S+\s+)?{re.escape(name)}", assembly, re.MULTILINE)) for name in names}
    return {name: count for name, count in counts.items() if count}


def occupancy(arch: str, registers: int, shared: int, threads: int) -> int:
    """How many programs fit on one multiprocessor at once."""
    all_registers, all_shared, all_threads, programs = LIMITS[arch]
    per_warp = -(-registers * 32 // 256) * 256
    return min(
        all_registers // (per_warp * (threads // 32)),
        all_shared // (shared + RESERVED_SHARED),
        all_threads // threads,
        programs,
    )


def amd_occupancy(registers: int, shared: int, waves: int) -> int:
    """The same for a compute unit of CDNA 3: four SIMDs of 512 registers and 8 waves at most, 64 KiB of shared."""
    waves_per_simd = min(8, 512 // (-(-registers // 8) * 8))
    return min(4 * waves_per_simd // waves, 64 * 1024 // max(shared, 1))


def run(selected: Sequence[Job], processes: int) -> list[dict[str, Any]]:
    """The reports of the jobs, in their order."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        return list(pool.map(compile_job, selected))


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: per kernel and architecture, registers, KiB of shared memory, programs per multiprocessor, products."""
    lines = [
        f"Triton {triton.__version__}. Each cell: registers a thread / KiB of shared memory / programs that fit on one "
        "multiprocessor / matrix instructions in the binary (none: scalar units). Nothing spills.",
        "",
        f"| kernel, dtype, D | {' | '.join(TARGETS)} |",
        "| --- |" + " --- |" * len(TARGETS),
    ]
    rows: dict[str, dict[str, str]] = {}
    for record in records:
        if (record["dtype"], record["head_dim"]) in SHOWN and record["name"] in ATTENTION:
            wanted = [name for name in ("dk", "dv") if name not in record["constants"]]
            names = [record["name"], *(wanted if record["name"] == "key_gradient" else ())]
            label = ", ".join([*names, record["dtype"], str(record["head_dim"])])
            counts = ", ".join(f"{count} {name.split('.')[0]}" for name, count in record["matrix_instructions"].items())
            cell = (
                record["registers"],
                record["shared_bytes"] // 1024,
                record["programs_per_multiprocessor"],
                counts or "none",
            )
            rows.setdefault(label, {})[record["architecture"]] = " / ".join(map(str, cell))
    lines += [f"| {label} | {' | '.join(row[arch] for arch in TARGETS)} |" for label, row in rows.items()]
    return "\n".join(lines)


def with_table(text: str, records: Sequence[dict[str, Any]]) -> str:
    """DESIGN.md's text with the table put between its markers."""
    before, begin, rest = text.partition("<!-- static -->\n")
    _, end, after = rest.partition("<!-- /static -->")
    if not begin or not end:
        raise ValueError("static_report: DESIGN.md must hold <!-- static --> and <!-- /static -->")
    return f"{before}{begin}{table(records)}\n{end}{after}"


def differences(found: Sequence[dict[str, Any]], recorded: Sequence[dict[str, Any]], ignored: str = "") -> list[str]:
    """What was compiled now and is not in the file as it is now, one field aside."""

    def text(record: dict[str, Any]) -> str:
        return json.dumps({key: value for key, value in record.items() if key != ignored}, sort_keys=True)

    known = {text(record) for record in recorded}
    return [line for line in map(text, found) if line not in known]


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, and writes or compares; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="compile what changed; keep the other rows of the file")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 on a difference or a spill")
    parser.add_argument("--quick", action="store_true", help="the same of few rows and those whose code changed")
    parser.add_argument("--stale", action="store_true", help="compile nothing; exit 1 where code changed since")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    parser.add_argument("--architectures", nargs="+", choices=tuple(TARGETS), default=tuple(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    arguments = parser.parse_args(argv)
    check = arguments.check or arguments.quick or arguments.stale
    everything = list(jobs())
    wanted = [
        job for job in everything if job.architecture in arguments.architectures and job.dtype in arguments.dtypes
    ]
    if not check and len(wanted) < len(everything):
        parser.error("a part can be checked with --check, but the file is written whole")
    path = RESULTS / f"static-triton-{triton.__version__}.json"
    recorded = json.loads(path.read_text()) if (check or arguments.update) and path.exists() else []
    if arguments.stale:
        stale = changed(everything, recorded)
        print(f"static_report: {len(stale)} of {len(everything)} configurations changed since {path.name}")
        return 1 if stale else 0
    if arguments.quick:
        wanted = list(dict.fromkeys((*representative(wanted), *changed(wanted, recorded))))
    if arguments.update:
        wanted = changed(wanted, recorded)
    records = json.loads(json.dumps(run(wanted, arguments.jobs)))
    problems = [f"spills: {r}" for r in records if r["spilled_bytes"]]
    if check:
        ignored = "source" if arguments.quick else ""
        problems += [f"not in {path.name}: {line}" for line in differences(records, recorded, ignored)]
        extra = len(recorded) - len(everything)
        problems += [f"{path.name} holds {extra} more configurations than are shipped"] if extra > 0 else []
    else:
        records = of_jobs(everything, (*recorded, *records))
        path.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
        if triton.__version__ == SHOWN_VERSION:
            DESIGN.write_text(with_table(DESIGN.read_text(), records))
    for problem in problems:
        print(f"static_report: {problem}", file=sys.stderr)
    print(f"static_report: Triton {triton.__version__}, {len(records)} configurations, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
