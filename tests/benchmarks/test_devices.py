"""What a CPU is called: by what the system tells of it, and by what an old record holds."""

from __future__ import annotations

import pytest

from benchmarks import devices
from benchmarks.devices import cpu_and_threads, cpu_facts, cpu_label, device_label
from benchmarks.harness import environment

FLAGS = "fpu sse2 avx avx2 f16c fma avx512f avx512_bf16"
OLD = {
    "device": "cpu",
    "device_name": "AMD EPYC",
    "cpu_name": "AMD EPYC",
    "cpu_flags": ["avx2", "avx512_bf16"],
    "cpu_capability": "AVX512",
    "threads": 2,
}


def cpuinfo(vendor: str, family: int, model: int, stepping: int | str, name: str, flags: str = FLAGS) -> str:
    fields = {
        "processor": 0,
        "vendor_id": vendor,
        "cpu family": family,
        "model": model,
        "model name": name,
        "stepping": stepping,
        "flags": flags,
    }
    first = "".join(f"{field}\t: {value}\n" for field, value in fields.items())
    return f"{first}\n{first.replace(name, 'another')}\n"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (cpuinfo("AuthenticAMD", 25, 17, 1, "AMD EPYC"), "Zen 4, AMD EPYC (AVX512 bf16, no AMX)"),
        (cpuinfo("AuthenticAMD", 25, 1, 1, "AMD EPYC", "avx2"), "Zen 3, AMD EPYC (AVX512, no AMX)"),
        (cpuinfo("AuthenticAMD", 26, 2, 1, "AMD EPYC"), "Zen 5, AMD EPYC (AVX512 bf16, no AMX)"),
        (
            cpuinfo("GenuineIntel", 6, 207, 2, "Intel(R) Xeon(R) Processor"),
            "Emerald Rapids, Intel Xeon (AVX512 bf16, no AMX)",
        ),
        (
            cpuinfo("GenuineIntel", 6, 143, 8, "Intel(R) Xeon(R) Processor", f"{FLAGS} amx_bf16 amx_tile amx_int8"),
            "Sapphire Rapids, Intel Xeon (AVX512 bf16, AMX bf16 int8)",
        ),
        (
            cpuinfo("GenuineIntel", 6, 173, 1, "Intel(R) Xeon(R) 6980P", f"{FLAGS} amx_bf16 amx_fp16"),
            "Granite Rapids, Intel Xeon 6980P (AVX512 bf16, AMX bf16 fp16)",
        ),
        (cpuinfo("GenuineIntel", 6, 85, 4, "Xeon", ""), "Skylake, Xeon (AVX512, no AMX)"),
        (cpuinfo("GenuineIntel", 6, 85, 7, "Xeon", ""), "Cascade Lake, Xeon (AVX512, no AMX)"),
        (cpuinfo("GenuineIntel", 6, 85, "unknown", "Xeon", ""), "family 6 model 85, Xeon (AVX512, no AMX)"),
        (cpuinfo("GenuineIntel", 6, 250, 0, "Xeon", ""), "family 6 model 250, Xeon (AVX512, no AMX)"),
        ("processor : 0\nFeatures : asimd sve\n", "machine (AVX512, no AMX)"),
    ],
)
def test_a_cpu_is_called_by_what_the_system_tells_of_it(tmp_path, monkeypatch, text, label):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "machine")
    assert cpu_label({**cpu_facts(), "cpu_capability": "AVX512"}) == label


def test_a_system_that_tells_nothing_has_no_facts(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "cpuinfo")
    found = cpu_facts()
    assert found.pop("cpu_name")
    assert found == {"cpu_vendor": None, "cpu_family": None, "cpu_model": None, "cpu_stepping": None, "cpu_flags": []}


def test_a_record_without_these_facts_goes_by_name_and_instructions():
    assert cpu_label(OLD) == "AMD EPYC (AVX512 bf16, no AMX)"
    assert cpu_label({**OLD, "cpu_capability": "AVX2"}) == "AMD EPYC (AVX2, no AMX)"
    assert cpu_label({**OLD, "cpu_flags": ["avx2"]}) == "AMD EPYC (AVX512, no AMX)"


def test_threads_and_gpus_are_named():
    assert cpu_and_threads(OLD) == "AMD EPYC (AVX512 bf16, no AMX), 2 threads"
    assert cpu_and_threads({**OLD, "threads": 1}).endswith(", 1 thread")
    assert device_label({**OLD, "device": "cuda", "device_name": "H100"}) == "H100"


def test_every_record_has_the_facts():
    assert cpu_facts().items() <= environment().items()
