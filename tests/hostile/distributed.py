"""Ranks that do not fit together, or do not come: each says why in one line, in time."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ffvt.train.rendezvous import place
from tests.helpers import SMALL, flags, torchrun
from tests.hostile.case import Case
from tests.hostile.exits import ended, images, photographs, spoil, training
from tests.processes import Ended, ranks, run

TWO = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
VARIABLES = tuple(TWO)

# changes of the environment (None: not set), what the refusal must name
ENVIRONMENTS: tuple[tuple[dict[str, str | None], str], ...] = (
    ({"RANK": "2"}, "RANK"),
    ({"RANK": "5"}, "'5'"),
    ({"RANK": "-1"}, "'-1'"),
    ({"RANK": "one"}, "'one'"),
    ({"RANK": "0.5"}, "'0.5'"),
    ({"RANK": ""}, "RANK"),
    ({"RANK": None}, "RANK"),
    ({"RANK": "1\x1b[2J"}, r"1\x1b[2J"),
    ({"RANK": "9" * 100_000}, "RANK"),
    ({"RANK": "²"}, "'²'"),
    ({"RANK": "3", "WORLD_SIZE": None}, "WORLD_SIZE=1"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
    ({"WORLD_SIZE": "two"}, "'two'"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE"),
    ({"WORLD_SIZE": "-2"}, "'-2'"),
    ({"LOCAL_RANK": "x"}, "LOCAL_RANK"),
    ({"LOCAL_RANK": "-1"}, "LOCAL_RANK"),
    ({"MASTER_PORT": "0"}, "MASTER_PORT"),
    ({"MASTER_PORT": "65536"}, "'65536'"),
    ({"MASTER_PORT": "http"}, "'http'"),
    ({"MASTER_PORT": None}, "MASTER_PORT"),
    ({"MASTER_ADDR": None}, "MASTER_ADDR"),
    ({"MASTER_ADDR": ""}, "MASTER_ADDR"),
)

# options of rank 1, what the refusal must say
OTHER_OPTIONS = (
    ({"seed": 43}, "seed must be the same on all ranks; got 42 on rank 0, 43 on rank 1"),
    ({"train_batch_size": 16}, "train_batch_size must be the same on all ranks; got 8 on rank 0, 16 on rank 1"),
    ({"num_steps": 9}, "num_steps must be the same on all ranks; got 6 on rank 0, 9 on rank 1"),
    ({"eval_every": 2}, "eval_every must be the same"),
    ({"save_every": 2}, "save_every must be the same"),
    ({"eval_batch_size": 7}, "eval_batch_size must be the same"),
    ({"learning_rate": 0.5}, "learning_rate must be the same"),
    ({"precision": "bf16"}, "precision must be the same on all ranks; got 'fp32' on rank 0, 'bf16' on rank 1"),
    ({"preset": "hard"}, "preset must be the same"),
    ({"feature_fusion": False}, "feature_fusion must be the same"),
    ({"num_token": 2}, "num_token must be the same"),
    ({"criterion": "vote"}, "criterion must be the same on all ranks; got 'maws' on rank 0, 'vote' on rank 1"),
    ({"contrastive": True}, "contrastive must be the same"),
    ({"images_per_class": 2}, "images_per_class must be the same"),
    ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps must be the same"),
    ({"name": "other"}, "name must be the same on all ranks; got 'run' on rank 0, 'other' on rank 1"),
    ({"eval_split": "\x1b[2J"}, r"got 'test' on rank 0, '\x1b[2J' on rank 1"),
    ({"resume": "auto"}, "resume must be the same"),
)


@contextmanager
def environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """The variables of a launch, with these changes."""
    earlier = {name: os.environ.pop(name, None) for name in VARIABLES}
    os.environ.update({name: value for name, value in {**TWO, **changes}.items() if value is not None})
    try:
        yield
    finally:
        for name, value in earlier.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def refused_environment(changes: Mapping[str, str | None], _folder: Path) -> None:
    with environment(changes):
        place()


def birds(folder: Path, **changes: object) -> list[str]:
    options = {**SMALL, "output_dir": folder, "name": "run", "rendezvous_timeout": 30, **changes}
    return ["train", *flags({name: value for name, value in options.items() if value is not False})]


def other_options(changes: Mapping[str, object], says: str, folder: Path) -> None:
    found = [command.end() for command in ranks([birds(folder), birds(folder, **changes)], folder)]
    _both_refuse(found, says)
    assert not (folder / "run").exists()


def own_options(folder: Path) -> None:
    """How a rank loads, and where its files are, is its own affair."""
    for rank in range(2):
        photographs(folder / f"node{rank}" / "photos")
    given = [
        training(
            folder,
            data_root=folder / f"node{rank}" / "photos",
            cache_dir=folder / f"node{rank}" / "cache",
            workers=rank,
            prefetch=1 + rank,
            rendezvous_timeout=30 + rank,
        )
        for rank in range(2)
    ]
    found = [command.end() for command in ranks(given, folder)]
    assert [end.status for end in found] == [0, 0], [end.output[-800:] for end in found]


def _both_refuse(found: list[Ended], says: str) -> None:
    assert [end.status for end in found] == [1, 1], [end.output[-800:] for end in found]
    ended(found[0], 1, says)
    assert len([line for line in found[0].lines if line.startswith("ffvt")]) == 1, found[0].output
    assert not [line for line in found[1].lines if line.startswith("ffvt")], found[1].output


def an_image_more(folder: Path) -> None:
    image = folder / "train" / "ant" / "0.png"
    (image.parent / "more.png").write_bytes(image.read_bytes())


def a_class_more(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / split / "dog").mkdir()
        image = folder / split / "ant" / "0.png"
        (folder / split / "dog" / "0.png").write_bytes(image.read_bytes())


def a_class_of_another_name(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / split / "bee").rename(folder / split / "bumblebee")


def an_image_in_another_class(folder: Path) -> None:
    (folder / "train" / "ant" / "0.png").rename(folder / "train" / "bee" / "moved.png")


def a_test_image_less(folder: Path) -> None:
    (folder / "test" / "ant" / "0.png").unlink()


def no_data(folder: Path) -> None:
    (folder / "train").rename(folder / "elsewhere")


def other_data(change: Callable[[Path], None], of_rank: int, says: str, folder: Path) -> None:
    for rank in range(2):
        photographs(folder / f"node{rank}" / "photos")
    change(folder / f"node{of_rank}" / "photos")
    given = [training(folder, data_root=folder / f"node{rank}" / "photos", rendezvous_timeout=30) for rank in range(2)]
    _both_refuse([command.end() for command in ranks(given, folder)], says)


def other_version() -> None:
    from ffvt.train import agreement

    if os.environ["RANK"] == "1":
        agreement.__version__ = "0.0.1"


def other_code(folder: Path) -> None:
    found = [command.end() for command in ranks([birds(folder)] * 2, folder, before=other_version)]
    _both_refuse(found, "the version of ffvt must be the same on all ranks")


def a_peer_that_does_not_come(who: int, says: str, folder: Path) -> None:
    given = [birds(folder, rendezvous_timeout=3)] * 2
    given[1 - who] = ["--version"]
    commands = ranks(given, folder)
    found = commands[who].end()
    commands[1 - who].end()
    ended(found, 1, says)
    assert found.seconds < 15
    assert len([line for line in found.lines if line.startswith("ffvt")]) == 1, found.output


def a_port_in_use(folder: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        changes = {**TWO, "MASTER_PORT": str(other.getsockname()[1])}
        found = run(birds(folder, rendezvous_timeout=5), folder, environment=changes)
    ended(found, 1, "must be free for rank 0; another process has this port")
    assert found.seconds < 20


def a_port_that_is_something_else(folder: Path) -> None:
    """Rank 1 finds somebody who listens and says nothing."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        changes = {**TWO, "RANK": "1", "MASTER_PORT": str(other.getsockname()[1])}
        found = run(birds(folder, rendezvous_timeout=4), folder, environment=changes)
    ended(found, 1, "ffvt train, rank 1: ")
    assert found.seconds < 20


def a_name_that_is_none(folder: Path) -> None:
    changes = {**TWO, "RANK": "1", "MASTER_ADDR": "no-such-machine.invalid"}
    found = run(birds(folder, rendezvous_timeout=2), folder, environment=changes)
    ended(found, 1, "no-such-machine.invalid")


def the_same_rank_twice(folder: Path) -> None:
    commands = ranks([birds(folder, rendezvous_timeout=6)] * 3, folder, [{"WORLD_SIZE": "3"}, {}, {"RANK": "1"}])
    found = [command.end() for command in commands]
    assert [end.status for end in found] == [1, 1, 1], [end.output[-500:] for end in found]
    assert "got RANK=1 twice" in found[1].output + found[2].output
    ended(found[0], 1, "ffvt train")


def bad_flags_of_one_rank(folder: Path) -> None:
    """It ends with 2; the other one does not wait for longer than it was told."""
    given = [birds(folder, rendezvous_timeout=3), birds(folder, num_steps=0)]
    found = [command.end() for command in ranks(given, folder)]
    assert found[1].status == 2
    ended(found[0], 1, "missing: rank 1")


def torchrun_errors(arguments: dict[str, object], says: str, folder: Path) -> None:
    """torchrun starts two ranks; all ends soon, and our line is among what it says itself."""
    photographs(folder / "photos")
    arguments = dict(arguments)
    if arguments.pop("spoil", False):
        spoil(*images(folder, "train"))
    found = run(torchrun(2, training(folder, **arguments)[1:]), folder)
    assert found.status == 1, found.output[-1500:]
    assert says in found.output, found.output[-1500:]
    assert found.output.count(says) == 1, found.output[-3000:]


def _case(name: str, attempt: Callable, *given: object, slow: bool = True) -> Case:
    return Case("distributed", name, partial(attempt, *given), refusal=None, seconds=120, slow=slow)


CASES = [
    *(
        Case("distributed", f"environment {str(changes)[:60]}", partial(refused_environment, changes), named)
        for changes, named in ENVIRONMENTS
    ),
    *(_case(f"rank 1 has {str(changes)[:60]}", other_options, changes, says) for changes, says in OTHER_OPTIONS),
    _case("each rank has files and processes of its own", own_options),
    *(
        _case(f"rank {rank} has {change.__name__.replace('_', ' ')}", other_data, change, rank, says)
        for change, rank, says in (
            (an_image_more, 1, "number of training images must be the same on all ranks; got 15 on rank 0, 16 on rank"),
            (a_class_more, 1, "number of classes must be the same on all ranks; got 3 on rank 0, 4 on rank 1"),
            (a_class_of_another_name, 1, "got 'bee' on rank 0, 'bumblebee' on rank 1"),
            (an_image_in_another_class, 1, "labels must be the same"),
            (a_test_image_less, 0, "number of validation images must be the same on all ranks; got 8 on rank 0, 9"),
            (no_data, 0, "ffvt train: imagefolder"),
            (no_data, 1, "ffvt train, rank 1: imagefolder"),
        )
    ),
    _case("rank 1 has another version", other_code),
    _case("rank 1 does not come", a_peer_that_does_not_come, 0, "within rendezvous_timeout=3 s; missing: rank 1"),
    _case("rank 0 does not come", a_peer_that_does_not_come, 1, "rank 0 must be at 127.0.0.1:"),
    _case("the port is in use", a_port_in_use),
    _case("something else is at the port", a_port_that_is_something_else),
    _case("the machine's name is none", a_name_that_is_none),
    _case("the same rank twice", the_same_rank_twice),
    _case("rank 1 has a bad flag", bad_flags_of_one_rank),
    *(
        _case(
            f"torchrun, training images unreadable, {n} workers", torchrun_errors, {"spoil": True, "workers": n}, says
        )
        for n, says in ((0, "10 in a row are not"), (2, "10 in a row are not"))
    ),
    _case("torchrun, data_root missing", torchrun_errors, {"data_root": "nowhere"}, "nowhere"),
]
