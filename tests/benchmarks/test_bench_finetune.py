"""A fine-tuning run that has ended is not made again."""

import pytest

from benchmarks.bench_finetune import has_ended


@pytest.mark.parametrize(
    ("lines", "ended"),
    [
        (None, False),
        ([], False),
        (['{"kind": "run"}', '{"kind": "stop", "step": 3}'], False),
        (['{"kind": "run"}', '{"kind": "end", "step": 9}'], True),
        (['{"kind": "end", "step": 9}', '{"kind": "resume", "step": 9}'], False),
    ],
)
def test_only_a_run_whose_log_ends_has_ended(tmp_path, lines, ended):
    if lines is not None:
        (tmp_path / "log.jsonl").write_text("".join(line + "\n" for line in lines))
    assert has_ended(tmp_path) is ended
