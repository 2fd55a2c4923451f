"""`ffvt demo`: trains an FFVT from scratch on PartBirds and shows what it learned to look at."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ffvt.data.partbirds import PRESETS, PartBirds
from ffvt.data.transforms import normalize
from ffvt.errors import printable, require
from ffvt.files import write_whole
from ffvt.model.config import FFVTConfig
from ffvt.model.ffvt import FFVT
from ffvt.report.page import Page
from ffvt.report.picks import noun, panels, patch_grid, reason
from ffvt.report.pictures import hit_rate_bars, selection_grid, training_curve
from ffvt.train.checkpoint import load_checkpoint
from ffvt.train.engine import TrainResult, train
from ffvt.train.flags import parse_training_flags
from ffvt.train.options import TrainOptions
from ffvt.train.runlog import read_log
from ffvt.train.signals import interruption

MARK = ".ffvt-demo"  # a file in a demo's folder, which the next demo may replace
SHOWN = 8  # test birds in the report

# A small FFVT that a laptop's CPU trains in about a minute and a half: 8-pixel patches, 64 of them and the class token.
RECIPE = parse_training_flags(["--recipe", "partbirds", "--name", "demo"])


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        ceiling: the best test accuracy that colour alone can give.
        report: the HTML page.
        training: the run; the rates below are those of its last model on the test birds.
    """

    ceiling: float
    report: Path
    training: TrainResult

    @property
    def accuracy(self) -> float:
        """Fraction of the test birds that are right."""
        return self.training.last.top1

    @property
    def hit_rates(self) -> list[float]:
        """Fraction of each layer's picks that lie on the mark."""
        return self.training.last.selection.layer_hit_rates

    @property
    def mean_hit_rate(self) -> float:
        """The hit rate over all selecting layers."""
        return self.training.last.selection.hit_rate

    @property
    def random_hit_rate(self) -> float:
        """The hit rate of random picks."""
        return self.training.last.selection.random_hit_rate


def run_demo(output: str | Path, options: TrainOptions = RECIPE) -> DemoResult:
    """Trains by `options` (a PartBirds run), writes `output`/report.html and the run's log and models beside it.

    An earlier demo in that folder is replaced.

    Raises:
        ValueError: the folder has something else in it; nothing is touched then.
    """
    output = Path(output)
    _claim(output)
    options = replace(options, output_dir=str(output.parent), name=output.name, overwrite=True)
    training = train(options)
    if training.signal is not None:  # there is nothing to report on
        raise interruption(training.signal)
    model = load_checkpoint(training.folder / "last").model
    birds = PartBirds("test", options.preset, options.seed)
    result = DemoResult(birds.coarse_only_ceiling, output / "report.html", training)
    page = Page("FFVT learns which patches matter")
    _introduce(page, result, options)
    _show_learning(page, result)
    _show_selection(page, result, model.config)
    _show_birds(page, model, birds)
    page.footer(_small_print(model, options, training))
    write_whole(result.report, page.render().encode())
    return result


def _claim(output: Path) -> None:
    """Makes a folder the demo's, which a file in it says from then on."""
    found = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    if MARK not in found:
        holds = f", which holds {printable(found[0])}" if found else ""
        is_free = not found and (output.is_dir() or not os.path.lexists(output))
        require(is_free, "demo", "output", "a new or empty folder, or an earlier demo's", f"{output}{holds}")
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).touch()


def _introduce(page: Page, result: DemoResult, options: TrainOptions) -> None:
    birds = PRESETS[options.preset]
    page.paragraph(
        f"PartBirds draws {birds.families} families of birds, told apart by colour, each in {birds.varieties} "
        "varieties that differ in one small mark on the wing and in nothing else; stray marks beside the bird belong "
        f"to other varieties. A model that sees only colour gets {result.ceiling:.0%} right. This one was trained "
        "from scratch, on this machine."
    )
    page.facts(
        [
            (
                f"{result.accuracy:.1%}",
                f"test accuracy on {result.training.last.count} birds; {result.ceiling:.0%} by colour",
            ),
            (
                f"{result.mean_hit_rate:.1%}",
                f"of the selected patches lie on the mark; {result.random_hit_rate:.1%} by chance",
            ),
            (f"{result.mean_hit_rate / result.random_hit_rate:.1f}x", "as often on the mark as random picks"),
            (f"{result.training.seconds:.0f} s", f"for {options.num_steps} steps of {options.train_batch_size} images"),
        ]
    )


def _show_learning(page: Page, result: DemoResult) -> None:
    page.heading("Did it learn?")
    page.figure(
        training_curve(read_log(result.training.folder), result.ceiling),
        "training loss and test accuracy over the steps",
    )


def _show_selection(page: Page, result: DemoResult, config: FFVTConfig) -> None:
    page.heading("Where does it look?")
    lines, kind = len(result.hit_rates), noun(config)
    who = f"Each of the {lines} heads" if kind == "head" else f"Each of the first {lines} layers"
    count = 1 if kind == "head" else config.num_select
    page.paragraph(
        f"{who} picks {count} of {config.num_tokens - 1} patches by {reason(config)}; only these and the class token "
        "reach the last layer. Nothing tells the model where the mark is."
    )
    page.figure(hit_rate_bars(result.hit_rates, result.random_hit_rate, kind), f"hit rate of the picks per {kind}")


@torch.no_grad()
def _show_birds(page: Page, model: FFVT, birds: PartBirds) -> None:
    kind = noun(model.config)
    page.heading(f"What did each {kind} pick?")
    page.paragraph(
        "The first test birds, never seen in training. Left: the picture, its mark framed in green, its class in "
        "green where the prediction is right. "
        f"Then the patches that each {kind} picked, framed; the rest is dimmed."
    )
    shown = range(min(SHOWN, len(birds)))
    images = [birds[i][0] for i in shown]
    logits, selection = model.eval().forward_with_selection(normalize(torch.stack(images)))
    captions = [_caption(birds.classes, label, birds.labels[i]) for i, label in enumerate(logits.argmax(1).tolist())]
    boxes = [birds.box(i) for i in shown]
    index, titles = panels(selection.lines, model.config)
    grid = selection_grid(images, index, patch_grid(model.config), captions, boxes, titles=titles)
    page.figure(grid, f"test birds with the patches each {kind} picked")


def _caption(classes: list[str], predicted: int, true: int) -> tuple[str, bool]:
    if predicted == true:
        return classes[true], True
    return f"{classes[true]}\ntaken for {classes[predicted]}", False


def _small_print(model: object, options: TrainOptions, training: TrainResult) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"{parameters / 1e6:.2f} M parameters, {options.depth} layers, width {options.embed_dim}, "
        f"{options.patch_size}-pixel patches, {options.img_size}-pixel images, seed {options.seed}, "
        f"{options.autocast_precision}. "
        f"Model and log: {training.folder}/last, {training.folder}/log.jsonl."
    )


def summary(result: DemoResult) -> str:
    """The result in three lines, for a terminal."""
    rates = ", ".join(f"{rate:.1%}" for rate in result.hit_rates)
    accuracy, hits = result.accuracy / result.ceiling, result.mean_hit_rate / result.random_hit_rate
    return (
        f"test accuracy   {result.accuracy:.1%}, {accuracy:.1f}x the {result.ceiling:.0%} that colour alone gives\n"
        f"hit rate        {result.mean_hit_rate:.1%} of the selected patches lie on the mark (per layer {rates}), "
        f"{hits:.1f}x the {result.random_hit_rate:.1%} of random picks\n"
        f"report          {result.report}"
    )
