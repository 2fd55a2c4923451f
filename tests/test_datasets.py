"""Data sets, transforms and the order of samples: the authors' chain, any picture, any number of ranks."""

import numpy as np
import pytest
import torch
from PIL import Image

from ffvt.data.datasets import DATASETS, FolderImages, StepSampler, TrainingView, open_split
from ffvt.data.transforms import center_crop, load_image, normalize, random_crop_flip


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


def test_a_sample_is_decided_by_seed_epoch_and_index_alone(photographs):
    images = FolderImages(photographs, "train", 48)
    one, other = TrainingView(images, 32, seed=1), TrainingView(images, 32, seed=1)
    state = torch.get_rng_state()
    first = [one[0, index][0] for index in range(15)]
    torch.manual_seed(99)
    assert all(torch.equal(other[0, index][0], first[index]) for index in reversed(range(15)))
    assert not torch.equal(one[1, 3][0], first[3])
    assert not torch.equal(TrainingView(images, 32, seed=2)[0, 3][0], first[3])
    torch.set_rng_state(state)
    TrainingView(images, 32, seed=1)[0, 0]
    assert torch.equal(torch.get_rng_state(), state)


def test_transforms_are_the_authors(photographs):
    from torchvision.transforms import v2

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
    test = FolderImages(photographs, "test", 32)
    assert list(test.classes) == ["a", "b", "c"]
    assert [test[i][1] for i in range(4)] == [0, 0, 2, 2]
    assert test[0][0].shape == (3, 32, 32)
    assert test[0][0].dtype == torch.uint8
    assert len(FolderImages(photographs, "train", 32)) == 15
    (photographs / "test" / "d").mkdir()
    with pytest.raises(ValueError, match="got class 'd'"):
        FolderImages(photographs, "test", 32)
    with pytest.raises(ValueError, match="data_root must hold val/<class>/<picture>"):
        FolderImages(photographs, "val", 32)
    (photographs / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match="every class of train must have pictures; got none in 'empty'"):
        FolderImages(photographs, "train", 32)


def test_hidden_files_are_passed_over_and_nested_ones_found(photographs):
    picture = (photographs / "train" / "a" / "0.png").read_bytes()
    for name in ("train/.cache/0.png", "train/a/more/deep/0.PNG", "train/a/._0.png", "train/a/folder.jpg/note.txt"):
        path = photographs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
    images = FolderImages(photographs, "train", 32)
    assert images.classes == ["a", "b", "c"]
    assert len(images) == 16
    assert len(FolderImages(photographs, "test", 32, classes=["a", "c"])) == 4


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
    with pytest.raises(ValueError, match="'CUB' has no reader in this version"):
        open_split("CUB", "train", 448, 600)
    with pytest.raises(ValueError, match=f"{', '.join(DATASETS)}; got dataset='x'"):
        open_split("x", "train", 448, 600)
