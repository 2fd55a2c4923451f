"""The order in which samples are drawn, and what is drawn of each: decided by (seed, epoch, index) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from ffvt.data.datasets import ImageSet, describe
from ffvt.data.images import UNREADABLE
from ffvt.data.transforms import PLAIN, Recipe, evaluation_view, patches_in_box, random_view

MAX_REPLACEMENTS = 10  # unreadable pictures drawn in a row before it is no single picture's fault
SKIPPED = -1  # label of a picture that could not be read and is not to be counted


class TrainingSample(NamedTuple):
    """image (3, S, S) uint8, perhaps a view; label; index; jitter (4,) for `augment`; erased (4,) for `erase`; the
    problem: what went wrong, or ""."""

    image: Tensor
    label: int
    index: int
    jitter: Tensor
    erased: Tensor
    problem: str


class EvaluationSample(NamedTuple):
    """image (3, S, S) uint8, its label (`SKIPPED` if it cannot be read), whether it has a box, and on_object (N,) bool,
    which tokens overlap that; why it cannot be read, or ""."""

    image: Tensor
    label: int
    has_box: bool
    on_object: Tensor
    problem: str = ""


class TrainingBatch(NamedTuple):
    """Samples side by side: image (B, 3, S, S) uint8, label (B,), index (B,), jitter and erased (B, 4) or None, the
    problems as a list."""

    image: Tensor
    label: Tensor
    index: Tensor
    jitter: Tensor | None
    erased: Tensor | None
    problem: list[str]


class TrainingView(Dataset):
    """A split under the random transforms. The key of a sample is (epoch, index), and it decides the sample alone.

    A picture that cannot be read is replaced by another, which the key decides too; the sample says so. A loader gets
    whole batches (`collate_fn=batch_as_it_is`): each view is written where it stays.
    """

    def __init__(self, images: ImageSet, image_size: int, seed: int, recipe: Recipe = PLAIN) -> None:
        self.images, self.image_size, self.seed, self.recipe = images, image_size, seed, recipe

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> TrainingBatch:
        shape = (len(keys), 3, self.image_size, self.image_size)
        images = torch.empty(shape, dtype=torch.uint8)
        if get_worker_info() is not None:
            images = images.share_memory_()  # before it is filled, so that the way to the trainer costs no copy
        rest = []
        for row, key in zip(images, keys):
            image, *others = self[key]
            row.copy_(image)
            rest.append(others)
        labels, indices, jitter, erased, problems = zip(*rest)
        facts = (torch.tensor(labels), torch.tensor(indices), torch.stack(jitter), torch.stack(erased))
        return TrainingBatch(images, *facts, list(problems))

    def __getitem__(self, key: tuple[int, int]) -> TrainingSample:
        epoch, index = key
        problem = ""
        for attempt in range(MAX_REPLACEMENTS):
            chosen = index if attempt == 0 else mix(self.seed, epoch, index, attempt) % len(self.images)
            try:
                image, label = self.images[chosen]
            except UNREADABLE as error:
                problem = problem or f"{describe(self.images, chosen)}: {error}"
                continue
            generator = torch.Generator().manual_seed(mix(self.seed, epoch, index))
            view, jitter, erased = random_view(image, self.image_size, self.recipe, generator)
            return TrainingSample(view, label, chosen, jitter, erased, problem)
        raise ValueError(f"train: pictures must be readable; {MAX_REPLACEMENTS} in a row are not, the first {problem}")


def batch_as_it_is(batch: TrainingBatch) -> TrainingBatch:
    """The collate function of a loader whose data set makes batches."""
    return batch


class EvaluationView(Dataset):
    """A split under the deterministic transforms.

    grid_size: patches along a side; where given and the set has boxes, samples tell which tokens are on the object.
    overlap: side of a patch and pixels from one to the next, where patches overlap.
    skip_bad: pass over pictures that cannot be read (label `SKIPPED`) instead of raising ValueError.
    """

    def __init__(
        self,
        images: ImageSet,
        image_size: int,
        recipe: Recipe = PLAIN,
        grid_size: int = 0,
        skip_bad: bool = False,
        overlap: tuple[int, int] | None = None,
    ) -> None:
        self.images, self.image_size, self.recipe = images, image_size, recipe
        self.grid_size, self.skip_bad, self.overlap = grid_size, skip_bad, overlap
        self.reported: set[str] = set()  # problems that were told

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> EvaluationSample:
        problem = ""
        try:
            image, label = self.images[index]
        except UNREADABLE as error:
            if not self.skip_bad:
                raise ValueError(f"evaluate: {describe(self.images, index)} cannot be read: {error}") from error
            problem = f"{describe(self.images, index)}: {error}"
            image, label = torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8), SKIPPED
        view = evaluation_view(image, self.image_size, self.recipe)
        find = getattr(self.images, "relative_box", None)
        box = find(index) if find and self.grid_size and label != SKIPPED else None
        return EvaluationSample(view, label, box is not None, self._on_object(box, image.shape[-1]), problem)

    def _on_object(self, box: tuple[float, float, float, float] | None, side: int) -> Tensor:
        """Which tokens overlap the box, the class token never: (1 + grid_size**2,)."""
        if box is None:
            return torch.zeros(1 + self.grid_size**2, dtype=torch.bool)
        start = (side - self.image_size) // 2
        left, top, right, bottom = (edge * side - start for edge in box)
        whole = self.image_size / self.grid_size
        size, stride = self.overlap or (whole, whole)
        patches = patches_in_box((left, top, right, bottom), size, self.grid_size, stride)
        return torch.nn.functional.pad(patches, (1, 0))  # the class token is no patch


class StepSampler(Sampler):
    """For each step, the keys (epoch, index) of one rank's batch.

    The training stream is one permutation of the data after the other; all ranks together take its samples
    [start + t*G, start + (t+1)*G) in their t-th step, with G = batch_size * world_size, and rank r the r-th part of
    them. So the global order does not depend on the number of ranks, no sample is dropped, and a batch may hold the end
    of one epoch and the start of the next. `start` is how many samples an interrupted run had drawn.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        num_steps: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        self.num_samples, self.batch_size, self.num_steps, self.seed = num_samples, batch_size, num_steps, seed
        self.rank, self.world_size, self.start = rank, world_size, start
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.num_steps):
            first = self.start + (step * self.world_size + self.rank) * self.batch_size
            yield [self._key(position) for position in range(first, first + self.batch_size)]

    def _key(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.num_samples)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.num_samples, self.seed, epoch, -1)
        return epoch, int(self._order[offset])


class BalancedSampler(StepSampler):
    """A `StepSampler` whose stream holds every class equally often.

    The stream is one permutation of the classes after the other; each class takes its own images in one permutation
    after the other. The epoch in a sample's key is how often its class has been gone through, so no key comes twice.

    Raises:
        ValueError: a class has no image.
    """

    def __init__(
        self,
        labels: Sequence[int],
        classes: Sequence[str],
        batch_size: int,
        num_steps: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        super().__init__(len(labels), batch_size, num_steps, seed, rank, world_size, start)
        class_counts(labels, classes, "balanced_sampling")
        self.members: list[list[int]] = [[] for _ in classes]
        for index, label in enumerate(labels):
            self.members[label].append(index)
        self._round, self._classes = -1, torch.empty(0, dtype=torch.int64)
        self._orders = [(-1, torch.empty(0, dtype=torch.int64))] * len(classes)  # of each: which pass, its order

    def _key(self, position: int) -> tuple[int, int]:
        turn, place = divmod(position, len(self.members))
        if turn != self._round:
            self._round, self._classes = turn, permutation(len(self.members), self.seed, turn, -3)
        label = int(self._classes[place])
        members = self.members[label]
        epoch, offset = divmod(turn, len(members))
        if epoch != self._orders[label][0]:
            self._orders[label] = epoch, permutation(len(members), self.seed, epoch, label, -3)
        return epoch, members[self._orders[label][1][offset]]


def permutation(count: int, *decided_by: int) -> Tensor:
    """The numbers below `count` in an order that the other numbers decide, (count,) int64."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix(*decided_by)))


def class_counts(labels: Sequence[int], classes: Sequence[str], option: str) -> Tensor:
    """How many images each class has: (C,) int64.

    Raises:
        ValueError: a class has none, which the option does not allow.
    """
    counts = torch.bincount(torch.tensor(labels, dtype=torch.int64), minlength=len(classes))
    if not counts.all():
        name = classes[int((counts == 0).nonzero()[0])]
        raise ValueError(f"train: {option} needs training images of every class; got none of {name[:100]!r}")
    return counts


def class_weights(kind: str, counts: Tensor) -> Tensor:
    """Weights of the classes in the loss, whose mean over the training images is 1, so that the loss keeps its size.

    Args:
        kind: "inverse": one over the class's count, "sqrt": one over its root.
        counts: of each class, (C,).

    Returns:
        (C,) fp32.
    """
    weights = counts.double() ** {"inverse": -1.0, "sqrt": -0.5}[kind]
    return (weights * counts.sum() / (weights * counts).sum()).float()


def split_off(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices kept and indices split off: `share` of every class, rounded, but never a class's last image.

    Raises:
        ValueError: share is not in (0, 1), or so small that nothing is split off.
    """
    if not 0 < share < 1:
        raise ValueError(f"val_split must be in (0, 1); got val_split={share}")
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    off: set[int] = set()
    for label, indices in members.items():
        order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(mix(seed, label, -2)))
        off.update(indices[i] for i in order[: min(round(share * len(indices)), len(indices) - 1)].tolist())
    if not off:
        raise ValueError(f"val_split must split off at least one of {len(labels)} images; got val_split={share}")
    return [i for i in range(len(labels)) if i not in off], sorted(off)


def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers, so that neighbouring numbers give unrelated seeds (splitmix64)."""
    state = 0
    for number in numbers:
        state = (state ^ (number & (2**64 - 1))) + 0x9E3779B97F4A7C15 & (2**64 - 1)
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ state >> 27) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state >> 1
