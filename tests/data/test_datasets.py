"""Data sets, transforms and the order of samples: the authors' chain, any picture, any number of ranks."""

import logging
import multiprocessing
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from ffvt.data import cache
from ffvt.data.cache import cache_key, open_cached
from ffvt.data.datasets import ImageSubset, open_split
from ffvt.data.layouts import DATASETS, read_listing
from ffvt.data.sampling import EvaluationView, StepSampler, TrainingView, split_off
from ffvt.data.transforms import (
    ORDERS,
    PLAIN,
    RECIPES,
    augment,
    center_crop,
    draw_jitter,
    evaluation_view,
    load_image,
    normalize,
    random_crop_flip,
    random_view,
)
from ffvt.kernels.backends import _load, _missing, use_backend
from tests.data.layout_fixtures import picture


def folder_images(root, split, size, classes=None):
    return open_split("imagefolder", split, size, size, str(root), classes=classes)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_global_batches_do_not_depend_on_the_number_of_ranks(world_size):
    together = [set(batch) for batch in StepSampler(17, 6, 10, seed=5)]
    parts = [list(StepSampler(17, 6 // world_size, 10, 5, rank, world_size)) for rank in range(world_size)]
    assert [set().union(*(part[step] for part in parts)) for step in range(10)] == together


def test_every_epoch_holds_every_sample_once_in_another_order():
    keys = [key for batch in StepSampler(17, 5, 17 * 3 // 5, seed=5) for key in batch]
    orders = [[index for epoch, index in keys if epoch == number] for number in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(17))
    assert orders[0] != orders[1]
    assert keys[:17] != [key for batch in StepSampler(17, 17, 1, seed=6) for key in batch]


@pytest.mark.parametrize("recipe", [PLAIN, RECIPES["CUB"], RECIPES["car"], RECIPES["cifar10"]])
def test_a_sample_is_decided_by_seed_epoch_and_index_alone(photographs, recipe):
    images = folder_images(photographs, "train", 48)
    one, other = (TrainingView(images, 32, seed=1, recipe=recipe) for _ in range(2))
    state = torch.get_rng_state()
    first = [one[0, index] for index in range(15)]
    torch.manual_seed(99)
    for index in reversed(range(15)):
        again = other[0, index]
        assert torch.equal(again.image, first[index].image)
        assert torch.equal(again.jitter, first[index].jitter)
        assert (again.label, again.index, again.problem) == (images.labels[index], index, "")
    assert not torch.equal(one[1, 3].image, first[3].image)
    assert not torch.equal(TrainingView(images, 32, seed=2, recipe=recipe)[0, 3].image, first[3].image)
    torch.set_rng_state(state)
    one[0, 0]
    assert torch.equal(torch.get_rng_state(), state)


def test_transforms_are_the_authors(photographs):
    path = photographs / "train" / "a" / "0.png"
    picture = Image.open(path).convert("RGB")
    chain = v2.Compose(
        [
            v2.Resize((48, 48), v2.InterpolationMode.BILINEAR),
            v2.CenterCrop(32),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    found = normalize(center_crop(load_image(path, 48), 32)[None])[0]
    torch.testing.assert_close(found, chain(picture))
    crops = [random_crop_flip(load_image(path, 34), 32, torch.Generator().manual_seed(seed)) for seed in range(200)]
    seen = {crop.numpy().tobytes() for crop in crops}
    assert len(seen) == 2 * 3 * 3  # every offset, mirrored and not


def test_folders_give_the_classes_of_training(photographs):
    test = folder_images(photographs, "test", 32)
    assert list(test.classes) == ["a", "b", "c"]
    assert [test[i][1] for i in range(4)] == [0, 0, 2, 2]
    assert test[0][0].shape == (3, 32, 32)
    assert test[0][0].dtype == torch.uint8
    assert len(folder_images(photographs, "train", 32)) == 15
    (photographs / "test" / "d").mkdir()
    with pytest.raises(ValueError, match="got class 'd'"):
        folder_images(photographs, "test", 32)
    with pytest.raises(ValueError, match="data_root must hold val/<class>/<picture>"):
        folder_images(photographs, "val", 32)
    (photographs / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match="every class of train must have pictures; got none in 'empty'"):
        folder_images(photographs, "train", 32)


def test_hidden_files_are_passed_over_and_nested_ones_found(photographs):
    picture = (photographs / "train" / "a" / "0.png").read_bytes()
    for name in ("train/.cache/0.png", "train/a/more/deep/0.PNG", "train/a/._0.png", "train/a/folder.jpg/note.txt"):
        path = photographs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
    images = folder_images(photographs, "train", 32)
    assert images.classes == ["a", "b", "c"]
    assert len(images) == 16
    assert len(folder_images(photographs, "test", 32, classes=["a", "c"])) == 4


def test_every_kind_of_picture_becomes_rgb_and_a_broken_one_is_named(tmp_path):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.fromarray((ramp / 257).round().astype(np.uint8)).save(tmp_path / "grey.png")
    assert torch.equal(load_image(tmp_path / "deep.png", 8), load_image(tmp_path / "grey.png", 8))
    assert load_image(tmp_path / "deep.png", 8).float().std() > 50
    for mode in ("RGBA", "P", "L", "1", "CMYK"):
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (9, 5)).save(path)
        assert load_image(path, 4).shape == (3, 4, 4)
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)).save(whole)
    (tmp_path / "half.jpg").write_bytes(whole.read_bytes()[:900])
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("1", (20000, 10000)).save(tmp_path / "bomb.png")
    Image.new("F", (4, 4)).save(tmp_path / "float.tif")
    for name in ("half.jpg", "text.jpg", "bomb.png", "float.tif"):
        with pytest.raises(ValueError, match=f"path must be a readable picture; got '.*{name}'"):
            load_image(tmp_path / name, 8)
    with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
        load_image(tmp_path / "none.jpg", 8)


def test_data_sets_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="got resize_size=32"):
        open_split("imagefolder", "train", 64, 32, "x")
    with pytest.raises(ValueError, match="img_size must be 64 for preset 'easy'; got img_size=448"):
        open_split("partbirds", "train", 448, 600, preset="easy")
    with pytest.raises(ValueError, match="got preset='huge'"):
        open_split("partbirds", "train", 64, 64, preset="huge")
    with pytest.raises(ValueError, match=f"{', '.join(DATASETS)}; got dataset='x'"):
        open_split("x", "train", 448, 600)


def reference_jitter(image, jitter, recipe):
    """torchvision's functions, one image at a time, on fp32 in [0, 1]."""
    image = image.float() / 255
    functions = (v2.functional.adjust_brightness, v2.functional.adjust_contrast, v2.functional.adjust_saturation)
    for kind in ORDERS[int(jitter[3])] if recipe.jitter else ():
        image = functions[kind](image, float(jitter[kind]))
    return v2.functional.normalize(image, recipe.mean, recipe.std)


@pytest.mark.parametrize("name", ["CUB", "car", "cifar10"])
@pytest.mark.parametrize("forced", ["cpp", "torch", "reference"])
@pytest.mark.parametrize("side", [20, 83])
def test_the_batched_chain_is_torchvisions(name, forced, side):
    if _missing(forced):
        pytest.skip(f"{forced} is missing here: {_missing(forced)}")
    recipe, generator = RECIPES[name], torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (24, 3, side, side), dtype=torch.uint8)
    jitter = torch.stack([draw_jitter(recipe.jitter, generator) for _ in images])
    expected = torch.stack([reference_jitter(image, one, recipe) for image, one in zip(images, jitter)])
    assert len(set(jitter[:, 3].tolist())) == (6 if recipe.jitter else 1)
    with use_backend(forced):
        found = augment(images, jitter, recipe)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
        reused = augment(images.flip(0), jitter.flip(0), recipe, out=found)
        torch.testing.assert_close(reused.flip(0), expected, rtol=1e-5, atol=2e-5)
        assert reused.data_ptr() == found.data_ptr()
        other = augment(images[:5].transpose(2, 3), None, recipe, out=found)  # strided, and of another shape
    torch.testing.assert_close(
        other, torch.stack([reference_jitter(i, None, replace(recipe, jitter=0.0)) for i in images[:5].transpose(2, 3)])
    )
    torch.testing.assert_close(normalize(images, recipe), normalize(images, replace(recipe, jitter=0.0)))


@pytest.mark.parametrize("forced", ["cpp", "torch", "reference"])
def test_the_forced_backend_augments(forced, monkeypatch):
    if _missing(forced):
        pytest.skip(f"{forced} is missing here: {_missing(forced)}")
    served = []
    monkeypatch.setattr(_load(forced), "augment", lambda *args: served.append(forced))
    with use_backend(forced):
        normalize(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    assert served == [forced]


JITTER = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
BAD_JITTER = {
    "too few rows": (JITTER, r"jitter must be \(2, 4\); got jitter.shape=\(1, 4\)"),
    "too few factors": (JITTER[:, :3].repeat(2, 1), r"got jitter.shape=\(2, 3\)"),
    "an order that is none": (torch.tensor([[1.0, 1.0, 1.0, 6.0]] * 2), r"orders must be 0 to 5; got \[6.0, 6.0\]"),
    "a negative order": (torch.tensor([[1.0, 1.0, 1.0, -1.0]] * 2), "orders must be 0 to 5"),
    "NaN": (torch.full((2, 4), torch.nan), "orders must be 0 to 5"),
}


@pytest.mark.parametrize(("jitter", "message"), BAD_JITTER.values(), ids=BAD_JITTER)
def test_bad_jitter_is_refused(jitter, message):
    images = torch.zeros(2, 3, 8, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        augment(images, jitter, RECIPES["CUB"])


def test_bad_images_are_refused():
    with pytest.raises(ValueError, match=r"images must be \(B, 3, S, S\); got images.shape=\(2, 4, 8, 8\)"):
        normalize(torch.zeros(2, 4, 8, 8, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"images must be uint8; got images.dtype=torch.float32"):
        normalize(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("out", [torch.zeros(2, 3, 4, 8).mT, torch.zeros(2, 3, 8, 4, dtype=torch.float64)])
def test_memory_that_does_not_fit_is_left_alone(out):
    images = torch.randint(0, 256, (2, 3, 8, 4), dtype=torch.uint8)
    result = augment(images, JITTER.repeat(2, 1), RECIPES["CUB"], out=out)
    assert torch.equal(result, augment(images, None, RECIPES["CUB"]))
    assert not out.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_augments_as_a_cpu_does():
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (24, 3, 20, 20), dtype=torch.uint8)
    jitter = torch.stack([draw_jitter(0.4, generator) for _ in images])
    there = augment(images.cuda(), jitter, RECIPES["CUB"]).cpu()
    torch.testing.assert_close(there, augment(images, jitter, RECIPES["CUB"]), rtol=1e-4, atol=1e-4)


def test_random_choices_have_the_distributions_of_the_authors_chain():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([draw_jitter(0.4, generator) for _ in range(6000)])
    assert 0.6 <= draws[:, :3].min() < 0.602
    assert 1.398 < draws[:, :3].max() <= 1.4
    ours = draws[:, :3].sort(0).values
    torch.testing.assert_close(ours, torch.linspace(0.6, 1.4, 6000)[:, None].expand(-1, 3), rtol=0, atol=0.02)
    assert torch.bincount(draws[:, 3].long(), minlength=6).tolist() == pytest.approx([1000] * 6, rel=0.12)
    ramp = torch.arange(40).expand(3, 40, 40).to(torch.uint8)  # a pixel tells its column
    crops = [random_crop_flip(ramp, 32, generator) for _ in range(3600)]
    flipped = [int(crop[0, 0, 0] > crop[0, 0, 1]) for crop in crops]
    assert sum(flipped) / 3600 == pytest.approx(0.5, abs=0.03)
    lefts = torch.tensor([int(crop[0, 0].min()) for crop in crops])
    assert torch.bincount(lefts, minlength=9).tolist() == pytest.approx([400] * 9, rel=0.2)


def test_policies_and_resized_crops_change_pictures_and_keep_their_size():
    image = load_gradient()
    generator = torch.Generator().manual_seed(0)
    state = torch.get_rng_state()
    for name in ("car", "cifar10"):
        views = [random_view(image, 32, RECIPES[name], generator)[0] for _ in range(20)]
        assert all(view.shape == (3, 32, 32) and view.dtype == torch.uint8 for view in views)
        assert len({view.numpy().tobytes() for view in views}) == 20
    assert torch.equal(torch.get_rng_state(), state)
    assert evaluation_view(image, 32, RECIPES["cifar10"]).shape == (3, 32, 32)
    assert torch.equal(evaluation_view(image, 32, PLAIN), center_crop(image, 32))


def load_gradient():
    ramp = torch.arange(48 * 48).view(48, 48) % 251
    return torch.stack([ramp, ramp.T, 250 - ramp]).to(torch.uint8)


def test_splitting_off_takes_its_share_of_every_class_and_never_the_last_image():
    labels = [0] * 20 + [1] * 10 + [2]
    kept, off = split_off(labels, 0.2, seed=1)
    assert sorted(kept + off) == list(range(31))
    assert [sum(labels[i] == label for i in off) for label in range(3)] == [4, 2, 0]
    assert split_off(labels, 0.2, seed=1) == (kept, off)
    assert split_off(labels, 0.2, seed=2)[1] != off
    for share in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=f"got val_split={share}"):
            split_off(labels, share, 0)
    with pytest.raises(ValueError, match="at least one of 31 images"):
        split_off(labels, 0.001, 0)


def test_a_subset_is_its_images(photographs):
    images = folder_images(photographs, "train", 32)
    some = ImageSubset(images, [14, 3])
    assert len(some) == 2
    assert torch.equal(some[0][0], images[14][0])
    assert some.labels == [2, 0]
    assert some.paths == [images.paths[14], images.paths[3]]


def test_a_resumed_sampler_goes_on_where_it_stopped_at_any_number_of_ranks():
    whole = [key for batch in StepSampler(17, 6, 10, seed=5) for key in batch]
    again = [key for batch in StepSampler(17, 6, 6, seed=5, start=24) for key in batch]
    assert again == whole[24:]
    ranks = [list(StepSampler(17, 3, 6, 5, rank, 2, start=24)) for rank in range(2)]
    assert [key for step in range(6) for rank in ranks for key in rank[step]] == whole[24:]


def spoil(path):
    path.write_bytes(path.read_bytes()[:60])


def test_a_picture_that_cannot_be_read_is_replaced_by_one_that_its_key_decides(photographs):
    spoil(photographs / "train" / "b" / "1.png")  # index 6
    one, other = (TrainingView(folder_images(photographs, "train", 48), 32, seed=4) for _ in range(2))
    sample = one[0, 6]
    assert sample.index != 6
    assert "1.png" in sample.problem
    assert sample.label == one.images.labels[sample.index]
    assert torch.equal(other[0, 6].image, sample.image)
    assert len({one[epoch, 6].index for epoch in range(10)}) > 3  # not always the same one
    assert one[0, 5].problem == ""
    with pytest.raises(ValueError, match=r"1\.png cannot be read"):
        EvaluationView(one.images, 32)[6]
    for path in (photographs / "train").rglob("*.png"):
        spoil(path)
    with pytest.raises(ValueError, match="10 in a row are not, the first .*png"):
        one[0, 6]


def cached(root, folder, **more):
    return open_split("imagefolder", "train", 32, 48, str(root), cache_dir=str(folder), **more)


def test_cached_pictures_are_the_decoded_ones_and_are_decoded_once(photographs, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="ffvt")
    plain = open_split("imagefolder", "train", 32, 48, str(photographs))
    images = cached(photographs, tmp_path / "cache", workers=2)
    assert all(torch.equal(images[i][0], plain[i][0]) and images[i][1] == plain[i][1] for i in range(15))
    assert "decoding 15 pictures to 0.00 GB" in caplog.text  # 15 * 3 * 48**2 bytes
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
        with pytest.raises(ValueError, match=r"readable picture; got .*1\.png"):
            images[6]
    assert caplog.text.count("1.png") == 1
    assert TrainingView(images, 32, seed=4)[0, 6].problem


def test_an_entry_appears_whole_or_not_at_all(photographs, tmp_path, monkeypatch):
    def fail(path, size):
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
    with pytest.raises(ValueError, match="must have 103680 bytes; delete .*cache"):
        cached(photographs, tmp_path / "cache")


def _open_in_child(paths, folder, sums):
    sums.put(int(open_cached(paths, 48, folder)[2].sum()))


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
