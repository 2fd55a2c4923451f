"""The command line: `ffvt demo | train | evaluate | predict | visualize | info`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

PROGRAM = "ffvt"


def demo(arguments: argparse.Namespace) -> None:
    from ffvt.report.demo import RECIPE, run_demo, summary

    print(f"Training a small FFVT on PartBirds, {RECIPE.num_steps} steps; this takes a minute or two.", flush=True)
    print(summary(run_demo(arguments.output)))


def evaluate(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from ffvt.data.datasets import EvaluationView, open_split
    from ffvt.train.checkpoint import load_checkpoint
    from ffvt.train.distributed import join_world
    from ffvt.train.evaluate import evaluate as run

    checkpoint = load_checkpoint(arguments.checkpoint)
    options = checkpoint.facts["options"]
    image_size = checkpoint.model.config.image_size
    dataset = arguments.dataset or options["dataset"]
    root = arguments.data_root or options["data_root"]
    classes = checkpoint.facts["classes"]
    images = open_split(
        dataset,
        arguments.split,
        image_size,
        checkpoint.facts["resize_size"],
        root,
        options["preset"],
        options["seed"],
        classes,
    )
    if list(images.classes) != classes:
        raise ValueError(f"{dataset} must have the classes of the checkpoint; got {list(images.classes)[:3]} and so on")
    with join_world(arguments.device) as world:
        view = EvaluationView(images, image_size)
        score = run(
            checkpoint.model.to(world.device), view, world, arguments.batch_size, arguments.precision, arguments.workers
        )
        if world.is_main:
            print(json.dumps(asdict(score)))


def predict(arguments: argparse.Namespace) -> None:
    checkpoint, images = _load_for(arguments)
    import torch

    from ffvt.data.transforms import normalize

    for path, image in zip(arguments.images, images):
        with torch.inference_mode():
            probabilities = checkpoint.model(normalize(image[None]))[0].softmax(-1)
        best = probabilities.topk(min(arguments.top, len(probabilities)))
        print(path)
        for probability, label in zip(best.values.tolist(), best.indices.tolist()):
            print(f"  {probability:6.1%}  {checkpoint.facts['classes'][label]}")


def visualize(arguments: argparse.Namespace) -> None:
    checkpoint, images = _load_for(arguments)
    import torch

    from ffvt.data.transforms import normalize
    from ffvt.report.page import png
    from ffvt.report.pictures import selection_grid

    with torch.inference_mode():
        logits, selection = checkpoint.model.forward_with_selection(normalize(torch.stack(images)))
    names = [checkpoint.facts["classes"][label] for label in logits.argmax(1).tolist()]
    config = checkpoint.model.config
    patch = config.image_size // config.grid_size
    figure = selection_grid(images, selection.index, patch, [(name, None) for name in names])
    Path(arguments.output).write_bytes(png(figure))
    print(arguments.output)


def _load_for(arguments: argparse.Namespace) -> tuple:
    """The checkpoint in evaluation mode, and the pictures named on the command line as it wants them."""
    from ffvt.data.transforms import center_crop, load_image
    from ffvt.train.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(arguments.checkpoint)
    checkpoint.model.eval()
    size, resize = checkpoint.model.config.image_size, checkpoint.facts["resize_size"]
    return checkpoint, [center_crop(load_image(path, resize), size) for path in arguments.images]


def info(arguments: argparse.Namespace) -> None:
    import ffvt

    print(json.dumps(ffvt.info(), indent=2))


def make_parser() -> argparse.ArgumentParser:
    """All commands but `train`, whose flags are `ffvt.train`'s own."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(function, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(function.__name__, help=help, description=help)
        command.set_defaults(run=function)
        return command

    command = add(demo, "train a small FFVT on PartBirds from scratch and write a report")
    command.add_argument("--output", default="runs/demo", help="folder of the report (default: runs/demo)")
    commands.add_parser("train", help="train; takes the flags of python -m ffvt.train", add_help=False)
    command = add(evaluate, "evaluate a checkpoint; prints one JSON line")
    command.add_argument("--checkpoint", required=True, help="folder written by training: .../best or .../last")
    command.add_argument("--dataset", default="", help="data set (default: the one it was trained on)")
    command.add_argument("--data_root", default="", help="folder of the data set (default: as in training)")
    command.add_argument("--split", default="test", help="split (default: test)")
    command.add_argument("--batch_size", type=int, default=16, help="images per step (default: 16)")
    command.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: fp32")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    command.add_argument("--workers", type=int, default=0, help="processes that load images (default: 0)")
    command = add(predict, "classify pictures: the most probable classes of each")
    command.add_argument("--checkpoint", required=True, help="folder written by training: .../best or .../last")
    command.add_argument(
        "--top", type=int, choices=range(1, 1001), default=5, metavar="N", help="classes to show (default: 5)"
    )
    command.add_argument("images", nargs="+", metavar="IMAGE")
    command = add(visualize, "draw which patches each layer picks in pictures")
    command.add_argument("--checkpoint", required=True, help="folder written by training: .../best or .../last")
    command.add_argument("--output", default="selection.png", help="PNG to write (default: selection.png)")
    command.add_argument("images", nargs="+", metavar="IMAGE")
    add(info, "what serves each device, and why something is missing")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; exit status 0, or 1 with a message on bad input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["train"]:
        from ffvt.train.__main__ import main as train

        return train(arguments[1:], prog=f"{PROGRAM} train")
    from ffvt.train.__main__ import USAGE_ERRORS

    parsed = make_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        parsed.run(parsed)
    except USAGE_ERRORS as error:
        print(f"{PROGRAM} {parsed.command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
