"""The command line: `ffvt demo | train | evaluate | predict | visualize | plot | plan | doctor | info`.

A command imports what it needs when it runs, so that every `--help` answers without importing torch.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ffvt.exits import INTERRUPTED, OK, Parser, run_to_exit
from ffvt.precision import PRECISIONS
from ffvt.train.options import DEVICES, add_training_flags, read_options
from ffvt.version import __version__

PROGRAM = "ffvt"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit status: 0, or 1 with a message on bad input, 130 after Ctrl-C, 143 after SIGTERM (a stopped training
        that has saved ends with 0 then), 141 where nobody reads the output any more.

    Raises:
        SystemExit: with status 2, for arguments that are none.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parsed, unknown = make_parser().parse_known_args(arguments)
    if unknown:
        parsed.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if "recipe" in parsed:
        parsed.options = read_options(parsed.parser, arguments[1:])
    level = parsed.log_level if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    return run_to_exit(lambda: parsed.run(parsed), f"{PROGRAM} {parsed.command}")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; a parsed command has `run`, the function that runs it, and its `parser`."""
    parser = Parser(prog=PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(run: Callable, help: str, log_level: int = logging.WARNING) -> argparse.ArgumentParser:
        usage = f"{PROGRAM} {run.__name__} [FLAGS]" if run in (train, plan) else None  # else all of them, in one block
        command = commands.add_parser(run.__name__, help=help, description=help, usage=usage)
        command.set_defaults(run=run, parser=command, log_level=log_level)
        return command

    _add_demo_flags(add(demo, "train a small FFVT on PartBirds from scratch and write a report"))
    add_training_flags(add(train, "train FFVT or, without --feature_fusion, the plain ViT", logging.INFO))
    _add_evaluate_flags(add(evaluate, "evaluate a checkpoint; prints one JSON line"))
    _add_predict_flags(add(predict, "classify images: the most probable classes of each"))
    _add_visualize_flags(add(visualize, "draw which patches each layer picks in images"))
    _add_plot_flags(add(plot, "compare training runs in one figure"))
    _add_plan_flags(add(plan, "predict the largest batch and the images per second of training"))
    _add_doctor_flags(add(doctor, "check a data set on disk: layout, counts, images, duplicates, leaks"))
    add(info, "show which backend each device uses, and why one is missing")
    return parser


def _add_demo_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", default="runs/demo", help="folder of the report (default: runs/demo)")


def demo(arguments: argparse.Namespace) -> None:
    from ffvt.report.demo import RECIPE, run_demo, summary

    print(f"Training a small FFVT on PartBirds, {RECIPE.num_steps} steps; this takes a minute or two.", flush=True)
    print(summary(run_demo(arguments.output)))


def train(arguments: argparse.Namespace) -> int:
    from ffvt.train import engine

    result = engine.train(arguments.options)
    if os.environ.get("RANK", "0") == "0":
        print(result.summary())
    return INTERRUPTED if result.signal == signal.SIGINT else OK


def _add_evaluate_flags(command: argparse.ArgumentParser) -> None:
    _add_checkpoint_flag(command)
    command.add_argument("--dataset", default="", help="data set (default: the one it was trained on)")
    command.add_argument("--data_root", default="", help="folder of the data set (default: as in training)")
    command.add_argument("--split", default="test", help="split (default: test)")
    command.add_argument("--batch_size", type=int, default=16, help="images per step (default: 16)")
    command.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default: fp32")
    command.add_argument("--device", choices=DEVICES, default="auto", help="default: auto")
    command.add_argument("--workers", type=int, default=0, help="processes that load images (default: 0)")
    command.add_argument("--cache_dir", default="", help="folder of decoded images (default: none)")
    command.add_argument("--skip_bad_images", action="store_true", help="leave out images that cannot be read")
    command.add_argument("--per_class", action="store_true", help="show how many images of each class are correct")


def evaluate(arguments: argparse.Namespace) -> None:
    from ffvt.inference import evaluate_checkpoint, load
    from ffvt.train.distributed import join_world

    names = ("dataset", "data_root", "split", "batch_size", "precision", "workers", "cache_dir", "skip_bad_images")
    classifier = load(arguments.checkpoint)
    with join_world(arguments.device) as world:
        score = evaluate_checkpoint(classifier, world, **{name: getattr(arguments, name) for name in names})
        if world.is_main:
            shown = score.summary()
            if arguments.per_class:
                counts = zip(classifier.classes, score.per_class)
                shown["per_class"] = {name: {"right": right, "count": count} for name, (right, count) in counts}
            print(json.dumps(shown))


def _add_predict_flags(command: argparse.ArgumentParser) -> None:
    _add_checkpoint_flag(command)
    top = {"type": int, "choices": range(1, 1001), "default": 5, "metavar": "N"}
    command.add_argument("--top", help="classes to show (default: 5)", **top)
    command.add_argument("images", nargs="+", metavar="IMAGE")


def predict(arguments: argparse.Namespace) -> None:
    from ffvt.inference import load

    classifier = load(arguments.checkpoint)
    for path in arguments.images:
        (found,) = classifier([path], arguments.top)
        print(path)
        for name, probability in found:
            print(f"  {probability:6.1%}  {name}")


def _add_visualize_flags(command: argparse.ArgumentParser) -> None:
    _add_checkpoint_flag(command)
    command.add_argument("--output", default="selection.png", help="PNG to write (default: selection.png)")
    command.add_argument("images", nargs="+", metavar="IMAGE")


def visualize(arguments: argparse.Namespace) -> None:
    from ffvt.inference import load
    from ffvt.report.page import png
    from ffvt.report.pictures import selection_grid

    classifier = load(arguments.checkpoint)
    images, names, selection = classifier.select(arguments.images)
    config = classifier.model.config
    patch = config.image_size // config.grid_size
    figure = selection_grid(list(images), selection.index, patch, [(name, None) for name in names])
    Path(arguments.output).write_bytes(png(figure))
    print(arguments.output)


def _add_checkpoint_flag(command: argparse.ArgumentParser) -> None:
    command.add_argument("--checkpoint", required=True, help="folder written by training: .../best or .../last")


def _add_plot_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", default="comparison.png", help="PNG to write (default: comparison.png)")
    command.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or its log.jsonl")


def plot(arguments: argparse.Namespace) -> int:
    from ffvt.report.comparison import run

    return run(arguments)


def _add_plan_flags(command: argparse.ArgumentParser) -> None:
    own = command.add_argument_group("planned for", "the training flags follow, as they will be given to ffvt train")
    own.add_argument("--memory", default="", help="of the device, such as 24GiB (default: what is free here)")
    own.add_argument("--tflops", type=float, help="matmul rate of the device, TFLOP/s (default: measured here)")
    own.add_argument("--efficiency", type=float, help="fraction of it that training reaches (default: as measured)")
    own.add_argument("--num_classes", type=int, default=200, help="classes (default: 200)")
    own.add_argument("--json", action="store_true", help="print JSON")
    add_training_flags(command)


def plan(arguments: argparse.Namespace) -> None:
    from ffvt.train.plan import describe_plan

    names = ("memory", "tflops", "efficiency", "num_classes", "json")
    print(describe_plan(arguments.options, **{name: getattr(arguments, name) for name in names}))


def _add_doctor_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dataset", required=True, help="name of the data set, as in training")
    command.add_argument("--data_root", default="./data", help="folder of the data set (default: ./data)")
    command.add_argument("--extract", metavar="ARCHIVE", help="first unpack this archive into data_root")
    command.add_argument("--threads", type=int, default=0, help="threads that read images (default: one per CPU)")
    command.add_argument("--json", action="store_true", help="print JSON")


def doctor(arguments: argparse.Namespace) -> int:
    from ffvt.data.doctor import run

    return run(arguments)


def info(arguments: argparse.Namespace) -> None:
    import ffvt

    print(json.dumps(ffvt.info(), indent=2))
