"""Kills, damages and starves training runs, and counts how many come through whole.

    python -m tests.faults                      all campaigns; appends to results/faults.jsonl
    python -m tests.faults --hostile exits      a group of hostile cases

Every campaign compares bytes: a run that was killed and resumed must end with the very files of one that was not.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import append_results, environment
from ffvt.train.checkpoint import FILES, TENSORS_FILE, checkpoints, load_checkpoint, newest_whole, save_checkpoint
from ffvt.train.contents import read_tensors
from ffvt.train.engine import train
from ffvt.train.options import TrainOptions
from ffvt.train.runlog import LOG_FILE, read_log
from tests.helpers import SMALL, flags, torchrun, values
from tests.hostile import all_cases
from tests.hostile.case import CannotBeTried, outcome

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ffvt.train.engine"])  # a new process starts with PyTorch imported

STEPS = 24
OPTIONS = {**SMALL, "dropout": 0.1, "ema_decay": 0.9, "num_steps": STEPS, "warmup_steps": 4}
OPTIONS |= {"eval_every": 10, "save_every": 4, "resume": "auto"}
TIMEOUT = 300  # seconds until something that is waited for will not come any more


def options(folder: Path, name: str, **changes: Any) -> TrainOptions:
    """A small run in `folder`."""
    return TrainOptions(**{**OPTIONS, **changes, "output_dir": str(folder), "name": name})


def last_step(run: TrainOptions) -> int:
    """The last step in a run's log, 0 without any."""
    folder = Path(run.output_dir) / run.name
    steps = values(folder, key="step") if (folder / LOG_FILE).exists() else []
    return steps[-1] if steps else 0


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Waits until `holds()`.

    Raises:
        TimeoutError: it does not within the time.
    """
    deadline = time.monotonic() + TIMEOUT
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"faults: waited in vain for {what}")
        time.sleep(0.001)


def end_of(folder: Path) -> dict[str, bytes]:
    """The bytes of the model and of the tensors of the state that a run ended with."""
    return {name: (folder / "last" / name).read_bytes() for name in ("model.safetensors", "state.safetensors")}


def run_in_child(run: TrainOptions) -> None:
    """Trains in a process of its own, to the end.

    Raises:
        RuntimeError: it failed.
    """
    process = CONTEXT.Process(target=train, args=(run,))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"faults: a run must end well; got exit code {process.exitcode}")


def killed_and_resumed(folder: Path, count: int, seed: int = 0, **changes: Any) -> int:
    """Kills `count` runs at random steps, resumes them, and counts those that end as the uninterrupted one did."""
    draw = random.Random(seed)
    whole = options(folder, "whole", **changes)
    run_in_child(whole)
    expected, equal = end_of(folder / "whole"), 0
    for number in range(count):
        run, step = options(folder, f"killed{number}", **changes), draw.randrange(1, STEPS)
        process = CONTEXT.Process(target=train, args=(run,))
        process.start()
        wait_until(lambda run=run, step=step: last_step(run) >= step, f"step {step}")
        time.sleep(draw.random() * 0.03)  # anywhere within a step or a save
        process.kill()
        process.join()
        run_in_child(run)
        equal += end_of(folder / run.name) == expected
    return equal


def killed_while_saving(folder: Path, count: int, seed: int = 0) -> tuple[int, int]:
    """Kills a process that does nothing but write checkpoints; how often one could be loaded, and was being written."""
    draw, loadable, interrupted = random.Random(seed), 0, 0
    run = folder / "saving"
    for _ in range(count):
        start = int(checkpoints(run)[0].name[5:]) + 1 if checkpoints(run) else 0
        process = CONTEXT.Process(target=_save_forever, args=(run, start))
        process.start()
        wait_until(lambda start=start: (run / "last").exists() and int(checkpoints(run)[0].name[5:]) >= start, "a save")
        time.sleep(draw.random() * 0.1)
        process.kill()
        process.join()
        interrupted += bool(list(run.glob(".step-*.new")))
        found = newest_whole(run)
        if found is not None:
            written = read_tensors(found / TENSORS_FILE)["values"]
            loadable += bool((written == int(found.name[5:])).all()) and found == checkpoints(run)[0]
    return loadable, interrupted


def _save_forever(run: Path, step: int) -> None:
    from ffvt.model.ffvt import create_model

    model = create_model("vit_s16", image_size=64, num_classes=5, depth=2, num_select=2)
    while True:
        facts = {"classes": list("abcde"), "resize_size": 64, "options": {}, "step": step}
        tensors = {"values": torch.full((1 << 20,), float(step))}
        save_checkpoint(run, step, model.save_pretrained, facts, tensors, {"step": step}, is_best=step % 3 == 0)
        step += 1


def flipped_bytes(folder: Path, count: int, seed: int = 0) -> int:
    """Changes one byte of the newest checkpoint at a time; how often that was noticed and the previous one taken."""
    draw, noticed = random.Random(seed), 0
    run_in_child(options(folder, "flipped"))
    newest, previous = checkpoints(folder / "flipped")[:2]
    names = [*FILES, "SHA256SUMS"]
    level = logging.getLogger("ffvt").level
    logging.getLogger("ffvt").setLevel(logging.ERROR)
    for number in range(count):
        path = newest / names[number % len(names)]
        content = path.read_bytes()
        place, change = draw.randrange(len(content)), draw.randrange(1, 256)
        path.write_bytes(content[:place] + bytes([content[place] ^ change]) + content[place + 1 :])
        noticed += newest_whole(folder / "flipped") == previous
        path.write_bytes(content)
    logging.getLogger("ffvt").setLevel(level)
    return noticed * (newest_whole(folder / "flipped") == newest)


def worker_killed_under_torchrun(folder: Path, at_step: int = 12, **changes: Any) -> bool:
    """Kills one of two workers; torchrun starts both again, and the end must be that of an undisturbed run."""
    changes = {"num_steps": 40, "save_every": 5, "resume": "", **changes}
    undisturbed = options(folder, "undisturbed", **changes)
    disturbed = options(folder, "disturbed", **changes)
    ends = []
    for run in (undisturbed, disturbed):
        process = subprocess.Popen(
            torchrun(2, flags(run), "--max_restarts", "1"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if run is disturbed:
            wait_until(lambda: 0 < at_step <= last_step(disturbed) < disturbed.num_steps, f"step {at_step}")
            os.kill(children(process.pid)[1], signal.SIGKILL)
        if process.wait(TIMEOUT):
            return False
        lines = read_log(folder / run.name)
        starts = [line["kind"] for line in lines].count("run")  # of those that the log still has
        resumed = [line["step"] for line in lines if line["kind"] == "resume"]
        ends.append((end_of(folder / run.name), lines[-1]["last"]["loss"], starts, bool(resumed)))
    has_checkpoint = at_step >= changes["save_every"]
    return ends[0][:2] == ends[1][:2] and ends[1][2:] == ((2, True) if has_checkpoint else (1, False))


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes in memory.

    Raises:
        PermissionError: this user may not mount one.
    """
    place = folder / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        raise PermissionError(f"faults: a tmpfs cannot be mounted: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def full_disk(folder: Path) -> bool:
    """Trains where one checkpoint fits and a second does not: it goes on and fails at its end; the first loads."""
    run_in_child(options(folder, "measured"))
    size = sum(path.stat().st_size for path in (folder / "measured" / "last").iterdir())
    with small_disk(folder, int(1.6 * size)) as place:
        run = options(place, "starved")
        try:
            run_in_child(run)
        except RuntimeError:
            failed = True
        else:
            failed = False
        saved = checkpoints(place / "starved")
        loaded = [load_checkpoint(path).facts["step"] for path in saved]
        return failed and loaded == [4] and last_step(run) == STEPS


def main() -> None:
    """Runs every campaign, appends what came out and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/faults.jsonl")
    groups = sorted({case.group for case in all_cases()})
    help = f"only these groups of hostile cases: {', '.join(groups)}"
    parser.add_argument("--hostile", nargs="+", choices=groups, metavar="GROUP", help=help)
    arguments = parser.parse_args()
    where = environment("cpu")
    for fault, passed, tried in campaigns() if arguments.hostile is None else hostile(arguments.hostile):
        record = {"benchmark": "faults", "environment": where, "fault": fault, "passed": passed, "tried": tried}
        append_results(Path(arguments.out), [record])  # at once: a campaign that dies loses nothing
        print(f"{fault}: {passed}/{tried}", flush=True)


def campaigns() -> Iterator[tuple[str, int, int]]:
    """What was done to runs, how many came through, of how many."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for precision, changes in (("fp32", {}), ("bf16", {"optimizer": "adamw", "learning_rate": 1e-3})):
            equal = killed_and_resumed(folder / precision, 20, precision=precision, **changes)
            yield f"killed at a random step, resumed, {precision}: ends bitwise as the uninterrupted run", equal, 20
        loadable, interrupted = killed_while_saving(folder, 50)
        yield "killed while saving: the newest checkpoint loads", loadable, 50
        yield "of these, kills in the midst of a write", interrupted, 50
        yield "one byte changed: noticed, the previous checkpoint taken", flipped_bytes(folder, 50), 50
        yield "a worker killed under torchrun, 1 restart: the same end", int(worker_killed_under_torchrun(folder)), 1
        yield "disk full: training goes on, its end fails, the old checkpoint loads", int(full_disk(folder)), 1
        yield from hostile()


def hostile(groups: Sequence[str] | None = None) -> Iterator[tuple[str, int, int]]:
    """The groups of hostile cases (all, or some): how many held, of how many."""
    cases = all_cases()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for group in groups or dict.fromkeys(case.group for case in cases):
            held = tried = 0
            for case in (case for case in cases if case.group == group):
                own = folder / f"hostile{group}{tried}" / "own"
                own.mkdir(parents=True)
                try:
                    problem = outcome(case, own)
                except CannotBeTried as reason:
                    print(f"{group}, {case.name}: not tried: {reason}", flush=True)
                    continue
                held, tried = held + (not problem), tried + 1
                if problem:
                    print(f"{group}, {case.name}: {problem}", flush=True)
            yield f"hostile, {group}: held", held, tried


if __name__ == "__main__":
    main()
