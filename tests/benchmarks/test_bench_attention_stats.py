"""The statistics benchmark: every operator and rival, and a gate that can fail."""

import json

import pytest
import torch

from benchmarks import bench_attention_stats
from benchmarks.attention_rivals import OURS
from benchmarks.bench_attention_stats import GIVEN, MAP, NARROW_MAP, PRODUCTS, RECOMPUTED, ROWS, STATS, WITHOUT_LINES
from benchmarks.harness import DisagreementError
from ffvt.kernels.backends import _missing

REASON = "; ".join(_missing("cpp"))
served = pytest.mark.skipif(bool(REASON), reason=f"the C++ backend cannot serve: {REASON}")


@served
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_statistics_benchmark_writes_every_operator_and_rival(dtype, tmp_path):
    out = tmp_path / "attention_stats.jsonl"
    threads = str(torch.get_num_threads())
    bench_attention_stats.main(["--quick", "--rounds", "1", "--dtypes", dtype, "--threads", threads, "--out", str(out)])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    rivals = [MAP, ROWS, PRODUCTS, OURS] + [NARROW_MAP] * (dtype != "fp32")
    expected = [(STATS, WITHOUT_LINES), (STATS, OURS)] + [(o, c) for o in (GIVEN, RECOMPUTED) for c in rivals]
    assert [(r["mode"], r["case"]) for r in records] == expected
    assert all(r["speedup"].keys() == {MAP, PRODUCTS} for r in records[2:])


def results(attention=1.0, vector=1.0, rival=MAP):
    """What rivals give that agree, but for the attention of ours and the vector of one rival."""
    found = {STATS: {WITHOUT_LINES: lambda: (torch.ones(3),), OURS: lambda: (attention * torch.ones(3),)}}
    for operator in (GIVEN, RECOMPUTED):
        found[operator] = {name: lambda: torch.ones(3) for name in (MAP, ROWS, OURS)}
    found[RECOMPUTED] = {**found[RECOMPUTED], rival: lambda: vector * torch.ones(3), PRODUCTS: lambda: None}
    return found


def test_rivals_that_agree_pass_the_gate():
    bench_attention_stats.check_agreement(results(), 1e-4)


@pytest.mark.parametrize(
    ("different", "message"),
    [
        (dict(attention=1.0001), STATS),
        (dict(vector=1.001), f"{RECOMPUTED}: {MAP}"),
        (dict(vector=torch.nan, rival=ROWS), f"{RECOMPUTED}: {ROWS}"),
    ],
)
def test_rivals_that_disagree_are_not_timed(different, message):
    with pytest.raises(DisagreementError, match=message):
        bench_attention_stats.check_agreement(results(**different), 1e-4)


def test_another_device_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_attention_stats.main(["--device", "cuda"])
    assert "--device must be cpu; got cuda" in capsys.readouterr().err
