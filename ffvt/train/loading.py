"""Loading images in processes of their own: they end with the loop that they load for, and their errors are its own.

PyTorch's loader gives an error of a loading process as text with a trace in it, and where a batch cannot be sent (no
file descriptor or shared memory is left) it waits for it for ever. Here a batch that cannot be made or sent is replaced
by the error, which is raised where the batch is taken.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ffvt.errors import portable
from ffvt.train.signals import serve_parent


@contextmanager
def loading(dataset: Dataset, collate: Callable[[Any], Any], workers: int, **arguments: Any) -> Iterator[Iterator]:
    """The batches of a data set, made by `workers` processes that end with the block; 0: by this one.

    Args:
        dataset: has `__getitems__`, or `__getitem__`.
        collate: makes a batch of what that gives.
        workers: how many processes.
        arguments: further ones of `DataLoader`.
    """
    loader = DataLoader(
        _Guarded(dataset, collate),
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=serve_parent,
        generator=torch.Generator(),  # its own: the loader must not draw from the one that makes the dropout masks
        **arguments,
    )
    batches = iter(loader)
    try:
        yield map(_opened, batches)
    finally:
        if workers:
            batches._shutdown_workers()  # what its __del__ does, which an error's traceback would put off


class _Guarded(Dataset):
    """Whole batches of a data set; in a loading process one that is sent, or the error."""

    def __init__(self, dataset: Dataset, collate: Callable[[Any], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: Sequence[Any]) -> Any:
        if get_worker_info() is None:
            return self._batch(keys)
        try:
            return _Parcel(self._batch(keys))
        except Exception as error:
            return _failure(error)

    def _batch(self, keys: Sequence[Any]) -> Any:
        if hasattr(self.dataset, "__getitems__"):
            return self.collate(self.dataset.__getitems__(keys))
        return self.collate([self.dataset[key] for key in keys])


def _as_it_is(batch: Any) -> Any:
    return batch


class _Parcel:
    """A batch on its way: it arrives as itself, or as a `_Failure` where it cannot be sent or received."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __reduce__(self) -> tuple[Callable, tuple]:
        try:
            return _receive, (bytes(ForkingPickler.dumps(self.batch)),)
        except Exception as error:
            return _failure(error).__reduce__()


def _receive(sent: bytes) -> Any:
    try:
        return pickle.loads(sent)
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        return _failure(RuntimeError(f"loading process exited before its batch was received: {error!r}"))
    except Exception as error:
        return _failure(error)


@dataclass(frozen=True)
class _Failure:
    error: Exception
    trace: str  # where it was raised

    def __reduce__(self) -> tuple[Callable, tuple]:
        return _Failure, (self.error, self.trace)


def _failure(error: Exception) -> _Failure:
    return _Failure(portable(error), traceback.format_exc())


def _opened(batch: Any) -> Any:
    if isinstance(batch, _Failure):
        raise batch.error from RuntimeError(f"in a loading process:\n{batch.trace}")
    return batch
