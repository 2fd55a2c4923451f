"""The authors' chain of transforms, batched, on every backend; reading any picture."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from ffvt.data.images import load_image
from ffvt.data.transforms import (
    AUGMENTATIONS,
    ORDERS,
    PLAIN,
    RECIPES,
    Recipe,
    augment,
    augmented,
    center_crop,
    draw_jitter,
    erase,
    evaluation_view,
    normalize,
    random_view,
)
from ffvt.kernels.backends import _load, _missing, use_backend


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
    image, generator = load_image(path, 34), torch.Generator().manual_seed(0)
    crops = [random_view(image, 32, PLAIN, generator)[0] for _ in range(200)]
    seen = {crop.numpy().tobytes() for crop in crops}
    assert len(seen) == 2 * 3 * 3  # every offset, mirrored and not


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
        with pytest.raises(ValueError, match=f"path must be a readable image; got '.*{name}'"):
            load_image(tmp_path / name, 8)
    with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
        load_image(tmp_path / "none.jpg", 8)


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
    crops = [random_view(ramp, 32, PLAIN, generator)[0] for _ in range(3600)]
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


@pytest.mark.parametrize(("name", "digest"), [("", "108ee8bc6919356d"), ("CUB", "18fa298c63d26a54")])
def test_the_views_of_crop_and_flip_keep_their_bytes(name, digest):
    image = torch.randint(0, 256, (3, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    seen = hashlib.sha256()
    for seed in range(20):
        drawn = random_view(image, 32, RECIPES.get(name, PLAIN), torch.Generator().manual_seed(seed))
        for part in drawn[:2]:
            seen.update(part.contiguous().numpy().tobytes())
    assert seen.hexdigest().startswith(digest)


def torchvisions_view(image, recipe, policy, seed):
    """The definition: the crop, the flip and torchvision's transform, of the same draws."""
    generator = torch.Generator().manual_seed(seed)

    def seed_torchvision():
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))

    if recipe.crop and recipe.resized_crop:
        seed_torchvision()
        view = v2.RandomResizedCrop(32, scale=(recipe.resized_crop, 1.0), antialias=True)(image)
    elif recipe.crop:
        top, left = torch.randint(image.shape[-1] - 32 + 1, (2,), generator=generator).tolist()
        view = v2.functional.crop(image, top, left, 32, 32)
    else:
        view = v2.functional.center_crop(image, [32, 32])
    if recipe.flip and torch.rand((), generator=generator) < 0.5:
        view = v2.functional.horizontal_flip(view)
    if policy:
        seed_torchvision()
        view = policy(view)
    return view


def on_pillow(transform):
    return lambda view: v2.functional.pil_to_tensor(transform(v2.functional.to_pil_image(view)))


TORCHVISIONS = {
    "none": None,
    "flip": None,
    "crop": None,
    "jitter": None,
    "trivial": on_pillow(v2.TrivialAugmentWide(fill=[128] * 3)),
    "rand": on_pillow(v2.RandAugment(fill=[128] * 3)),
    "auto": v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, fill=[128] * 3),
}


@pytest.mark.parametrize("resized_crop", [0.0, 0.3])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_augmentation_is_torchvisions(name, resized_crop):
    recipe, image = replace(augmented(RECIPES["car"], name), resized_crop=resized_crop), load_gradient()
    views = [random_view(image, 32, recipe, torch.Generator().manual_seed(seed)) for seed in range(12)]
    for seed, (view, _, erased) in enumerate(views):
        assert torch.equal(view, torchvisions_view(image, recipe, TORCHVISIONS[name], seed))
        assert not erased.any()
    distinct = len({view.numpy().tobytes() for view, *_ in views})
    assert distinct == {"none": 1, "flip": 2}.get(name, 12)
    assert (recipe.jitter == 0.4) == (name == "jitter") == any(jitter[0] != 1 for _, jitter, _ in views)


def test_an_augmentation_takes_the_place_of_the_data_sets_random_part_alone():
    cifar = augmented(RECIPES["cifar10"], "crop")
    assert cifar == replace(RECIPES["cifar10"], flip=True)
    small = load_gradient()[:, :20, :20]  # as CIFAR's images are, smaller than what the model sees
    for name in AUGMENTATIONS:
        assert random_view(small, 32, augmented(cifar, name), torch.Generator())[0].shape == (3, 32, 32)
    assert augmented(RECIPES["CUB"], "crop") == PLAIN
    assert augmented(PLAIN, "jitter") == RECIPES["CUB"]
    with pytest.raises(ValueError, match="augment must be one of none, flip, .*; got augment='all'"):
        augmented(PLAIN, "all")


def test_erasing_is_torchvisions_on_normalised_pixels():
    recipe, images = Recipe(erasing=1.0), torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8)
    transform, rectangles, expected = v2.RandomErasing(p=1.0), [], []
    for seed, pixels in enumerate(normalize(images)):
        rectangles.append(random_view(images[seed], 32, recipe, torch.Generator().manual_seed(seed))[2])
        generator = torch.Generator().manual_seed(seed)
        torch.randint(1, (2,), generator=generator)  # the crop
        torch.rand((2,), generator=generator)  # the flip, and whether to erase
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        expected.append(transform.transform(pixels, transform.make_params([pixels])))
    found = normalize(images)
    erase(found, torch.stack(rectangles))
    assert torch.equal(found, torch.stack(expected))
    shares = torch.stack(rectangles)[:, 2:].prod(1) / 32**2
    assert 0.01 < shares.min() < shares.max() < 0.4


def test_erasing_takes_its_share_of_the_views_and_nothing_else_changes():
    image, generator = load_gradient(), torch.Generator().manual_seed(0)
    drawn = [random_view(image, 32, Recipe(erasing=0.25), generator)[2] for _ in range(2000)]
    assert sum(bool(rectangle.any()) for rectangle in drawn) / 2000 == pytest.approx(0.25, abs=0.03)
    plain, erased = (random_view(image, 32, Recipe(erasing=e), torch.Generator().manual_seed(1)) for e in (0.0, 1.0))
    assert torch.equal(plain[0], erased[0])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_evaluation_is_never_augmented(name):
    recipe, image = replace(augmented(PLAIN, name), resized_crop=0.1, erasing=1.0), load_gradient()
    assert torch.equal(evaluation_view(image, 32, recipe), center_crop(image, 32))
    batch = center_crop(image, 32)[None]
    assert torch.equal(normalize(batch, recipe), normalize(batch, PLAIN))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": (0.5, 0.5)}, "mean must be three finite numbers"),
        ({"mean": (0.5, 0.5, float("nan"))}, "mean must be three finite numbers"),
        ({"mean": "abc"}, "got mean='abc'"),
        ({"mean": 0.5}, "got mean=0.5"),
        ({"std": (0.2, 0.2, 0.0)}, "std must be three finite numbers above 0.0001"),
        ({"std": [0.2, 0.2, None]}, r"got std=\[0.2, 0.2, None\]"),
    ],
)
def test_bad_statistics_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^recipe: .*{message}"):
        Recipe(**changes)
