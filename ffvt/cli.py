"""The command line: `ffvt demo | train | evaluate | predict | visualize | export | plot | plan | doctor | info`.

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

from ffvt.exits import INTERRUPTED, OK, Parser, run_to_exit
from ffvt.precision import PRECISIONS
from ffvt.train.flags import add_training_flags, read_options
from ffvt.train.options import DEVICES
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
    add_training_flags(add(train, "train FFVT, TransFG or, without --feature_fusion, the plain ViT", logging.INFO))
    _add_evaluate_flags(add(evaluate, "evaluate a trained model on a data set"))
    _add_predict_flags(add(predict, "classify images: the most probable classes of each"))
    _add_visualize_flags(add(visualize, "show which patches each layer, or head, picks in images"))
    _add_export_flags(add(export, "write a checkpoint as one .onnx or .pt2 file, compared with the model"))
    _add_plot_flags(add(plot, "compare training runs in one figure"))
    _add_plan_flags(add(plan, "predict the largest batch and the images per second of training"))
    _add_doctor_flags(add(doctor, "check a data set on disk: layout, counts, images, duplicates, leaks"))
    add(info, "show which backend each device uses, why one is missing, and the rates of matrix products")
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
    command.add_argument("--image_root", default="", help="folder of the images that a csv lists (default: data_root)")
    command.add_argument("--split", default="test", help="split; val: also what --val_split held out (default: test)")
    _add_inference_flags(command, batch_size="images per process and step")
    command.add_argument("--workers", type=int, default=0, help="processes that load images (default: 0)")
    command.add_argument("--cache_dir", default="", help="folder of decoded images (default: none)")
    command.add_argument("--skip_bad_images", action="store_true", help="leave out images that cannot be read")
    command.add_argument("--json", action="store_true", help="print one line of JSON")
    command.add_argument(
        "--per_class", action="store_true", help="show precision, recall, F1 and support of each class"
    )
    command.add_argument("--confusion", default="", metavar="FILE", help="write the confusion matrix: .png, .pdf, .csv")
    command.add_argument("--predictions", default="", metavar="FILE", help="write a .csv with a row for every image")


def evaluate(arguments: argparse.Namespace) -> None:
    from ffvt.report.scores import run

    run(arguments)


def _add_predict_flags(command: argparse.ArgumentParser) -> None:
    _add_checkpoint_flag(command)
    _add_image_flags(command)
    command.add_argument("--top", type=int, default=5, metavar="N", help="classes to show (default: 5)")
    _add_inference_flags(command)
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="write a JSON object a line")
    form.add_argument("--csv", action="store_true", help="write CSV")
    command.add_argument("--output", default="", metavar="FILE", help="write there instead of to standard output")


def predict(arguments: argparse.Namespace) -> int:
    from ffvt.predicting import run

    return run(arguments)


def _add_visualize_flags(command: argparse.ArgumentParser) -> None:
    _add_checkpoint_flag(command)
    _add_image_flags(command)
    command.add_argument(
        "--output",
        default="selection.html",
        metavar="FILE",
        help="a page to look through (.html) or one figure (.png, .jpg, .webp, .pdf, .svg) (default: selection.html)",
    )
    command.add_argument(
        "--max_size", type=int, default=1024, metavar="N", help="longest side of a shown image, pixels (default: 1024)"
    )
    command.add_argument(
        "--labels",
        choices=("folder", "none"),
        default="folder",
        help="folder: the true class is that of the folder whose name is a class (default)",
    )
    command.add_argument(
        "--criterion", default="", metavar="NAME", help="pick by another one of ffvt.criteria (default: the model's)"
    )
    _add_inference_flags(command)


def visualize(arguments: argparse.Namespace) -> int:
    from ffvt.report.gallery import run

    return run(arguments)


def _add_export_flags(command: argparse.ArgumentParser) -> None:
    _add_checkpoint_flag(command)
    command.add_argument("--output", required=True, metavar="FILE", help="file to write: .onnx or .pt2")
    command.add_argument("--with_selection", action="store_true", help="return the picks and the scores too")
    command.add_argument("--opset", type=int, metavar="N", help="ONNX operator set (default: PyTorch's choice)")
    size = {"type": _batch_size, "default": None, "metavar": "N"}
    command.add_argument("--batch_size", help="images per call, or dynamic for any number (default: dynamic)", **size)
    images = "random images to compare file and model on before it is written; 0: none (default: 8)"
    command.add_argument("--check", type=int, default=8, metavar="N", help=images)


def export(arguments: argparse.Namespace) -> None:
    from ffvt.export import export_classifier
    from ffvt.inference import load

    options = {name: getattr(arguments, name) for name in ("with_selection", "batch_size", "opset", "check")}
    print(export_classifier(load(arguments.checkpoint), arguments.output, **options).summary())


def _batch_size(text: str) -> int | None:
    return None if text == "dynamic" else int(text)


def _add_checkpoint_flag(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint", required=True, help="folder of a run (its best checkpoint, else the last), or of a checkpoint"
    )


def _add_image_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "images", nargs="*", metavar="PATH", help="images, folders, @FILE for a list of them, or - for one on stdin"
    )
    command.add_argument("--list", action="append", default=[], metavar="FILE", help="the same as @FILE")
    command.add_argument("--workers", type=int, default=2, help="threads that read images ahead (default: 2)")


def _add_inference_flags(command: argparse.ArgumentParser, batch_size: str = "images per step") -> None:
    command.add_argument("--batch_size", type=int, default=16, metavar="N", help=f"{batch_size} (default: 16)")
    command.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default: fp32")
    command.add_argument("--device", choices=DEVICES, default="auto", help="default: auto, a GPU if there is one")


def _add_plot_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--output",
        default="comparison.png",
        help="picture to write, in the format of its name (default: comparison.png)",
    )
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
    command.add_argument("--image_root", default="", help="folder of the images that a csv lists (default: data_root)")
    command.add_argument("--extract", metavar="ARCHIVE", help="first unpack this archive into data_root")
    command.add_argument("--threads", type=int, default=0, help="threads that read images (default: one per CPU)")
    command.add_argument("--json", action="store_true", help="print JSON")


def doctor(arguments: argparse.Namespace) -> int:
    from ffvt.data.doctor import run

    return run(arguments)


def info(arguments: argparse.Namespace) -> None:
    import ffvt
    from ffvt.rates import matmul_rates

    found = ffvt.info()
    device = "cuda" if found["devices"]["cuda"]["serves"] else "cpu"
    gflops = {name: round(rate / 1e9, 1) for name, rate in matmul_rates(device).items()}
    print(json.dumps({**found, "matmul_gflops": gflops}, indent=2))
