"""`ffvt demo`: trains an FFVT from scratch on PartBirds and shows what it learned to look at."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from ffvt.data.partbirds import PRESETS, PartBirds
from ffvt.report.page import Page
from ffvt.report.pictures import hit_rate_bars, selection_grid, training_curve
from ffvt.report.selection import SelectionStudy, hit_rate, random_hit_rate, study_selection
from ffvt.train.checkpoint import load_checkpoint
from ffvt.train.engine import TrainResult, train
from ffvt.train.options import TrainOptions, parse_training_flags

SHOWN = 8  # test birds in the report

# A small FFVT that a laptop's CPU trains in about a minute and a half: 8-pixel patches, 64 of them and the class token.
RECIPE = parse_training_flags(["--recipe", "partbirds", "--name", "demo"])


@dataclass(frozen=True)
class DemoResult:
    """What the demo found: test accuracy and its coarse-only ceiling, hit rates per layer and by chance, the report."""

    accuracy: float
    ceiling: float
    hit_rates: list[float]
    random_hit_rate: float
    report: Path
    training: TrainResult

    @property
    def mean_hit_rate(self) -> float:
        """The hit rate over all selecting layers."""
        return sum(self.hit_rates) / len(self.hit_rates)


def run_demo(output: str | Path, options: TrainOptions = RECIPE) -> DemoResult:
    """Trains by `options` (a PartBirds run), writes `output`/report.html and the run's log and models beside it."""
    output = Path(output)
    options = replace(options, output_dir=str(output.parent), name=output.name, overwrite=True)
    training = train(options)
    model = load_checkpoint(training.folder / "last").model
    birds = PartBirds("test", options.preset, options.seed)
    study = study_selection(model, birds, len(birds))
    result = DemoResult(
        accuracy=training.last.top1,
        ceiling=birds.coarse_only_ceiling,
        hit_rates=hit_rate(study.index, study.on_mark).tolist(),
        random_hit_rate=random_hit_rate(study.on_mark, options.first_candidate),
        report=output / "report.html",
        training=training,
    )
    page = Page("FFVT learns which patches matter")
    _introduce(page, result, options)
    _show_learning(page, result)
    _show_selection(page, result, options, study, birds)
    page.footer(_small_print(model, options, training))
    result.report.write_text(page.render(), encoding="utf-8")
    return result


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
    log = [json.loads(line) for line in (result.training.folder / "log.jsonl").read_text().splitlines()]
    page.heading("Did it learn?")
    page.figure(training_curve(log, result.ceiling), "training loss and test accuracy over the steps")


def _show_selection(
    page: Page, result: DemoResult, options: TrainOptions, study: SelectionStudy, birds: PartBirds
) -> None:
    page.heading("Where does it look?")
    page.paragraph(
        f"Each of the first {len(result.hit_rates)} layers picks {options.num_token} of "
        f"{study.on_mark.shape[1] - 1} patches by mutual attention weight; only these and the class token reach the "
        "last layer. Nothing tells the model where the mark is."
    )
    page.figure(hit_rate_bars(result.hit_rates, result.random_hit_rate), "hit rate of the picks per layer")
    page.heading("What did each layer pick?")
    page.paragraph(
        "The first test birds, never seen in training. Left: the picture, its mark framed in green, its class in "
        "green where the prediction is right. Then the patches that each layer picked, framed; the rest is dimmed."
    )
    shown = range(min(SHOWN, len(study.predictions)))
    captions = [_caption(birds.classes, int(study.predictions[i]), birds.labels[i]) for i in shown]
    images, boxes = [birds[i][0] for i in shown], [birds.box(i) for i in shown]
    grid = selection_grid(images, study.index[: len(shown)], options.patch_size, captions, boxes)
    page.figure(grid, "test birds with the patches each layer picked")


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
