"""The demo's report, end to end at a tiny size."""

from dataclasses import replace

from ffvt.report.demo import RECIPE, run_demo, summary
from ffvt.train.runlog import read_log


def test_the_demo_writes_a_self_contained_report(tmp_path):
    small = dict(
        preset="easy", num_steps=4, warmup_steps=1, eval_every=2, log_every=1, train_batch_size=8, device="cpu"
    )
    result = run_demo(tmp_path / "demo", replace(RECIPE, **small))
    html = result.report.read_text()
    assert result.report == tmp_path / "demo" / "report.html"
    assert html.count("data:image/png;base64,") == 6  # three figures, for light and dark pages
    assert 'src="http' not in html
    assert f"{result.accuracy:.1%}" in html
    assert len(result.hit_rates) == 3
    assert f"{result.mean_hit_rate:.1%}" in html
    assert read_log(tmp_path / "demo")[-1]["last"]["selection"]["layer_hit_rates"] == result.hit_rates
    assert str(result.report) in summary(result)
    assert (tmp_path / "demo" / "last" / "model.safetensors").exists()
    (tmp_path / "demo" / "notes.txt").write_text("mine")
    again = run_demo(tmp_path / "demo", replace(RECIPE, **small))  # a demo may replace a demo, and nothing else there
    assert again.accuracy == result.accuracy
    assert (tmp_path / "demo" / "notes.txt").read_text() == "mine"
