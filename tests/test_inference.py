"""A trained model at work: classes in order, picks, and scores on its data set."""

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from ffvt.data.images import load_image
from ffvt.data.transforms import PLAIN, center_crop, normalize
from ffvt.inference import Classifier, evaluate_checkpoint, load
from ffvt.train.checkpoint import load_checkpoint
from ffvt.train.distributed import World
from ffvt.train.engine import train
from ffvt.train.options import TrainOptions
from tests.helpers import SMALL

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def trained(tmp_path, photographs):
    """A short run on the photographs, and three of their test files."""
    options = {**SMALL, "dataset": "imagefolder", "data_root": str(photographs), "resize_size": 72, "num_steps": 2}
    result = train(TrainOptions(**options, output_dir=str(tmp_path)))
    return result, sorted((photographs / "test").rglob("*.png"))[:3]


def test_a_classifier_gives_the_most_probable_classes_best_first(trained):
    result, paths = trained
    classifier = load(result.folder / "last")
    assert classifier.classes == ["a", "b", "c"]
    assert not classifier.model.training
    found = classifier(paths, top=2)
    images = normalize(torch.stack([center_crop(load_image(path, 72), 64) for path in paths]))
    expected = classifier.model(images).softmax(-1)
    for image, row in zip(found, expected.tolist()):
        best = sorted(zip(row, classifier.classes), key=lambda pair: -pair[0])[:2]
        assert [name for name, _ in image] == [name for _, name in best]
        assert [probability for _, probability in image] == pytest.approx([share for share, _ in best])
    assert [len(image) for image in classifier(paths, top=9)] == [3, 3, 3]


def test_what_is_selected_belongs_to_the_images_that_are_shown(trained):
    result, paths = trained
    classifier = load(result.folder / "last")
    images, names, selection = classifier.select(paths)
    torch.testing.assert_close(images, torch.stack([classifier.transform(path) for path in paths]))
    assert names == [image[0][0] for image in classifier(paths, top=1)]
    assert selection.index.shape == (3, SMALL["depth"] - 1, SMALL["num_token"])


def test_evaluating_a_checkpoint_repeats_the_score_of_its_training(trained):
    result, _ = trained
    score = evaluate_checkpoint(load(result.folder / "last"), ALONE)
    assert score.per_class == result.last.per_class
    assert score.loss == pytest.approx(result.last.loss, rel=1e-5)


def test_other_classes_and_unreadable_images_are_refused(trained, tmp_path):
    result, _ = trained
    classifier = load(result.folder / "last")
    for split in ("train", "test"):
        (tmp_path / "other" / split / "z").mkdir(parents=True)
        Image.new("RGB", (80, 80)).save(tmp_path / "other" / split / "z" / "0.png")
    with pytest.raises(ValueError, match="z"):
        evaluate_checkpoint(classifier, ALONE, data_root=str(tmp_path / "other"))
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png"):
        classifier([tmp_path / "broken.png"])


def test_a_classifier_normalises_as_its_run_did_and_older_checkpoints_still_load(trained):
    result, paths = trained
    checkpoint = load_checkpoint(result.folder / "last")
    older = {
        name: value for name, value in checkpoint.facts["options"].items() if name not in ("mean", "std", "augment")
    }
    assert Classifier(checkpoint.model, {**checkpoint.facts, "options": older}).recipe == PLAIN
    own = {**checkpoint.facts["options"], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.4, 0.3], "augment": "auto"}
    classifier = Classifier(checkpoint.model, {**checkpoint.facts, "options": own})
    assert (classifier.recipe.mean, classifier.recipe.std) == ((0.1, 0.2, 0.3), (0.5, 0.4, 0.3))
    images = torch.stack([classifier.transform(path) for path in paths])
    pixels = v2.functional.normalize(images / 255, [0.1, 0.2, 0.3], [0.5, 0.4, 0.3])
    expected = classifier.model(pixels).softmax(-1).max(-1).values.tolist()
    assert [found[0][1] for found in classifier(paths)] == pytest.approx(expected, rel=1e-5)
