"""Ranks that do not do the same are refused, with what differs and who has it."""

import pytest
import torch

from ffvt.train import agreement
from ffvt.train.agreement import OWN, check_options, check_same
from ffvt.train.distributed import World
from ffvt.train.options import TrainOptions
from tests.helpers import SMALL


@pytest.fixture
def two(monkeypatch):
    """Rank 1 of 2; the main rank's facts are those that the test gives."""
    monkeypatch.setattr(World, "gather", lambda self, value: [None, value])

    def of_main(facts):
        monkeypatch.setattr(World, "on_main", lambda self, function: facts)
        return World(1, 2, torch.device("cpu"))

    return of_main


def test_the_first_difference_is_named_with_both_values_and_ranks(two):
    world = two({"seed": 1, "steps": 2})
    check_same(world, {"seed": 1, "steps": 2})
    with pytest.raises(ValueError, match="^train: steps must be the same on all ranks; got 2 on rank 0, 3 on rank 1$"):
        check_same(world, {"seed": 1, "steps": 3})
    with pytest.raises(ValueError, match=r"got None on rank 0, '\\x1b' on rank 1"):
        check_same(world, {"seed": 1, "steps": 2, "class 3": "\x1b"})


def test_one_process_agrees_with_itself():
    check_same(World(0, 1, torch.device("cpu")), {"seed": 1})


def test_ranks_may_differ_in_what_is_their_own_and_in_nothing_else(two, monkeypatch):
    mine, main = TrainOptions(**SMALL), {}
    monkeypatch.setattr(agreement, "check_same", lambda world, facts: main.update(facts))
    check_options(mine, two({}))
    assert set(mine.to_dict()) - set(main) == set(OWN)
