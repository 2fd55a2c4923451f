"""The selection benchmark: every operator and rival, and a gate that can fail."""

import json

import pytest
import torch

from benchmarks import bench_selection
from benchmarks.attention_rivals import OURS
from benchmarks.bench_selection import PYTORCH
from benchmarks.harness import DisagreementError


def test_the_selection_benchmark_writes_every_operator_and_rival(tmp_path):
    out = tmp_path / "selection.jsonl"
    threads = str(torch.get_num_threads())
    bench_selection.main(["--quick", "--rounds", "1", "--dtypes", "fp32", "--threads", threads, "--out", str(out)])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    operators = ("maws_select", "gather_tokens", "its gradient")
    assert [(r["mode"], r["case"]) for r in records] == [(o, c) for o in operators for c in (PYTORCH, OURS)]


@pytest.mark.parametrize("operator", ["maws_select", "gather_tokens"])
def test_operators_that_disagree_are_not_timed(operator):
    def ours():
        return (None, torch.tensor([1.1])) if operator == "maws_select" else torch.tensor([2])

    def theirs():
        return (None, torch.tensor([1.0])) if operator == "maws_select" else torch.tensor([1])

    with pytest.raises(DisagreementError, match=operator):
        bench_selection.check_agreement({operator: {OURS: ours, PYTORCH: theirs}})
