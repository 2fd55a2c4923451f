"""What the log's lines say to people."""

import pytest

from ffvt.train.log_lines import duration


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (5970, "1 h 40 min"), (90000, "1 d 1 h")],
)
def test_times_are_given_in_the_units_people_use(seconds, shown):
    assert duration(seconds) == shown
