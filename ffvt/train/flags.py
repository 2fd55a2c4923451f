"""The training options as flags of a command line, with --recipe and --config. Nothing here imports torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ffvt.train.config_file import config_flags
from ffvt.train.options import IN_EPOCHS, RUN, TrainOptions
from ffvt.train.recipes import RECIPES

IGNORED_FLAGS = ("local_rank", "fp16_opt_level")  # the authors'; torchrun and --precision decide


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every training option, by topic, --recipe and --config."""
    known = "; ".join(f"{name} ({recipe.known})" for name, recipe in RECIPES.items()).replace("%", "%%")
    help = f"start from the flags of a recipe, which the flags beside it override: {known}"
    parser.add_argument("--recipe", choices=RECIPES, metavar="NAME", help=help)
    help = "read options from a YAML file, such as a run's config.yaml; it overrides a recipe, flags override it"
    parser.add_argument("--config", metavar="FILE", help=help)
    groups: dict[str, Any] = {}
    for declared in fields(TrainOptions):
        facts = declared.metadata
        if facts["group"] not in groups:
            groups[facts["group"]] = parser.add_argument_group(facts["group"])
        _add_flag(groups[facts["group"]], declared.name, declared.default, facts)
    for name in IGNORED_FLAGS:
        spellings = sorted({f"--{name}", f"--{name.replace('_', '-')}"})
        groups[RUN].add_argument(*spellings, metavar="X", help="accepted and ignored (authors')")


def _add_flag(group: Any, name: str, default: Any, facts: Mapping[str, Any]) -> None:
    authors = " (authors')" if facts["authors"] else ""
    if default is False:
        switch = argparse.BooleanOptionalAction  # --no-NAME switches off what a recipe switches on
        group.add_argument(f"--{name}", action=switch, default=False, help=f"{facts['help']}{authors}")
        return
    kind, choices = facts["kind"], facts["limits"].get("choices")
    meaning = f"{facts['help']}: {', '.join(filter(None, choices))}" if choices else facts["help"]
    listed = " ".join(map(str, default)) if isinstance(default, tuple) else default
    shown = "" if listed in (None, "") else f" (default: {listed})"
    metavar = "NAME" if choices else {int: "N", float: "X", str: "TEXT"}[kind]
    more = {"type": kind, "default": default, "choices": choices, "metavar": metavar, "nargs": facts["count"]}
    group.add_argument(f"--{name}", help=f"{meaning}{authors}{shown}", **more)


def read_options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> TrainOptions:
    """The options in a command line; `parser` has the training flags, and perhaps more.

    A recipe's flags come first, then those of a file, so that those in `arguments` override them, wherever they stand.
    Exits with a usage message where an option does not hold.
    """
    values = parser.parse_args(arguments)
    defaults = {declared.name: declared.default for declared in fields(TrainOptions)}
    try:
        recipe = RECIPES[values.recipe].flags.split() if values.recipe else []
        file = config_flags(values.config, defaults) if values.config else []
        options: dict[str, Any] = {}
        for source in (recipe, file, arguments):
            given = _given(parser, source)
            for epochs, steps in IN_EPOCHS.items():
                if steps in given:  # what is given in epochs by an earlier source counts no more
                    options.pop(epochs, None)
            options |= given
        return TrainOptions(**options)
    except ValueError as error:
        parser.error(str(error).removeprefix("train: "))


def _given(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """The training options that stand in these arguments."""
    absent = object()
    names = [declared.name for declared in fields(TrainOptions)]
    values = parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(names, absent)))
    return {name: getattr(values, name) for name in names if getattr(values, name) is not absent}


def parse_training_flags(arguments: Sequence[str]) -> TrainOptions:
    """The options that `ffvt train` reads from these arguments. Exits with a usage message where they do not hold."""
    parser = argparse.ArgumentParser(prog="ffvt train")
    add_training_flags(parser)
    return read_options(parser, arguments)
