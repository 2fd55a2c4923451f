"""The benchmark of operands and threads: every kind, and a gate that can fail."""

import json

import pytest
import torch

from benchmarks import bench_cpu_kernels
from benchmarks.bench_cpu_kernels import FP32, ONE_THREAD, check_agreement, workloads
from benchmarks.harness import DisagreementError
from ffvt.kernels.backends import _missing, cpu_products

REASON = "; ".join(_missing("cpp"))
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"the C++ backend cannot serve: {REASON}")


def test_it_writes_every_kind_on_one_thread_and_on_all(tmp_path):
    out, before, threads = tmp_path / "cpu_kernels.jsonl", cpu_products(), torch.get_num_threads()
    bench_cpu_kernels.main(["--quick", "--rounds", "1", "--threads", str(threads), "--out", str(out)])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    cases = [
        f"{kind}, {count} thread" + "s" * (count > 1)
        for kind in bench_cpu_kernels.kinds()
        for count in sorted({1, threads})
    ]
    modes = ("forward", "backward")
    assert [(r["mode"], r["case"]) for r in records] == [(m, c) for _ in range(2) for m in modes for c in cases]
    assert all(r["speedup"].keys() == {FP32, ONE_THREAD} for r in records)
    assert (cpu_products(), torch.get_num_threads()) == (before, threads)


def test_kinds_that_disagree_are_not_timed():
    found = workloads(1, 1, 20, 8, 1)
    last = list(found.values())[-1]
    last.qkv[2].mul_(1.2)  # its v, and with it dq and dk
    last.saved = (last.forward()[0], *last.saved[1:])
    with pytest.raises(DisagreementError, match="out of fp16"):
        check_agreement(found)


def test_another_device_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_cpu_kernels.main(["--device", "cuda"])
    assert "--device must be cpu; got cuda" in capsys.readouterr().err
