"""A trained model at work: `load` gives a `Classifier`, which knows what images become before the model sees them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

from ffvt.data.datasets import recipe_for
from ffvt.data.images import UNREADABLE, read_image, to_rgb, to_square, upright
from ffvt.data.threads import each_ahead
from ffvt.data.transforms import evaluation_view, normalize
from ffvt.errors import printable, require
from ffvt.model.registry import image_statistics, model_of
from ffvt.model.selection import without_registers
from ffvt.precision import PRECISIONS, autocast
from ffvt.train.checkpoint import find_checkpoint, load_checkpoint

Picture: TypeAlias = "str | Path | Image.Image | Tensor"  # a file, an opened picture, or pixels (3, H, W)
Found: TypeAlias = "list[tuple[str, float]]"  # the most probable classes of an image, best first

THREADS = 2  # that read ahead by default


class Refused(NamedTuple):
    """Stands in a stream for an image that cannot be had, such as an empty folder: its name, and why."""

    name: str
    error: Exception


class Prediction(NamedTuple):
    """What the model says of one image.

    Attributes:
        image: as it was given; of `Refused` its name.
        error: why there is no answer, or None; then the others are None.
        probabilities: (num_classes,) fp32, on the CPU.
        index: (L-1, K) int64, what each layer picked, or (H, 1), each head of a TransFG, where that was asked for.
    """

    image: Any
    error: Exception | None
    probabilities: Tensor | None
    index: Tensor | None


class Classifier:
    """A trained model with its classes and its transform: `classifier("photo.jpg")` names what is in it.

    Attributes:
        model: the model, in evaluation mode.
        classes: the classes' names, in the order of the logits.
        recipe: the normalisation, and how an image is cropped.
        facts: what the checkpoint says of its training: "options", "resize_size", "mean", "std", "step", the score.
        precision, batch_size: what `load` was given.
    """

    def __init__(self, model: nn.Module, facts: dict[str, Any], precision: str = "fp32", batch_size: int = 16) -> None:
        require(precision in PRECISIONS, "load", "precision", f"one of {', '.join(PRECISIONS)}", precision)
        require(batch_size >= 1, "load", "batch_size", "at least 1", batch_size)
        self.model, self.facts, self.precision, self.batch_size = model.eval(), facts, precision, batch_size
        self.classes: list[str] = facts["classes"]
        if "mean" in facts and "std" in facts:
            statistics = facts["mean"], facts["std"]
        else:  # of an earlier version, to which the weights' own were nothing
            statistics = image_statistics(facts["options"].get("model_type", ""))
        self.recipe = recipe_for(facts["options"], *statistics)
        self.fit: str = facts["options"].get("fit", "stretch")

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def transform(self, picture: Picture) -> Tensor:
        """What the model sees of a picture, normalised: `classifier.model(classifier.transform(p)[None])` gives logits.

        Files and PIL images are turned upright by their EXIF orientation. The published data sets are read without
        that, as their authors read them; so of their few turned files training and `ffvt evaluate` see another view.

        Args:
            picture: a file's path, a PIL image of any mode, or pixels (3, H, W) of any size, uint8 or floating-point in
                [0, 1].

        Returns:
            (3, S, S) fp32, on the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no readable image, or pixels of another shape or range (normalised ones go to the model).
            TypeError: it is none of the three.
        """
        return normalize(self.view(picture)[None], self.recipe)[0]

    def view(self, picture: Picture) -> Tensor:
        """The same before normalisation: uint8 (3, S, S)."""
        square = to_square(open_picture(picture), self.facts["resize_size"], self.fit)
        return evaluation_view(square, self.model.config.image_size, self.recipe)

    def region(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The part (left, top, right, bottom) of a picture of size (width, height) that the model sees, in pixels.

        Where pictures are padded to a square it reaches beyond the picture.
        """
        width, height = size
        if self.fit != "stretch":
            width = height = min(size) if self.fit == "crop" else max(size)
        seen = 1.0 if self.recipe.whole else self.model.config.image_size / self.facts["resize_size"]
        x, y, half_width, half_height = size[0] / 2, size[1] / 2, width * seen / 2, height * seen / 2
        return x - half_width, y - half_height, x + half_width, y + half_height

    def __call__(self, pictures: Picture | Iterable[Picture], top: int = 5) -> Found | list[Found]:
        """The `top` most probable classes, best first, each with its probability: [(class, probability), ...].

        Args:
            pictures: one picture, as `transform` takes it, or many of them: a list, or pixels (B, 3, H, W).
            top: how many classes, at most as many as there are.

        Returns:
            For one picture its list, for many a list of lists.

        Raises:
            FileNotFoundError, ValueError, TypeError: of the first picture that `transform` refuses.
        """
        require(top >= 1, "classifier", "top", "at least 1", top)
        is_one = isinstance(pictures, (str, Path, Image.Image)) or (isinstance(pictures, Tensor) and pictures.ndim < 4)
        found = []
        for prediction in self.stream([pictures] if is_one else pictures):
            if prediction.error is not None:
                raise prediction.error
            found.append(self.best(prediction.probabilities, top))
        return found[0] if is_one else found

    def best(self, probabilities: Tensor, top: int) -> Found:
        """The `top` most probable classes of (num_classes,) probabilities, best first."""
        values, labels = probabilities.topk(min(top, len(self.classes)))
        return list(zip([self.classes[label] for label in labels.tolist()], values.tolist()))

    def pick_by(self, criterion: str) -> None:
        """Picks by another criterion from now on, with the same weights.

        Args:
            criterion: a name of `ffvt.criteria`.

        Raises:
            ValueError: it is none, or the model is no FFVT that can have another.
        """
        config = self.model.config
        takes = getattr(config, "kind", "ffvt") == "ffvt" and config.feature_fusion and hasattr(config, "criterion")
        require(takes, "load", "criterion", "left out for a model that is no FFVT", criterion)
        model = model_of(replace(config, criterion=criterion))
        model.load_state_dict(self.model.state_dict())
        self.model = model.to(self.device).eval()

    def stream(
        self, pictures: Iterable[Picture | Refused], threads: int = 0, selection: bool = False
    ) -> Iterator[Prediction]:
        """A prediction for every picture, in order, while the next ones are read; memory stays constant.

        Args:
            pictures: as `transform` takes them; drawn only as far ahead as the next batches need.
            threads: that read ahead; 0 reads in between.
            selection: whether predictions tell what each layer picked.

        Raises:
            TypeError: an item is no picture. ValueError: a plain ViT is asked for its selection.
        """
        with closing(each_ahead(self._read, pictures, threads, self.batch_size + 2 * threads)) as read:
            batch = []
            for item in read:
                batch.append(item)
                if len(batch) == self.batch_size:
                    yield from self._predict(batch, selection)
                    batch = []
            yield from self._predict(batch, selection)

    def _read(self, picture: Picture | Refused) -> tuple[Any, Tensor | Exception]:
        """A picture beside its view, or beside why there is none."""
        if isinstance(picture, Refused):
            return picture
        try:
            return picture, self.view(picture)
        except UNREADABLE as error:
            return picture, error

    def _predict(self, batch: Sequence[tuple[Any, Tensor | Exception]], selection: bool) -> Iterator[Prediction]:
        views = [view for _, view in batch if isinstance(view, Tensor)]
        answers = iter(self._answer(torch.stack(views), selection) if views else ())
        for picture, view in batch:
            if isinstance(view, Exception):
                yield Prediction(picture, view, None, None)
                continue
            probabilities, index = next(answers)
            if probabilities.isfinite().all():
                yield Prediction(picture, None, probabilities, index)
            else:
                yield Prediction(picture, ValueError("the model's logits must be finite; got inf or NaN"), None, None)

    @torch.inference_mode()
    def _answer(self, views: Tensor, selection: bool) -> list[tuple[Tensor, Tensor | None]]:
        """Probabilities, and picks where asked for, of every view of a batch (B, 3, S, S)."""
        images = normalize(views.to(self.device), self.recipe)
        with autocast(self.device, self.precision):
            logits, picked = self.model.forward_with_selection(images) if selection else (self.model(images), None)
        index: list[Tensor | None] | Tensor = [None] * len(views)
        if picked is not None:
            config = self.model.config
            index = without_registers(picked.lines, config.num_prefix_tokens, config.num_tokens).cpu()
        return list(zip(logits.float().softmax(-1).cpu(), index))


def open_picture(picture: Picture) -> Image.Image:
    """A file, a PIL image or pixels (3, H, W) as an upright PIL image in RGB.

    Raises:
        FileNotFoundError, ValueError, TypeError: as `Classifier.transform`.
    """
    if isinstance(picture, (str, Path)):
        return read_image(picture)
    if isinstance(picture, Image.Image):
        return to_rgb(upright(picture))
    if not isinstance(picture, Tensor):
        raise TypeError(f"classifier: a picture must be a path, a PIL image or a tensor; got {type(picture).__name__}")
    shape = tuple(picture.shape)
    require(picture.ndim == 3 and shape[0] == 3 and min(shape) > 0, "classifier", "pixels", "(3, H, W)", shape)
    if picture.dtype != torch.uint8:
        if not picture.is_floating_point():
            raise TypeError(f"classifier: pixels must be uint8 or floating-point; got dtype={picture.dtype}")
        low, high = picture.min().item(), picture.max().item()
        within = low >= 0 and high <= 1  # false for NaN too
        require(within, "classifier", "pixels", "in [0, 1] (normalised ones go to .model)", (low, high))
        picture = (picture.float() * 255).round().to(torch.uint8)
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())


def load(
    folder: str | Path, *, device: str | torch.device = "auto", precision: str = "fp32", batch_size: int = 16
) -> Classifier:
    """A trained model, ready to classify.

        classifier = ffvt.load("output/mine")
        for name, probability in classifier("photo.jpg"):
            print(f"{probability:.1%} {name}")

    Args:
        folder: a run's folder, for its best model (else the last), or a checkpoint (`.../best`, `.../step-...`).
        device: "auto" (a GPU if there is one), or any of PyTorch's.
        precision: fp32, bf16 or fp16, of the forward under autocast.
        batch_size: images that the model sees at once, where many are given.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is damaged, the device is not there, or another argument does not hold.
    """
    checkpoint = load_checkpoint(find_checkpoint(folder))
    classifier = Classifier(checkpoint.model, checkpoint.facts, precision, batch_size)
    classifier.model.to(_find_device(device))
    return classifier


def _find_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:  # PyTorch's ways to say no
        raise ValueError(f"load: device must be one that is present; got device={printable(repr(device))}") from error
    return found
