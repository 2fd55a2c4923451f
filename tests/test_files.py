"""Files and folders that appear whole or not at all."""

import pytest

from ffvt import files


def test_a_file_that_cannot_be_written_whole_leaves_the_earlier_one_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(b"earlier")

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(tmp_path / "a.bin", b"half")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"earlier"]
    monkeypatch.undo()
    files.write_whole(tmp_path / "a.bin", b"whole")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


def test_a_link_stays_and_leads_to_the_new_file(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "a.bin")
    files.write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "real" / "a.bin").read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink()


def test_a_folder_or_a_device_is_no_place_for_a_file(tmp_path):
    for path in (tmp_path, "/dev/null"):
        with pytest.raises(OSError, match="path must be a regular file or new; got path="):
            files.write_whole(path, b"x")
