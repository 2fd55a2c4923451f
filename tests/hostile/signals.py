"""Ctrl-C, SIGTERM and their friends, at every command and moment: what is saved, what is said, the exit status."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.hostile.case import Case
from tests.hostile.exits import logged, photographs, saved_step, training
from tests.processes import Command, Ended, ranks, run

INT, TERM = signal.SIGINT, signal.SIGTERM
LONG = {"num_steps": 5000, "eval_every": 5000, "save_every": 5000}
SAVED = {INT: 130, TERM: 0}  # exit status of a training that was stopped and has saved
AT_ONCE = {INT: 130, TERM: 143}
SAID = {INT: "interrupted", TERM: "terminated"}


def quiet(found: Ended) -> None:
    """No trace, and no more than a few lines."""
    assert "Traceback" not in found.output, found.output[-3000:]
    assert "Exception ignored" not in found.output, found.output[-3000:]
    assert found.seconds < 20, f"took {found.seconds:.0f} s"


def stopped(found: Ended, number: int, folder: Path) -> int:
    """Checks a training that was stopped and saved; the step."""
    quiet(found)
    assert found.status == SAVED[number], f"status {found.status}: {found.output[-1000:]}"
    step = saved_step(folder)
    lines = [line for line in found.lines if "stopped" in line]
    assert len(lines) == 1, found.output[-1000:]
    assert lines[0].startswith(f"stopped at step {step} of "), found.output[-1000:]
    assert "--resume auto resumes" in lines[0], lines
    assert logged(folder, "stop")
    return step


def ended_at_once(found: Ended, number: int, says: str = "") -> None:
    quiet(found)
    assert found.status == AT_ONCE[number], f"status {found.status}: {found.output[-1000:]}"
    assert found.lines[-1].endswith(says or SAID[number]), found.output[-1000:]


def slow_images(seconds: float, split: str) -> None:
    """Every image of a split takes its time."""
    from ffvt.data import datasets

    for kind in (datasets.PictureFiles, datasets.CachedPictures):
        whole = kind.__getitem__

        def read(self, index, whole=whole):
            if f"/{split}/" in str(self.paths[index]):
                time.sleep(seconds)
            return whole(self, index)

        kind.__getitem__ = read


def slow(seconds: float, module: str, name: str) -> None:
    """A function of a module takes its time, in threads too."""
    import importlib

    place = importlib.import_module(module)
    whole = getattr(place, name)

    def read(*given, **named):
        time.sleep(seconds)
        return whole(*given, **named)

    setattr(place, name, read)


def in_training(number: int, workers: int, group: bool, folder: Path) -> None:
    photographs(folder / "photos")
    command = Command(training(folder, workers=workers, **LONG), folder)
    command.wait_for(lambda: logged(folder, "train"))
    command.signal(number, group)
    assert stopped(command.end(), number, folder) > 0


def twice_at_once(number: int, folder: Path) -> None:
    """Launchers send a signal twice: one of them is meant."""
    photographs(folder / "photos")
    command = Command(training(folder, workers=1, **LONG), folder)
    command.wait_for(lambda: logged(folder, "train"))
    for _ in range(3):
        command.signal(number, group=True)
        time.sleep(0.02)
    stopped(command.end(), number, folder)


def slow_step(seconds: float) -> None:
    from ffvt.train import engine

    whole = engine.training_step

    def step(state, *given, **named):
        if state.step >= 2:
            time.sleep(seconds)
        return whole(state, *given, **named)

    engine.training_step = step


def a_second_one(first: int, second: int, workers: int, folder: Path) -> None:
    """The step takes too long for somebody."""
    photographs(folder / "photos")
    command = Command(training(folder, workers=workers, **LONG), folder, before=slow_step, given=(60.0,))
    command.wait_for(lambda: (folder / "run" / "log.jsonl").exists() and logged(folder, "train"))
    time.sleep(0.5)
    command.signal(first)
    time.sleep(1.3)
    command.signal(second)
    found = command.end()
    ended_at_once(found, second)
    assert found.seconds < 8, f"took {found.seconds:.0f} s"


def in_evaluation(number: int, workers: int, folder: Path) -> None:
    """The evaluation stops soon, and the resumed run makes up for it."""
    photographs(folder / "photos", test=20)
    options = {"workers": workers, "num_steps": 4, "eval_every": 3, "eval_batch_size": 2}
    command = Command(
        training(folder, **options), folder, before=slow_images, given=(0.5, "test")
    )  # 30 s of evaluation
    command.wait_for(
        lambda: (folder / "run" / "log.jsonl").read_text().count('"train"') == 3 if logged(folder, "train") else 0
    )
    time.sleep(1.0)
    command.signal(number, group=True)
    found = command.end()
    assert found.seconds < 12, f"took {found.seconds:.0f} s"
    assert stopped(found, number, folder) == 3
    assert not logged(folder, "evaluate")
    again = run(training(folder, **options, resume="auto"), folder)
    assert again.status == 0, again.output[-1000:]
    assert "step 3: test top-1" in again.output, again.output[-1000:]


def resumed_ends_the_same(number: int, workers: int, folder: Path) -> None:
    """Bitwise: weights and state, wherever the signal came."""
    photographs(folder / "photos")
    options = {"num_steps": 40, "eval_every": 16, "dropout": 0.1, "workers": workers}
    whole = run(training(folder, **options, name="whole"), folder)
    assert whole.status == 0, whole.output[-1000:]
    command = Command(training(folder, **options), folder, before=slow_step, given=(0.05,))
    command.wait_for(lambda: logged(folder, "train"))
    time.sleep(0.3)
    command.signal(number, group=True)
    step = stopped(command.end(), number, folder)
    assert 0 < step < 40
    again = run(training(folder, **options, resume="auto"), folder)
    assert again.status == 0, again.output[-1000:]
    for name in ("model.safetensors", "state.safetensors"):
        ends = [(folder / run_ / "last" / name).read_bytes() for run_ in ("run", "whole")]
        assert ends[0] == ends[1], name


def in_final_evaluation(number: int, folder: Path) -> None:
    """Of the test images, after all steps: nothing is lost, the resumed run evaluates."""
    photographs(folder / "photos", test=20)
    options = {"num_steps": 3, "eval_every": 3, "eval_batch_size": 2, "val_split": 0.2}
    command = Command(training(folder, **options), folder, before=slow_images, given=(0.5, "test"))
    command.wait_for(lambda: logged(folder, "evaluate") and saved_step(folder) == 3)
    time.sleep(0.5)
    command.signal(number)
    assert stopped(command.end(), number, folder) == 3
    again = run(training(folder, **options, resume="auto"), folder)
    assert again.status == 0, again.output[-1000:]
    assert "on 60 images" in again.output


def while_caching(number: int, folder: Path) -> None:
    photographs(folder / "photos", test=30)
    arguments = training(folder, cache_dir=folder / "cache")
    command = Command(arguments, folder, before=slow, given=(0.4, "ffvt.data.cache", "load_image"))
    command.wait_for(lambda: list((folder / "cache").glob(".*.new")) if (folder / "cache").exists() else [])
    time.sleep(0.3)
    command.signal(number)
    found = command.end()
    ended_at_once(found, number)
    assert found.seconds < 6, f"took {found.seconds:.0f} s"
    left = [path.name for path in (folder / "cache").iterdir() if not path.name.endswith(".lock")]
    assert not left, left
    again = run(arguments, folder)
    assert again.status == 0, again.output[-1000:]


def in_doctor(number: int, folder: Path) -> None:
    photographs(folder / "photos", test=60)
    arguments = ["doctor", "--dataset", "imagefolder", "--data_root", str(folder / "photos"), "--threads", "2"]
    command = Command(arguments, folder, before=slow, given=(0.5, "ffvt.data.doctor", "_look"))
    time.sleep(1.5)
    command.signal(number)
    found = command.end()
    ended_at_once(found, number)
    assert found.seconds < 6, f"took {found.seconds:.0f} s"


def hang_at(module: str, name: str) -> None:
    """A function that a command calls takes for ever; that it was reached is told by a file."""
    import importlib

    def wait(*_given, **_named):
        Path("reached").touch()
        time.sleep(1000)

    place, _, owner = module.partition(":")
    target = importlib.import_module(place)
    setattr(getattr(target, owner) if owner else target, name, wait)


def in_command(number: int, arguments: list[str], module: str, name: str, folder: Path) -> None:
    """Interrupted in the midst of it: one line, no file, nothing half written."""
    photographs(folder / "photos")
    made = run(training(folder, num_steps=1, feature_fusion=True), folder)
    assert made.status == 0, made.output[-1000:]
    image = str(next((folder / "photos" / "test").rglob("*.png")))
    before = _files(folder)
    arguments = [
        {"RUN": str(folder / "run" / "last"), "LOG": str(folder / "run"), "IMAGE": image}.get(a, a) for a in arguments
    ]
    command = Command(arguments, folder, before=hang_at, given=(module, name))
    command.wait_for((folder / "reached").exists)
    time.sleep(0.1)
    command.signal(number)
    ended_at_once(command.end(), number)
    new = _files(folder) - before - {"reached"}
    assert not {name for name in new if not name.startswith(("output-", "demo/", ".demo"))}, new


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def demo_stopped(number: int, folder: Path) -> None:
    command = Command(["demo", "--output", str(folder / "demo")], folder)
    command.wait_for(
        lambda: (
            '"train"' in (folder / "demo" / "log.jsonl").read_text() if (folder / "demo" / "log.jsonl").exists() else 0
        )
    )
    command.signal(number)
    ended_at_once(command.end(), number)
    assert not (folder / "demo" / "report.html").exists()


def ignored_in_the_background(folder: Path) -> None:
    """A background job of a shell ignores Ctrl-C, which is for the one in front."""
    photographs(folder / "photos")
    command = Command(
        training(folder, num_steps=60, eval_every=60), folder, before=signal.signal, given=(INT, signal.SIG_IGN)
    )
    command.wait_for(lambda: logged(folder, "train"))
    command.signal(INT)
    found = command.end()
    assert found.status == 0, found.output[-1000:]
    assert "last: top-1" in found.output


def on_two_ranks(number: int, whom: tuple[int, ...], workers: int, moment: str, folder: Path) -> None:
    """One rank's signal stops all of them at one step, in a step or in an evaluation."""
    photographs(folder / "photos", test=20)
    long = {"num_steps": 5000, "eval_every": 5000, "save_every": 5000}
    short = {"num_steps": 9, "eval_every": 3, "eval_batch_size": 2}
    options = {"workers": workers, **(long if moment == "train" else short)}
    slow = {} if moment == "train" else {"before": slow_images, "given": (0.5, "test")}
    commands = ranks([training(folder, **options)] * 2, folder, **slow)
    commands[0].wait_for(lambda: logged(folder, "train"))
    time.sleep(1.0 if moment == "evaluate" else 0.1)
    for rank in whom:
        commands[rank].signal(number)
    found = [command.end() for command in commands]
    step = stopped(found[0], number, folder)
    assert step == 3 or moment == "train", step
    assert found[1].status == SAVED[number], found[1].output[-1000:]
    quiet(found[1])


def while_waiting_for_a_peer(number: int, folder: Path) -> None:
    photographs(folder / "photos")
    (command, *others) = ranks([training(folder), ["--version"]], folder)
    others[0].end()
    time.sleep(2.0)
    command.signal(number)
    ended_at_once(command.end(), number)


def usual(number: int) -> str:
    return signal.Signals(number).name


def _case(name: str, attempt: Callable, *given: object) -> Case:
    return Case("signals", name, partial(attempt, *given), refusal=None, seconds=120, slow=True)


COMMANDS = {
    "predict": (["predict", "--checkpoint", "RUN", "IMAGE"], "ffvt.inference", "load"),
    "evaluate": (["evaluate", "--checkpoint", "RUN"], "ffvt.train.evaluate:_Sums", "add"),
    "visualize": (["visualize", "--checkpoint", "RUN", "IMAGE"], "ffvt.inference", "load"),
    "plot": (["plot", "LOG"], "ffvt.report.comparison", "run"),
    "plan": (["plan", "--memory", "24GiB"], "ffvt.train.plan", "describe_plan"),
    "demo": (["demo"], "ffvt.report.demo", "run_demo"),
    "info": (["info"], "ffvt", "info"),
}
CASES = [
    *(
        _case(
            f"{usual(n)} in training, {workers} workers, {'all processes' if group else 'trainer'}",
            in_training,
            n,
            workers,
            group,
        )
        for n in (INT, TERM)
        for workers, group in ((0, False), (2, False), (2, True))
    ),
    *(_case(f"{usual(n)} three times within 0.1 s", twice_at_once, n) for n in (INT, TERM)),
    *(
        _case(f"{usual(a)}, then {usual(b)}, {workers} workers", a_second_one, a, b, workers)
        for a, b, workers in ((INT, INT, 0), (TERM, TERM, 2), (INT, TERM, 2), (TERM, INT, 0))
    ),
    *(_case(f"{usual(n)} in an evaluation, {w} workers", in_evaluation, n, w) for n in (INT, TERM) for w in (0, 2)),
    *(
        _case(f"{usual(n)} and resumed, {w} workers: the same bytes", resumed_ends_the_same, n, w)
        for n, w in ((INT, 2), (TERM, 0))
    ),
    *(_case(f"{usual(n)} in the final evaluation", in_final_evaluation, n) for n in (INT, TERM)),
    *(_case(f"{usual(n)} while the cache is built", while_caching, n) for n in (INT, TERM)),
    *(_case(f"{usual(n)} in doctor", in_doctor, n) for n in (INT, TERM)),
    *(_case(f"{usual(n)} in {name}", in_command, n, *how) for name, how in COMMANDS.items() for n in (INT, TERM)),
    *(_case(f"{usual(n)} in the training of the demo", demo_stopped, n) for n in (INT, TERM)),
    _case("SIGINT where it is ignored", ignored_in_the_background),
    *(
        _case(
            f"{usual(n)} on 2 ranks to {'rank ' + str(whom[0]) if len(whom) == 1 else 'both'} in {moment}, {w} workers",
            on_two_ranks,
            n,
            whom,
            w,
            moment,
        )
        for n, whom, w, moment in (
            (INT, (0,), 0, "train"),
            (INT, (0, 1), 2, "train"),
            (TERM, (1,), 0, "train"),
            (TERM, (1,), 2, "train"),
            (INT, (1,), 0, "evaluate"),
            (TERM, (0, 1), 2, "evaluate"),
        )
    ),
    *(_case(f"{usual(n)} while a peer is awaited", while_waiting_for_a_peer, n) for n in (INT, TERM)),
]
