"""What computed: the facts of a CPU that every record has, and the name that pages show, by which records are told
apart.

A CPU's own name may say no more than "AMD EPYC", so the microarchitecture is told by vendor, family, model and
stepping. Records from before these were kept go by the CPU's own name and its instructions alone.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

CPUINFO = Path("/proc/cpuinfo")
FLAG_PREFIXES = ("amx", "avx", "fma", "f16c")
ANY = range(256)


class Kind(NamedTuple):
    """CPUs of one microarchitecture."""

    vendor: str
    family: int
    models: Container[int]
    name: str
    steppings: Container[int] = ANY


# As Linux has them: arch/x86/kernel/cpu/amd.c and arch/x86/include/asm/intel-family.h.
KINDS = (
    Kind("AuthenticAMD", 0x17, (*range(0x30), *range(0x50, 0x60)), "Zen"),
    Kind("AuthenticAMD", 0x17, (*range(0x30, 0x50), *range(0x60, 0x80), 0x90, 0x91, *range(0xA0, 0xB0)), "Zen 2"),
    Kind("AuthenticAMD", 0x19, (*range(0x10), *range(0x20, 0x60)), "Zen 3"),
    Kind("AuthenticAMD", 0x19, (*range(0x10, 0x20), *range(0x60, 0xB0)), "Zen 4"),
    Kind("AuthenticAMD", 0x1A, (*range(0x30), *range(0x40, 0x50), *range(0x60, 0x80)), "Zen 5"),
    Kind("GenuineIntel", 6, (0x3C, 0x3F, 0x45, 0x46), "Haswell"),
    Kind("GenuineIntel", 6, (0x3D, 0x47, 0x4F, 0x56), "Broadwell"),
    Kind("GenuineIntel", 6, (0x4E, 0x5E), "Skylake"),
    Kind("GenuineIntel", 6, (0x55,), "Skylake", range(5)),
    Kind("GenuineIntel", 6, (0x55,), "Cascade Lake", range(5, 8)),
    Kind("GenuineIntel", 6, (0x55,), "Cooper Lake", range(10, 12)),
    Kind("GenuineIntel", 6, (0x6A, 0x6C, 0x7D, 0x7E), "Ice Lake"),
    Kind("GenuineIntel", 6, (0x8F,), "Sapphire Rapids"),
    Kind("GenuineIntel", 6, (0xCF,), "Emerald Rapids"),
    Kind("GenuineIntel", 6, (0xAD, 0xAE), "Granite Rapids"),
)


def cpu_facts() -> dict[str, Any]:
    """This CPU's name, vendor, family, model, stepping and the flags that matrix products depend on.

    What the system does not tell is None, flags then are none.
    """
    fields = _first_processor()
    numbers = {"cpu_family": "cpu family", "cpu_model": "model", "cpu_stepping": "stepping"}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "cpu_name": fields.get("model name") or platform.processor() or platform.machine(),
        "cpu_vendor": fields.get("vendor_id"),
        **{fact: _number(fields.get(field)) for fact, field in numbers.items()},
        "cpu_flags": sorted(flag for flag in flags if flag.startswith(FLAG_PREFIXES)),
    }


def _first_processor() -> dict[str, str]:
    try:
        first = CPUINFO.read_text().partition("\n\n")[0]
    except OSError:
        return {}
    parts = (line.partition(":") for line in first.splitlines())
    return {field.strip(): value.strip() for field, _, value in parts}


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def device_label(environment: Mapping[str, Any]) -> str:
    """The GPU's name, or the CPU's label."""
    return environment["device_name"] if environment["device"] == "cuda" else cpu_label(environment)


def cpu_label(environment: Mapping[str, Any]) -> str:
    """All that tells a CPU from others: "Zen 4, AMD EPYC (AVX512 bf16, no AMX)"."""
    name = re.sub(r"\((R|TM)\)| CPU| Processor", "", environment["cpu_name"])
    kind = microarchitecture(environment)
    return f"{kind}, {name} ({instructions(environment)})" if kind else f"{name} ({instructions(environment)})"


def microarchitecture(environment: Mapping[str, Any]) -> str | None:
    """As its makers call it, or family and model where `KINDS` has none; None for records that do not hold them."""
    facts = (environment.get(f"cpu_{fact}") for fact in ("vendor", "family", "model", "stepping"))
    vendor, family, model, stepping = facts
    if family is None or model is None:
        return None
    for kind in KINDS:
        if (vendor, family) == kind[:2] and model in kind.models and stepping in kind.steppings:
            return kind.name
    return f"family {family} model {model}"


def instructions(environment: Mapping[str, Any]) -> str:
    """What matrix products are made with: "AVX512 bf16, AMX bf16 int8" or "AVX2, no AMX"."""
    flags, vectors = environment["cpu_flags"], environment["cpu_capability"]
    if vectors == "AVX512" and "avx512_bf16" in flags:
        vectors += " bf16"
    units = [flag.removeprefix("amx_") for flag in flags if flag.startswith("amx_") and flag != "amx_tile"]
    return f"{vectors}, {' '.join(['AMX', *units]) if units else 'no AMX'}"


def cpu_and_threads(environment: Mapping[str, Any]) -> str:
    """The CPU's label, and how many of its threads worked."""
    count = environment["threads"]
    return f"{cpu_label(environment)}, {count} thread{'s' * (count != 1)}"
