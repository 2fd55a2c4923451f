"""Every way out of a command that goes wrong: in seconds and one line, with the right status, nothing left behind."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers import SMALL, flags
from tests.hostile.case import Case
from tests.processes import Command, Ended, ranks, run

HOSTILE = {"num_steps": 6, "eval_every": 3, "img_size": 64, "resize_size": 72, "dataset": "imagefolder"}
LONGEST = 700  # letters of a line


def photographs(root: Path, test: int = 3) -> Path:
    """An ImageFolder of three classes with five training and `test` test images each."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 5), ("test", test)):
        for name in ("ant", "bee", "cat"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (80, 80, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def training(folder: Path, **changes: object) -> list[str]:
    """The command line of a small run on these photographs."""
    options = {**SMALL, **HOSTILE, "data_root": folder / "photos", "output_dir": folder, "name": "run", **changes}
    return ["train", *flags(options)]


def spoil(*places: Path) -> None:
    """Cuts images in the middle."""
    for path in places:
        path.write_bytes(path.read_bytes()[:60])


def images(folder: Path, split: str) -> list[Path]:
    return sorted((folder / "photos" / split).rglob("*.png"))


def ended(found: Ended, status: int, says: str, trace: bool = False) -> None:
    """Checks the status, and that the last line says this, alone: without a trace."""
    assert found.status == status, f"status {found.status}: {found.output[-1500:]}"
    assert says in found.output, f"does not say {says!r}: {found.output[-1500:]}"
    assert trace or "Traceback" not in found.output, found.output[-3000:]
    assert trace or max(map(len, found.lines), default=0) < LONGEST, "a line is too long"


def saved_step(folder: Path) -> int:
    """The step of the run's last checkpoint, 0 for none."""
    last = folder / "run" / "last"
    return int(last.readlink().name[5:]) if last.is_symlink() else 0


def logged(folder: Path, kind: str) -> bool:
    log = folder / "run" / "log.jsonl"
    return log.exists() and f'"kind": "{kind}"' in log.read_text()


# What breaks an image, in the process of the command


class Odd(Exception):
    """An exception that pickle cannot make again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"odd {one} {two}")


ERRORS: dict[str, Exception] = {
    "RuntimeError": RuntimeError("Failed to decode frame 0"),
    "KeyError": KeyError("no such tile"),
    "NotImplementedError": NotImplementedError("pixel format 0"),
    "AssertionError": AssertionError("a decoder's own"),
    "MemoryError": MemoryError("decoder"),
    "RecursionError": RecursionError("too deep"),
    "an exception that cannot be sent": Odd(1, 2),
}
UNEXPECTED = (
    "RuntimeError",
    "KeyError",
    "NotImplementedError",
    "AssertionError",
    "RecursionError",
    "an exception that",
)


def images_raise(error: str) -> None:
    """Every image of the test split raises this when it is read."""
    from ffvt.data import datasets

    whole = datasets.PictureFiles.__getitem__

    def read(self, index):
        if "/test/" in str(self.paths[index]):
            raise ERRORS[error]
        return whole(self, index)

    datasets.PictureFiles.__getitem__ = read


def training_images_raise(error: str, after: int = 2) -> None:
    """Training images raise this from a step's batch on."""
    from ffvt.data import sampling

    whole, calls = sampling.TrainingView.__getitem__, []

    def read(self, key):
        calls.append(key)
        if len(calls) > after * 8:
            raise ERRORS[error]
        return whole(self, key)

    sampling.TrainingView.__getitem__ = read


def step_raises(text: str, kind: str) -> None:
    """The third step raises an error of the machine's limits."""
    import torch

    from ffvt.train import engine

    whole, error = engine.training_step, torch.OutOfMemoryError if kind == "cuda" else RuntimeError

    def step(state, *given, **named):
        if state.step == 2:
            raise error(text) if kind != "memory" else MemoryError(text)
        return whole(state, *given, **named)

    engine.training_step = step


# The cases


def bad_test_image(workers: int, folder: Path) -> None:
    photographs(folder / "photos")
    bad = images(folder, "test")[1]
    spoil(bad)
    found = run(training(folder, workers=workers), folder)
    ended(found, 0, "8 images")
    assert found.output.count(f"cannot be read and is not counted: {bad}") == 1, found.output
    assert logged(folder, "unreadable")


def all_test_images_bad(workers: int, folder: Path) -> None:
    photographs(folder / "photos")
    spoil(*images(folder, "test"))
    found = run(training(folder, workers=workers), folder)
    ended(found, 1, "the evaluation of step 3 failed, training continues")
    ended(found, 1, "the end must be evaluated")
    assert saved_step(folder) == 6
    assert logged(folder, "unevaluated")


def resumes_after_a_failed_end(folder: Path) -> None:
    photographs(folder / "photos")
    whole = {path: path.read_bytes() for path in images(folder, "test")}
    spoil(*whole)
    ended(run(training(folder), folder), 1, "--resume auto evaluates it")
    for path, content in whole.items():
        path.write_bytes(content)
    ended(run(training(folder, resume="auto"), folder), 0, "9 images")


def all_training_images_bad(workers: int, folder: Path) -> None:
    photographs(folder / "photos")
    spoil(*images(folder, "train"))
    ended(run(training(folder, workers=workers), folder), 1, "10 in a row are not")


def folder_deleted(split: str, workers: int, says: str, folder: Path) -> None:
    photographs(folder / "photos")
    options = {"num_steps": 400, "eval_every": 200, "workers": workers}
    command = Command(training(folder, **options), folder)
    command.wait_for(lambda: logged(folder, "train"))
    shutil.rmtree(folder / "photos" / split)
    ended(command.end(), 1, says)
    assert saved_step(folder) > 0


def evaluation_raises(error: str, workers: int, folder: Path) -> None:
    """Whatever it is, it costs the evaluation."""
    photographs(folder / "photos")
    found = run(training(folder, workers=workers), folder, before=images_raise, given=(error,))
    ended(found, 1, "the evaluation of step 3 failed, training continues")
    assert saved_step(folder) == 6


def training_raises(error: str, workers: int, folder: Path) -> None:
    """What no decoder should raise shows its trace, and is not replaced; the run ends, saved."""
    photographs(folder / "photos")
    changes = {"workers": workers, "eval_every": 100, "num_steps": 50}
    found = run(training(folder, **changes), folder, before=training_images_raise, given=(error,))
    ended(found, 1, str(ERRORS[error].args[0]), trace=error.startswith(UNEXPECTED))
    assert saved_step(folder) > 0


def evaluate_command(workers: int, says: str, more: list[str], status: int, error: str, folder: Path) -> None:
    photographs(folder / "photos")
    ended(run(training(folder), folder), 0, "last: top-1")
    command = ["evaluate", "--checkpoint", str(folder / "run" / "last"), "--workers", str(workers), *more]
    if error:
        found = run(command, folder, before=images_raise, given=(error,))
        ended(found, status, says, trace=True)
        return
    spoil(images(folder, "test")[1])
    found = run(command, folder)
    ended(found, status, says)
    assert status == 0 or len(found.lines) <= 5, found.output


def limits(text: str, kind: str, says: str, folder: Path) -> None:
    photographs(folder / "photos")
    found = run(training(folder, workers=2), folder, before=step_raises, given=(text, kind))
    ended(found, 1, says)
    assert len([line for line in found.lines if line.startswith("ffvt")]) == 1


def little_memory(megabytes: int) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + (megabytes << 20),) * 2)


def out_of_memory(workers: int, folder: Path) -> None:
    photographs(folder / "photos")
    changes = {"workers": workers, "train_batch_size": 512, "embed_dim": 512, "mlp_dim": 2048, "patch_size": 8}
    found = run(training(folder, **changes, depth=6), folder, before=little_memory, given=(900,))
    ended(found, 1, "out of memory")


def few_files(count: int) -> None:
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(count, used + count - 16), 4096))


def too_many_open_files(count: int, folder: Path) -> None:
    photographs(folder / "photos")
    found = run(training(folder, workers=4), folder, before=few_files, given=(count,))
    ended(
        found, 1, "ffvt train: too many open files: raise the limit (ulimit -n)", trace=True
    )  # PyTorch's __del__ shows one


def small_shared_memory(size: str) -> None:
    """A /dev/shm of this size, for this process and its children."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000):  # CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "exits: a namespace cannot be made")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"], check=True)


def no_shared_memory(size: str, folder: Path) -> None:
    photographs(folder / "photos")
    changes = {"workers": 2, "train_batch_size": 64, "img_size": 224, "resize_size": 224}
    found = run(training(folder, **changes), folder, before=small_shared_memory, given=(size,))
    ended(found, 1, "--workers 0")
    assert "--shm-size" in found.output


def loading_process_dies(number: int, says: str, folder: Path) -> None:
    photographs(folder / "photos")
    changes = {"workers": 2, "num_steps": 3000, "eval_every": 3000}
    command = Command(training(folder, **changes), folder)
    command.wait_for(lambda: logged(folder, "train"))
    worker = max(command.processes())
    assert worker != command.process.pid
    os.kill(worker, number)
    # PyTorch raises wherever the trainer is; in a __del__ Python prints that, and the run ends a bit later.
    ended(command.end(), 1, says, trace=True)


def killed_trainer_leaves_nobody(when: str, number: int, folder: Path) -> None:
    photographs(folder / "photos", test=40)
    changes = {"workers": 3, "num_steps": 3000, "eval_every": 3000 if when == "train" else 1}
    command = Command(training(folder, **changes), folder)
    command.wait_for(lambda: logged(folder, when) and len(command.processes()) > 3)
    os.kill(command.process.pid, number)
    command.process.join(10)
    time.sleep(1)
    left = command.processes()
    command.kill()
    assert not left, f"left: {left}"


def signalled_loading_processes_live(number: int, folder: Path) -> None:
    """A terminal or a scheduler signals them too: that is their trainer's to heed."""
    photographs(folder / "photos")
    changes = {"workers": 2, "num_steps": 60, "eval_every": 60}
    command = Command(training(folder, **changes), folder)
    command.wait_for(lambda: logged(folder, "train"))
    for pid in command.processes():
        if pid != command.process.pid:
            os.kill(pid, number)
    ended(command.end(), 0, "last: top-1")


def other_start_method(name: str, folder: Path) -> None:
    photographs(folder / "photos")
    bad = images(folder, "test")[1]
    spoil(bad)
    program = f"""if True:
        import multiprocessing, sys
        from ffvt.cli import main
        multiprocessing.set_start_method({name!r})
        sys.exit(main(sys.argv[1:]))"""
    found = run([sys.executable, "-c", program, *training(folder, workers=1)], folder)
    ended(found, 0, f"is not counted: {bad}")


def closed_output() -> None:
    """Standard output is a pipe that nobody reads."""
    ends = os.pipe()
    os.close(ends[0])
    os.dup2(ends[1], 1)


def nobody_reads(command: list[str], folder: Path) -> None:
    found = run(command, folder, before=closed_output)
    ended(found, 141, "")
    assert not found.lines, found.output


def one_rank_fails(split: str, workers: int, says: str, folder: Path) -> None:
    """Images that only one of two ranks cannot read; each has its own copy."""
    for rank in range(2):
        photographs(folder / f"rank{rank}" / "photos")
    spoil(*images(folder / "rank1", split))
    commands = ranks(
        [
            training(folder, workers=workers, data_root=folder / f"rank{rank}" / "photos", rendezvous_timeout=30)
            for rank in range(2)
        ],
        folder,
    )
    found = [command.end() for command in commands]
    assert [end.status for end in found] == [1, 1], [end.output[-800:] for end in found]
    ended(found[0], 1, says)
    assert not [line for line in found[1].lines if line.startswith("ffvt")], found[1].output


def one_rank_is_killed(workers: int, folder: Path) -> None:
    photographs(folder / "photos")
    changes = {"workers": workers, "num_steps": 3000, "eval_every": 3000}
    commands = ranks([training(folder, **changes)] * 2, folder)
    commands[0].wait_for(lambda: logged(folder, "train"))
    os.kill(commands[1].process.pid, signal.SIGKILL)
    found = commands[0].end()
    commands[1].end()
    ended(found, 1, "another rank has ended")


def _case(name: str, attempt: Callable, *given: object, slow: bool = True) -> Case:
    return Case("exits", name, partial(attempt, *given), refusal=None, seconds=90, slow=slow)


OUT_OF_MEMORY = "[enforce fail at alloc_cpu.cpp:122] DefaultCPUAllocator: can't allocate memory: you tried 99 bytes."
CASES = [
    *(_case(f"test image cut, {n} workers", bad_test_image, n, slow=n > 0) for n in (0, 1, 2)),
    *(_case(f"all test images cut, {n} workers", all_test_images_bad, n, slow=n > 0) for n in (0, 2)),
    _case("the end could not be evaluated, and is after the images are whole again", resumes_after_a_failed_end),
    *(_case(f"all training images cut, {n} workers", all_training_images_bad, n, slow=n > 0) for n in (0, 2)),
    *(
        _case(f"training images deleted at work, {n} workers", folder_deleted, "train", n, "10 in a row")
        for n in (0, 2)
    ),
    *(_case(f"test images deleted at work, {n} workers", folder_deleted, "test", n, "must be eval") for n in (0, 2)),
    *(_case(f"{error} in an evaluation, 2 workers", evaluation_raises, error, 2) for error in ERRORS),
    *(_case(f"{error} in an evaluation, no workers", evaluation_raises, error, 0) for error in ("KeyError",)),
    *(_case(f"{error} in training, 2 workers", training_raises, error, 2) for error in ERRORS),
    *(_case(f"{error} in training, no workers", training_raises, error, 0) for error in ("RuntimeError",)),
    *(
        _case(f"evaluate, test image cut, {n} workers", evaluate_command, n, "1.png cannot be read", [], 1, "")
        for n in (0, 2)
    ),
    _case("evaluate --skip_bad_images, 2 workers", evaluate_command, 2, "8", ["--skip_bad_images"], 0, ""),
    *(
        _case(f"evaluate, {error} in a worker", evaluate_command, 2, str(ERRORS[error].args[0]), [], 1, error)
        for error in ("RuntimeError", "KeyError", "an exception that cannot be sent")
    ),
    _case(
        "no GPU memory left", limits, "CUDA out of memory. Tried to allocate 2.00 GiB.\nmore", "cuda", "smaller batch"
    ),
    _case("no memory left", limits, OUT_OF_MEMORY, "", "smaller batch"),
    _case("MemoryError", limits, "", "memory", "smaller batch"),
    *(_case(f"a real limit of memory, {n} workers", out_of_memory, n) for n in (0, 2)),
    *(_case(f"ulimit -n {n}", too_many_open_files, n) for n in (24, 34)),
    *(_case(f"/dev/shm of {size}", no_shared_memory, size) for size in ("1M", "12M")),
    _case("a loading process is killed", loading_process_dies, signal.SIGKILL, "a loading process died"),
    _case("a loading process gets a bus error", loading_process_dies, signal.SIGBUS, "--workers 0"),
    *(
        _case(f"trainer killed in {kind}, signal {int(n)}", killed_trainer_leaves_nobody, kind, n)
        for kind, n in (("train", signal.SIGKILL), ("evaluate", signal.SIGKILL), ("train", signal.SIGABRT))
    ),
    *(
        _case(f"loading processes get signal {int(n)}", signalled_loading_processes_live, n)
        for n in (signal.SIGINT, signal.SIGTERM)
    ),
    *(_case(f"loading processes by {name}", other_start_method, name) for name in ("forkserver", "spawn")),
    _case("ffvt info | head", nobody_reads, ["info"], slow=False),
    _case("ffvt plan | head", nobody_reads, ["plan", "--memory", "24GiB", "--tflops", "1"], slow=False),
    *(
        _case(f"rank 1 of 2 alone, {split} images cut, {n} workers", one_rank_fails, split, n, says)
        for split, says in (("train", "rank 1: pictures must be readable"),)
        for n in (0, 2)
    ),
    *(_case(f"rank 1 of 2 is killed, {n} workers", one_rank_is_killed, n) for n in (0, 2)),
]
