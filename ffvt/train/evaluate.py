"""Exact evaluation: every image counted once, at any number of ranks; and what the layers picked."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset, default_collate

from ffvt.data.sampling import EvaluationView
from ffvt.data.transforms import normalize
from ffvt.model.selection import SelectingModel
from ffvt.precision import autocast
from ffvt.train.distributed import World
from ffvt.train.loading import loading
from ffvt.train.signals import Stopped

log = logging.getLogger("ffvt")


@dataclass(frozen=True)
class SelectionStatistics:
    """What the layers of an FFVT picked, as means over images and layers; hit rates over the images with a box.

    Of a TransFG, whose heads pick, each head counts as a layer.

    Attributes:
        class_token_rate: fraction of layers that pick the class token.
        layer_overlap: fraction of a layer's picks that the next layer picks too; None where one layer picks.
        hit_rate: fraction of the picks on the object; None where no image has a box.
        random_hit_rate: the same for uniformly random picks among the candidates.
        layer_hit_rates: the hit rate of each layer, first to last; None also in what older versions wrote.
    """

    class_token_rate: float
    layer_overlap: float | None
    hit_rate: float | None
    random_hit_rate: float | None
    layer_hit_rates: list[float] | None = None


@dataclass(frozen=True)
class Score:
    """What an evaluation found: images counted, shares right at first and within the first five, mean loss.

    mean_class_top1: mean over the classes that have images of the share of them that is right. per_class: for each
    class how many images are right, and how many there are. selection: None for a plain ViT. problems: the images that
    were left out, as they cannot be read.
    """

    count: int
    top1: float
    top5: float
    loss: float
    mean_class_top1: float
    per_class: tuple[tuple[int, int], ...] = ()
    selection: SelectionStatistics | None = None
    problems: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """All but the classes and problems, as a plain dict for JSON; a loss that is not finite is None."""
        values = {name: value for name, value in asdict(self).items() if name not in ("per_class", "problems")}
        return {**values, "loss": self.loss if math.isfinite(self.loss) else None}

    @classmethod
    def from_summary(cls, summary: dict[str, Any]) -> Score:
        """The score whose `summary` this is."""
        selection, loss = summary["selection"], summary["loss"]
        changed = {
            "loss": math.nan if loss is None else loss,
            "selection": SelectionStatistics(**selection) if selection else None,
        }
        return cls(**{**summary, **changed})


@torch.no_grad()
def evaluate(
    model: nn.Module,
    view: EvaluationView,
    world: World,
    batch_size: int,
    precision: str = "fp32",
    workers: int = 0,
    stop: Callable[[], bool] = bool,
    each: Callable[[Tensor, Tensor], None] | None = None,
) -> Score:
    """Evaluates `model` on a view; each rank takes every world-size-th image.

    stop: says before every batch whether to stop; that of one rank is enough.
    each: is called with this rank's labels (B,) and logits (B, num_classes) of every batch, in the order of its images.

    Returns:
        The same Score on every rank.

    Raises:
        ValueError: nothing can be counted, or an image cannot be read.
        Stopped: `stop` said so.
    """
    if len(view) == 0:
        raise ValueError("evaluate: the data set must have images; got 0")
    shard = Subset(view, range(world.rank, len(view), world.size))
    layers, first = (model.num_selecting, model.first_candidate) if isinstance(model, SelectingModel) else (0, 0)
    sums = _Sums(len(view.images.classes), layers, first, world.device)
    problems: list[str] = []

    def fetch(batches: Iterator) -> Any:
        if stop():
            raise Stopped
        return next(batches, None)

    def score_batch(batch: Any) -> None:
        images = torch.zeros(1, 3, view.image_size, view.image_size, dtype=torch.uint8) if batch is None else batch[0]
        with autocast(world.device, precision):
            logits, index = _run(model, normalize(images.to(world.device), view.recipe))
        if batch is None:  # run all the same: a sharded model runs on all ranks or on none
            return
        problems.extend(problem for problem in batch.problem if problem)
        on_object = batch.on_object
        if layers:  # the view knows no token before the patches but the class token
            on_object = F.pad(on_object, (model.num_prefix_tokens - 1, 0))
        labels, *boxes = (values.to(world.device) for values in (batch.label, batch.has_box, on_object))
        sums.add(logits.float(), labels, index, *boxes)
        if each is not None:
            each(batch.label, logits.float())

    was_training = model.training
    model.eval()
    try:
        # eager: a compiled model would be compiled anew for evaluation, and again for the size of its last batch
        with torch.compiler.set_stance("force_eager"), ExitStack() as stack:
            # no rank runs the model, or leaves, unless all do
            loader = loading(shard, default_collate, workers, batch_size=batch_size)
            batches = world.on_all(lambda: stack.enter_context(loader))
            for _ in range(0, len(range(0, len(view), world.size)), batch_size):  # as many as the longest shard has
                batch = world.on_all(lambda: fetch(batches))
                world.on_all(lambda batch=batch: score_batch(batch))
    finally:
        model.train(was_training)
    score = sums.score(world, problems)
    for problem in score.problems if world.is_main else ():
        if problem not in view.reported:
            view.reported.add(problem)
            log.warning("evaluate: an image cannot be read and is not counted: %s", problem)
    return score


def _run(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits, and the picks of a model that selects, (B, L-1, K), or (B, H, 1) of its heads."""
    if not isinstance(model, SelectingModel):
        return model(images), None
    logits, selection = model.forward_with_selection(images)
    return logits, selection.lines


def hit_rates(index: Tensor, on_object: Tensor) -> Tensor:
    """The fraction of each layer's picks that lie on the object.

    Args:
        index: (B, L-1, K) int64, the picks.
        on_object: (B, N) bool, which tokens overlap the object; the class token never does. A pick of N, the token of
            those that token reduction dropped, does not either.

    Returns:
        (B, L-1) fp64.
    """
    on_object = F.pad(on_object, (0, 1))
    return on_object[:, None].expand(-1, index.shape[1], -1).gather(2, index).double().mean(2)


def random_hit_rates(on_object: Tensor, first_candidate: int) -> Tensor:
    """The same for uniformly random picks among the candidates, tokens `first_candidate` to N-1: (B,) fp64."""
    return on_object[:, first_candidate:].double().mean(1)


class _Sums:
    """Counts over batches: per class, and of the picks."""

    def __init__(self, num_classes: int, layers: int, first_candidate: int, device: torch.device) -> None:
        self.layers, self.first_candidate = layers, first_candidate
        self.per_class = torch.zeros(2, num_classes, dtype=torch.int64, device=device)  # right, all
        self.scores = torch.zeros(2, dtype=torch.float64, device=device)  # right within five, loss
        # images, picks of the class token, overlap, images with a box, hits by chance, hits of every layer
        self.picks = torch.zeros(5 + layers, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor, index: Tensor | None, has_box: Tensor, on_object: Tensor) -> None:
        counted = labels >= 0
        logits, labels = logits[counted], labels[counted]
        top = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        self.per_class[0].index_add_(0, labels, top[:, 0].long())
        self.per_class[1].index_add_(0, labels, torch.ones_like(labels))
        loss = F.cross_entropy(logits, labels, reduction="sum")
        self.scores += torch.stack([top.sum().double(), loss.double()])
        if index is not None:
            self._add_picks(index[counted], has_box[counted], on_object[counted])

    def _add_picks(self, index: Tensor, has_box: Tensor, on_object: Tensor) -> None:
        self.picks[0] += len(index)
        self.picks[1] += (index == 0).any(2).double().mean(1).sum()
        if self.layers > 1:
            again = (index[:, :-1, :, None] == index[:, 1:, None, :]).any(3)
            self.picks[2] += again.double().mean((1, 2)).sum()
        if has_box.any():
            index, on_object = index[has_box], on_object[has_box]
            self.picks[3] += len(index)
            self.picks[4] += random_hit_rates(on_object, self.first_candidate).sum()
            self.picks[5:] += hit_rates(index, on_object).sum(0)

    def score(self, world: World, problems: list[str]) -> Score:
        """The score of all ranks; `problems` are this one's images that were left out."""
        everywhere = tuple(problem for part in world.gather(problems) for problem in part)
        right, count = world.sum(self.per_class).tolist()
        top5, loss = world.sum(self.scores).tolist()
        total = sum(count)
        if total == 0:
            first = f"; the first that cannot be read: {everywhere[0]}" if everywhere else ""
            raise ValueError(f"evaluate: the data set must have readable images; got 0{first}")
        by_class = [a / b for a, b in zip(right, count) if b]
        return Score(
            total,
            sum(right) / total,
            top5 / total,
            loss / total,
            sum(by_class) / len(by_class),
            tuple(zip(right, count)),
            self._selection(world),
            everywhere,
        )

    def _selection(self, world: World) -> SelectionStatistics | None:
        images, class_token, overlap, boxed, chance, *hits = world.sum(self.picks).tolist()
        if not images:
            return None
        layer_hit_rates = [hit / boxed for hit in hits] if boxed else None
        return SelectionStatistics(
            class_token / images,
            overlap / images if self.layers > 1 else None,
            sum(layer_hit_rates) / self.layers if layer_hit_rates else None,
            chance / boxed if boxed else None,
            layer_hit_rates,
        )
