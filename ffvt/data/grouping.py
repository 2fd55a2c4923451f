"""Batches of several images of each of their classes, as a loss over pairs of images wants them."""

from __future__ import annotations

from collections.abc import Sequence

from ffvt.data.sampling import StepSampler, class_counts, permutation
from ffvt.errors import require


class GroupSampler(StepSampler):
    """A `StepSampler` whose batches hold m = batch_size / n classes with n images each, side by side.

    The stream is cut into blocks of one batch of one rank. One permutation of the classes after the other fills them, m
    different classes a block; fewer than m that are left of a permutation sit it out. At each permutation a class has n
    further images of its own, in one permutation of them after the other, of which fewer than n that are left sit it
    out too; a class of fewer than n images repeats them, each time under another key. So no class comes twice in a
    batch, every class comes equally often in the long run, and the order does not depend on the number of ranks.

    Args:
        images_per_class: n, which divides batch_size.

    Raises:
        ValueError: a class has no image, or there are fewer classes than m.
    """

    def __init__(
        self,
        labels: Sequence[int],
        classes: Sequence[str],
        images_per_class: int,
        batch_size: int,
        num_steps: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        super().__init__(len(labels), batch_size, num_steps, seed, rank, world_size, start)
        check_groups(labels, classes, images_per_class, batch_size)
        self.images_per_class = images_per_class
        self.members: list[list[int]] = [[] for _ in classes]
        for index, label in enumerate(labels):
            self.members[label].append(index)
        self._round, self._classes = -1, permutation(0)
        self._orders = [(-1, permutation(0))] * len(classes)  # of each: which pass, its order

    def _key(self, position: int) -> tuple[int, int]:
        groups = self.batch_size // self.images_per_class  # m
        block, place = divmod(position, self.batch_size)
        turn, block = divmod(block, len(self.members) // groups)
        group, place = divmod(place, self.images_per_class)
        if turn != self._round:
            self._round, self._classes = turn, permutation(len(self.members), self.seed, turn, -5)
        return self._image(int(self._classes[block * groups + group]), turn, place)

    def _image(self, label: int, turn: int, place: int) -> tuple[int, int]:
        """The key of a class's image at a place of its group in a permutation of the classes."""
        members, size = self.members[label], self.images_per_class
        done, part = divmod(turn, max(len(members) // size, 1))  # passes over the class's images
        if done != self._orders[label][0]:
            self._orders[label] = done, permutation(len(members), self.seed, done, label, -5)
        repeat, offset = divmod(part * size + place, len(members))
        return done * -(-size // len(members)) + repeat, members[self._orders[label][1][offset]]


def check_groups(labels: Sequence[int], classes: Sequence[str], images_per_class: int, batch_size: int) -> None:
    """Refuses labels of which no batch of groups can be made.

    Raises:
        ValueError: a class has no image, or a batch would have more classes than there are.
    """
    class_counts(labels, classes, "images_per_class")
    must = f"at least train_batch_size / classes = {batch_size / len(classes):.4g}"
    fits = batch_size // images_per_class <= len(classes)
    require(fits, "train", "images_per_class", must, images_per_class)
