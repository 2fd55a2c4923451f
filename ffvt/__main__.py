"""The command line: `ffvt demo | train | evaluate | predict | visualize | plot | plan | doctor | info`."""

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
    from ffvt.data.datasets import open_split, recipe_of
    from ffvt.data.sampling import EvaluationView
    from ffvt.train.checkpoint import load_checkpoint
    from ffvt.train.distributed import join_world
    from ffvt.train.evaluate import evaluate as run

    checkpoint = load_checkpoint(arguments.checkpoint)
    options, config = checkpoint.facts["options"], checkpoint.model.config
    dataset = arguments.dataset or options["dataset"]
    classes = checkpoint.facts["classes"]
    images = open_split(
        dataset,
        arguments.split,
        config.image_size,
        checkpoint.facts["resize_size"],
        arguments.data_root or options["data_root"],
        options["preset"],
        options["seed"],
        classes,
        arguments.cache_dir,
    )
    if list(images.classes) != classes:
        raise ValueError(f"{dataset} must have the classes of the checkpoint; got {list(images.classes)[:3]} and so on")
    with join_world(arguments.device) as world:
        recipe = recipe_of(options["dataset"])
        view = EvaluationView(images, config.image_size, recipe, config.grid_size, arguments.skip_bad_images)
        model = checkpoint.model.to(world.device)
        score = run(model, view, world, arguments.batch_size, arguments.precision, arguments.workers)
        if world.is_main:
            shown = score.summary()
            if arguments.per_class:
                counts = zip(classes, score.per_class)
                shown["per_class"] = {name: {"right": right, "count": count} for name, (right, count) in counts}
            print(json.dumps(shown))


def predict(arguments: argparse.Namespace) -> None:
    import torch

    checkpoint, _, pixels = _load_for(arguments)
    for path, image in zip(arguments.images, pixels):
        with torch.inference_mode():
            probabilities = checkpoint.model(image[None])[0].softmax(-1)
        best = probabilities.topk(min(arguments.top, len(probabilities)))
        print(path)
        for probability, label in zip(best.values.tolist(), best.indices.tolist()):
            print(f"  {probability:6.1%}  {checkpoint.facts['classes'][label]}")


def visualize(arguments: argparse.Namespace) -> None:
    import torch

    from ffvt.report.page import png
    from ffvt.report.pictures import selection_grid

    checkpoint, images, pixels = _load_for(arguments)
    with torch.inference_mode():
        logits, selection = checkpoint.model.forward_with_selection(pixels)
    names = [checkpoint.facts["classes"][label] for label in logits.argmax(1).tolist()]
    config = checkpoint.model.config
    patch = config.image_size // config.grid_size
    figure = selection_grid(images, selection.index, patch, [(name, None) for name in names])
    Path(arguments.output).write_bytes(png(figure))
    print(arguments.output)


def _load_for(arguments: argparse.Namespace) -> tuple:
    """The checkpoint in evaluation mode; the pictures of the command line, uint8 (3, S, S) each; the model's input."""
    import torch

    from ffvt.data.datasets import recipe_of
    from ffvt.data.transforms import evaluation_view, load_image, normalize
    from ffvt.train.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(arguments.checkpoint)
    checkpoint.model.eval()
    recipe, size = recipe_of(checkpoint.facts["options"]["dataset"]), checkpoint.model.config.image_size
    resize = checkpoint.facts["resize_size"]
    images = [evaluation_view(load_image(path, resize), size, recipe) for path in arguments.images]
    return checkpoint, images, normalize(torch.stack(images), recipe)


def info(arguments: argparse.Namespace) -> None:
    import ffvt

    print(json.dumps(ffvt.info(), indent=2))


def doctor(arguments: argparse.Namespace) -> int:
    from ffvt.data.doctor import run

    return run(arguments)


def plan(arguments: argparse.Namespace) -> int:
    from ffvt.train.planner import run

    return run(arguments)


def plot(arguments: argparse.Namespace) -> int:
    from ffvt.report.comparison import run

    return run(arguments)


def make_parser() -> argparse.ArgumentParser:
    """All commands but `train`, whose flags are `ffvt.train`'s own."""
    from ffvt.train.planner import add_flags as add_plan_flags

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
    command.add_argument("--cache_dir", default="", help="folder of decoded pictures (default: none)")
    command.add_argument("--skip_bad_images", action="store_true", help="leave out pictures that cannot be read")
    command.add_argument("--per_class", action="store_true", help="show how many are right of every class")
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
    command = add(plot, "compare training runs in one picture")
    command.add_argument("--output", default="comparison.png", help="PNG to write (default: comparison.png)")
    command.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or its log.jsonl")
    add_plan_flags(add(plan, "predict the largest batch and the images per second of training"))
    command = add(doctor, "check a data set on disk: layout, counts, pictures, duplicates, leaks")
    command.add_argument("--dataset", required=True, help="name of the data set, as in training")
    command.add_argument("--data_root", default="./data", help="folder of the data set (default: ./data)")
    command.add_argument("--extract", metavar="ARCHIVE", help="first unpack this archive into data_root")
    command.add_argument("--threads", type=int, default=0, help="threads that read pictures (default: one per CPU)")
    command.add_argument("--json", action="store_true", help="print JSON")
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
        return parsed.run(parsed) or 0
    except USAGE_ERRORS as error:
        print(f"{PROGRAM} {parsed.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
