"""How far something is, without a terminal: a line now and then."""

from ffvt import progress
from ffvt.progress import Progress


def test_a_line_is_said_now_and_then_and_by_the_main_rank_only(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    for enabled in (True, False):
        now = 100.0
        with Progress(50, "evaluate", enabled) as shown:
            for _ in range(5):
                now += 20
                shown.advance(10)
    assert capsys.readouterr().err.splitlines() == [
        "evaluate: 20 of 50 images, 0.5 a second",
        "evaluate: 40 of 50 images, 0.5 a second",
    ]
