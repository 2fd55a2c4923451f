"""The cache of decoded pictures: built once, whole, for the contents at hand."""

import logging
import multiprocessing
import os

import pytest
import torch
from torch.utils.data import DataLoader

from ffvt.data import cache
from ffvt.data.cache import cache_key, open_cached
from ffvt.data.datasets import open_split
from ffvt.data.images import load_image
from ffvt.data.layouts import read_listing
from ffvt.data.sampling import EvaluationView, TrainingView
from tests.data.layout_fixtures import picture, spoil


def cached(root, folder, **more):
    return open_split("imagefolder", "train", 32, 48, str(root), cache_dir=str(folder), **more)


def test_cached_pictures_are_the_decoded_ones_and_are_decoded_once(photographs, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="ffvt")
    plain = open_split("imagefolder", "train", 32, 48, str(photographs))
    images = cached(photographs, tmp_path / "cache", workers=2)
    assert all(torch.equal(images[i][0], plain[i][0]) and images[i][1] == plain[i][1] for i in range(15))
    assert "decoding 15 images to 0.00 GB" in caplog.text  # 15 * 3 * 48**2 bytes
    monkeypatch.setattr(cache, "load_image", None)
    again = cached(photographs, tmp_path / "cache")
    assert torch.equal(again[3][0], plain[3][0])
    again[3][0].zero_()  # a view of the mapping, which is private
    assert torch.equal(cached(photographs, tmp_path / "cache")[3][0], plain[3][0])
    assert again.relative_box(0) is None


def test_a_changed_picture_another_size_or_order_is_another_entry(photographs, tmp_path):
    paths = list(read_listing("imagefolder", "train", photographs).paths)
    key = cache_key(paths, 48)
    assert cache_key(paths, 48, threads=3) == key
    assert len({key, cache_key(paths, 49), cache_key(paths[::-1], 48), cache_key(paths[:-1], 48)}) == 4
    os.utime(paths[0])  # touched, not changed
    assert cache_key(paths, 48) == key
    picture(paths[0], seed=9)
    assert cache_key(paths, 48) != key


@pytest.mark.slow
def test_workers_read_the_cache_as_the_process_itself_does(photographs, tmp_path):
    images = cached(photographs, tmp_path / "cache")
    images[0]  # mapped here; a spawned worker must map it anew
    view = EvaluationView(images, 32)
    alone = torch.cat([batch.image for batch in DataLoader(view, 4)])
    spawn = multiprocessing.get_context("spawn")
    apart = torch.cat([batch.image for batch in DataLoader(view, 4, num_workers=2, multiprocessing_context=spawn)])
    assert torch.equal(alone, apart)


def test_unreadable_pictures_are_remembered_and_told(photographs, tmp_path, caplog):
    spoil(photographs / "train" / "b" / "1.png")
    for _ in range(2):  # built, then opened
        images = cached(photographs, tmp_path / "cache")
        with pytest.raises(ValueError, match=r"readable image; got .*1\.png"):
            images[6]
    assert caplog.text.count("1.png") == 1
    assert TrainingView(images, 32, seed=4)[0, 6].problem


def test_an_entry_appears_whole_or_not_at_all(photographs, tmp_path, monkeypatch, caplog):
    def fail(path, **_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(cache, "load_image", fail)
        with pytest.raises(RuntimeError, match="killed"):
            cached(photographs, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    usage = type("Usage", (), {"free": 100})()
    with monkeypatch.context() as patched:
        patched.setattr(cache.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(ValueError, match="room for 103680 bytes; got 100 bytes free"):
            cached(photographs, tmp_path / "cache")
    entry = tmp_path / "cache" / cached(photographs, tmp_path / "cache").pixels.file.parent.name
    (entry / cache.PIXELS_FILE).write_bytes(b"short")
    assert len(cached(photographs, tmp_path / "cache").pixels.checksums) == 15
    assert "must have 103680 bytes; got 5; it is built again" in caplog.text


def _open_in_child(paths, folder, sums):
    sums.put(int(open_cached(paths, 48, folder)[2].sum()))


@pytest.mark.slow
def test_processes_that_want_one_entry_build_it_once(photographs, tmp_path, caplog):
    paths = list(read_listing("imagefolder", "train", photographs).paths)
    context = multiprocessing.get_context("spawn")
    sums = context.Queue()
    processes = [context.Process(target=_open_in_child, args=(paths, tmp_path / "cache", sums)) for _ in range(3)]
    for process in processes:
        process.start()
    expected = int(load_image(paths[2], 48).sum())
    assert [sums.get(timeout=120) for _ in processes] == [expected] * 3
    for process in processes:
        process.join()
    entries = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(entries) == 1


def test_damaged_pixels_are_noticed_where_they_are_first_read(photographs, tmp_path, caplog):
    plain = open_split("imagefolder", "train", 32, 48, str(photographs))
    path = cached(photographs, tmp_path / "cache").pixels.file
    content = bytearray(path.read_bytes())
    content[3 * 48**2 * 4 + 7] ^= 1  # of image 4
    path.write_bytes(content)
    images = cached(photographs, tmp_path / "cache")
    with pytest.raises(cache.DamagedCache, match="is damaged at image 4; delete .* to have it built again"):
        images.pixels[4]
    assert all(torch.equal(images[i][0], plain[i][0]) for i in range(15))
    assert caplog.text.count("the image is decoded anew") == 1


def test_each_fit_and_orientation_is_another_entry(photographs):
    paths = list(read_listing("imagefolder", "train", photographs).paths)
    keys = {
        cache_key(paths, 48, orient=orient, fit=fit) for orient in (True, False) for fit in ("stretch", "crop", "pad")
    }
    assert len(keys) == 6
