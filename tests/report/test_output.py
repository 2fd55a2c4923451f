"""Figures as files: the format goes by the name, and nothing but a picture is replaced."""

import pytest
from matplotlib.figure import Figure

from ffvt.report.output import BEGINNINGS, FORMATS, write_figure


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_name_decides_the_format_and_an_earlier_picture_is_replaced(tmp_path, suffix):
    for _ in range(2):
        write_figure(Figure(figsize=(1, 1)), tmp_path / f"a{suffix}", "plot")
    assert (tmp_path / f"a{suffix}").read_bytes().startswith(BEGINNINGS)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [b'{"kind": "run"}\n', b"import ffvt\n", b"\x7fELF"])
def test_a_file_that_is_no_picture_stays(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="plot: output must be a picture or new, other files stay; got output="):
        write_figure(Figure(), tmp_path / "a.png", "plot")
    assert (tmp_path / "a.png").read_bytes() == content


def test_an_unknown_format_and_a_missing_folder_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"visualize: output must end in \.png, \.jpg.*; got output='.*log\.jsonl'"):
        write_figure(Figure(), tmp_path / "log.jsonl", "visualize")
    with pytest.raises(FileNotFoundError, match="visualize: the folder of output must exist"):
        write_figure(Figure(), tmp_path / "missing" / "a.png", "visualize")
