"""Hit rates by hand, and the demo's report end to end at a tiny size."""

from dataclasses import replace

import pytest
import torch

from ffvt.data.partbirds import PartBirds
from ffvt.report.demo import RECIPE, run_demo, summary
from ffvt.report.page import Page
from ffvt.report.selection import hit_rate, random_hit_rate, study_selection
from tests.helpers import tiny_model


def test_hit_rate_is_the_share_of_picks_on_the_mark():
    on_mark = torch.tensor([[False, True, True, False, False], [False, False, False, False, True]])
    index = torch.tensor([[[1, 2], [0, 3]], [[4, 1], [2, 3]]])  # 2 images, 2 layers, 2 picks
    assert hit_rate(index, on_mark).tolist() == [0.75, 0.0]
    assert random_hit_rate(on_mark) == pytest.approx(0.3)
    assert random_hit_rate(on_mark, first_candidate=1) == pytest.approx(0.375)


def test_random_picks_reach_the_random_rate():
    birds = PartBirds("test", "easy", size=40)
    on_mark = torch.nn.functional.pad(torch.stack([birds.mark_tokens(i, 8) for i in range(40)]), (1, 0))
    index = torch.stack([torch.stack([1 + torch.randperm(64)[:8] for _ in range(50)]) for _ in range(40)])
    assert hit_rate(index, on_mark).mean().item() == pytest.approx(random_hit_rate(on_mark, 1), abs=0.01)


def test_a_study_keeps_what_the_model_picked_image_by_image():
    model, birds = tiny_model(), PartBirds("test", "easy", size=10)
    study = study_selection(model, birds, 7, batch_size=3)
    assert study.index.shape == (7, 3, 3)
    assert study.on_mark.shape == (7, 17)
    assert not study.on_mark[:, 0].any()
    assert torch.equal(study.on_mark[2, 1:], birds.mark_tokens(2, 16))


def test_the_demo_writes_a_self_contained_report(tmp_path):
    small = dict(
        preset="easy", num_steps=4, warmup_steps=1, eval_every=2, log_every=1, train_batch_size=8, device="cpu"
    )
    result = run_demo(tmp_path / "demo", replace(RECIPE, **small))
    html = result.report.read_text()
    assert result.report == tmp_path / "demo" / "report.html"
    assert html.count("data:image/png;base64,") == 3
    assert 'src="http' not in html
    assert f"{result.accuracy:.1%}" in html
    assert len(result.hit_rates) == 3
    assert str(result.report) in summary(result)
    assert (tmp_path / "demo" / "last" / "model.safetensors").exists()


def test_text_on_a_page_is_escaped():
    page = Page("a < b")
    page.paragraph("<script>")
    assert "<h1>a &lt; b</h1>" in page.render()
    assert "<script>" not in page.render()
