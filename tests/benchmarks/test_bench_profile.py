"""The profile of the whole model: shares that add up, a rate, and a table of them."""

import json

import pytest
import torch

from benchmarks import bench_profile
from benchmarks.harness import environment
from benchmarks.outcome_tables import render_profiles


def test_it_writes_shares_that_add_up_and_a_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_profile, "matmul_peak", lambda dtype, device: 50.0)
    out = tmp_path / "profile.jsonl"
    arguments = ["--quick", "--rounds", "1", "--dtypes", "fp32", "--threads", str(torch.get_num_threads())]
    bench_profile.main([*arguments, "--out", str(out)])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["mode"] for record in records] == ["forward", "step"]
    for record in records:
        assert sum(record["operators"].values()) == pytest.approx(1, abs=0.01)
        assert 0 < record["share_of_peak"] < 1
        assert "aten::addmm" in record["operators"]
        assert "ffvt::maws_attention_qkvpacked" in record["operators"]
        assert not [name for name in record["operators"] if name.endswith("_default")]


def test_the_table_has_what_takes_a_hundredth_of_some_column():
    where = environment()
    common = {"environment": where, "parameters": "tiny", "milliseconds": {"median": 1234.0}, "share_of_peak": 0.5}
    records = [
        {**common, "dtype": "fp32", "mode": "forward", "operators": {"mm": 0.875, "gelu": 0.12, "add": 0.005}},
        {**common, "dtype": "fp32", "mode": "step", "operators": {"mm": 0.75, "add": 0.25}},
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in render_profiles(records).splitlines()[2:]]
    assert rows[0] == ["", "fp32 forward", "fp32 step"]
    assert rows[2:] == [
        ["time, ms", "1,234", "1,234"],
        ["share of the matmul peak", "0.50", "0.50"],
        ["`mm`", "87.5%", "75.0%"],
        ["`gelu`", "12.0%", "-"],
        ["`add`", "0.5%", "25.0%"],
        ["all others", "-", "-"],
    ]


def test_another_device_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_profile.main(["--device", "cuda"])
    assert "--device must be cpu; got cuda" in capsys.readouterr().err
