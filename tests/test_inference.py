"""A trained model at work: what it takes, what it answers, and how much it holds at once."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import ffvt
from ffvt.data.images import load_image
from ffvt.data.transforms import PLAIN, center_crop, normalize
from ffvt.inference import Classifier, Refused
from tests.helpers import write_checkpoint


@pytest.fixture
def run(tmp_path):
    return write_checkpoint(tmp_path / "run")


@pytest.fixture
def paths(photographs):
    return sorted((photographs / "test").rglob("*.png"))[:3]


def answers(classifier, images):
    return classifier.model(images).softmax(-1)


def test_a_classifier_gives_the_most_probable_classes_best_first(run, paths):
    classifier = ffvt.load(run)
    assert classifier.classes == ["a", "b", "c"]
    assert not classifier.model.training
    found = classifier(paths, top=2)
    images = normalize(torch.stack([center_crop(load_image(path, 72), 64) for path in paths]))
    for image, row in zip(found, answers(classifier, images).tolist()):
        best = sorted(zip(row, classifier.classes), key=lambda pair: -pair[0])[:2]
        assert [name for name, _ in image] == [name for _, name in best]
        assert [probability for _, probability in image] == pytest.approx([share for share, _ in best])
    assert [len(image) for image in classifier(paths, top=9)] == [3, 3, 3]


def test_a_runs_folder_gives_its_best_model_else_its_last_and_a_checkpoint_itself(run):
    write_checkpoint(run.parent / "other", ["x", "y"])
    (run / "last").unlink()
    (run / "last").symlink_to(run.parent / "other" / "last")
    assert ffvt.load(run).classes == ["a", "b", "c"]
    assert ffvt.load(run / "last").classes == ["x", "y"]
    (run / "best").unlink()
    assert ffvt.load(run).classes == ["x", "y"]
    with pytest.raises(FileNotFoundError, match="training.json"):
        ffvt.load(run.parent)


def test_one_picture_gives_one_answer_whatever_it_comes_as(run, paths):
    classifier = ffvt.load(str(run))
    expected = classifier(str(paths[0]))
    image = Image.open(paths[0])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for given in (paths[0], image, pixels, pixels / 255, pixels.double() / 255):
        assert classifier(given) == expected
        assert classifier([given])[0] == expected
    both = classifier(pixels[None].expand(2, -1, -1, -1))
    assert [dict(found) for found in both] == [pytest.approx(dict(expected), abs=1e-6)] * 2
    assert classifier(iter([paths[0]])) == [expected]


def test_the_transform_gives_what_the_model_sees(run, paths):
    classifier = ffvt.load(run)
    seen = classifier.transform(paths[0])
    assert (seen.shape, seen.dtype) == ((3, 64, 64), torch.float32)
    name, probability = classifier(paths[0], top=1)[0]
    logits = classifier.model(seen[None])[0]
    assert classifier.classes[logits.argmax()] == name
    assert logits.softmax(-1).max().item() == pytest.approx(probability)


def test_pictures_are_turned_upright(run, tmp_path):
    upright = Image.effect_noise((40, 60), 80).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
    classifier = ffvt.load(run)
    for lying in (tmp_path / "lying.png", Image.open(tmp_path / "lying.png")):
        assert torch.equal(classifier.view(lying), classifier.view(upright))


@pytest.mark.parametrize(
    ("picture", "error", "message"),
    [
        (3, TypeError, "must be a path, a PIL image or a tensor; got int"),
        (np.zeros((3, 8, 8)), TypeError, "got ndarray"),
        (torch.zeros(8, 8), ValueError, r"\(3, H, W\); got pixels=\(8, 8\)"),
        (torch.zeros(1, 8, 8), ValueError, r"got pixels=\(1, 8, 8\)"),
        (torch.zeros(3, 0, 8), ValueError, r"got pixels=\(3, 0, 8\)"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), TypeError, "got dtype=torch.int64"),
        (torch.full((3, 8, 8), 1.5), ValueError, r"in \[0, 1\] \(normalised ones go to .model\)"),
        (torch.full((3, 8, 8), float("nan")), ValueError, "got pixels=.nan, nan."),
        ("missing.png", FileNotFoundError, "missing.png"),
    ],
)
def test_what_is_no_picture_is_refused(run, picture, error, message):
    with pytest.raises(error, match=message):
        ffvt.load(run).transform(picture)


def test_unreadable_files_and_bad_arguments_are_refused(run, tmp_path):
    classifier = ffvt.load(run)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png"):
        classifier([tmp_path / "broken.png"])
    for given, message in (
        ({"device": "moon"}, "got device='moon'"),
        ({"device": "cuda:99"}, "got device='cuda:99'"),
        ({"device": "m" * 10**6}, r"^load: device .{,300}$"),
        ({"precision": "fp8"}, "got precision='fp8'"),
        ({"batch_size": 0}, "got batch_size=0"),
    ):
        with pytest.raises(ValueError, match=message):
            ffvt.load(run, **given)
    with pytest.raises(ValueError, match="got top=0"):
        classifier([], top=0)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_stream_answers_in_order_and_an_unreadable_image_costs_its_own_answer(run, paths, threads):
    classifier = ffvt.load(run, batch_size=2)
    refused = Refused("empty", ValueError("the folder has no images"))
    given = [paths[0], "missing.png", refused, paths[1], paths[2]]
    found = list(classifier.stream(given, threads, selection=True))
    assert [prediction.image for prediction in found] == [*given[:2], "empty", *given[3:]]
    assert [prediction.error is None for prediction in found] == [True, False, False, True, True]
    expected = answers(classifier, torch.stack([classifier.transform(path) for path in paths]))
    readable = [found[place] for place in (0, 3, 4)]
    torch.testing.assert_close(torch.stack([prediction.probabilities for prediction in readable]), expected)
    _, selection = classifier.model.forward_with_selection(classifier.transform(paths[2])[None])
    assert torch.equal(readable[2].index, selection.index[0])


def test_a_stream_draws_pictures_only_as_far_ahead_as_it_needs_them(run):
    classifier, drawn = ffvt.load(run, batch_size=4), 0

    def pictures():
        nonlocal drawn
        while drawn < 100:
            drawn += 1
            yield torch.zeros(3, 8, 8, dtype=torch.uint8)

    ahead = [drawn - done for done, _ in enumerate(classifier.stream(pictures(), threads=3))]
    assert len(ahead) == 100
    assert max(ahead) <= 4 + (4 + 2 * 3) + 1


def test_a_stream_that_is_left_ends_its_threads(run):
    before = threading.active_count()
    stream = ffvt.load(run, batch_size=1).stream((torch.zeros(3, 8, 8, dtype=torch.uint8) for _ in range(50)), 2)
    next(stream)
    assert threading.active_count() > before
    stream.close()
    assert threading.active_count() == before


def test_logits_that_are_not_finite_are_an_error_and_no_class(run, paths):
    classifier = ffvt.load(run)
    torch.nn.init.constant_(classifier.model.head.bias, float("nan"))
    with pytest.raises(ValueError, match="logits must be finite"):
        classifier(paths[0])


def test_lower_precision_is_close(run, paths):
    exact, rounded = (dict(ffvt.load(run, precision=p)(paths[0])) for p in ("fp32", "bf16"))
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize(
    ("fit", "size", "region", "recipe"),
    [
        ("stretch", (144, 72), (8, 4, 136, 68), {}),
        ("crop", (144, 72), (40, 4, 104, 68), {}),
        ("pad", (144, 72), (8, -28, 136, 100), {}),
        ("stretch", (144, 72), (8, 4, 136, 68), {"resized_crop": 0.3}),
        ("stretch", (144, 72), (0, 0, 144, 72), {"whole": True}),
    ],
)
def test_the_region_is_what_is_left_of_a_picture_after_fit_and_crop(run, fit, size, region, recipe):
    classifier = ffvt.load(run)
    classifier.fit, classifier.recipe = fit, replace(classifier.recipe, **recipe)
    assert classifier.region(size) == pytest.approx(region)  # 64 of 72 pixels are kept


def test_a_classifier_normalises_as_its_run_did_and_older_checkpoints_still_load(run, paths):
    loaded = ffvt.load(run)
    assert loaded.recipe == PLAIN
    own = {**loaded.facts["options"], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.4, 0.3], "augment": "auto"}
    classifier = Classifier(loaded.model, {**loaded.facts, "options": own})
    assert (classifier.recipe.mean, classifier.recipe.std) == ((0.1, 0.2, 0.3), (0.5, 0.4, 0.3))
    view = classifier.view(paths[0])
    expected = v2.functional.normalize(view / 255, [0.1, 0.2, 0.3], [0.5, 0.4, 0.3])
    torch.testing.assert_close(classifier.transform(paths[0]), expected)
