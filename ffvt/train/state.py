"""All that changes in a run: weights, optimiser, schedule, scaler, random generators, position in the data."""

from __future__ import annotations

import logging
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ffvt.model.ffvt import FFVT, create_model
from ffvt.model.weights import load_weights
from ffvt.train.distributed import World, like_shards_of, whole
from ffvt.train.evaluate import Score
from ffvt.train.optim import make_optimizer, make_scheduler
from ffvt.train.options import TrainOptions

log = logging.getLogger("ffvt")

DEFAULT_LOSS_SCALE = 2.0**16


class TrainState:
    """A run's state, new or taken from a checkpoint by `restore`.

    model: the model; parallel: what trains it, on all ranks; evaluated: what is evaluated and saved as the model, the
    moving average of the weights where there is one. step: steps done, skipped ones included; samples: images drawn, of
    all ranks together. last, best: scores of the last and the best evaluation, made at evaluated_step and best_step.
    """

    def __init__(self, options: TrainOptions, world: World, num_classes: int) -> None:
        self.options, self.world = options, world
        seed_everything(options.seed)
        self.model = build_model(options, num_classes).to(world.device)
        average = get_ema_multi_avg_fn(options.ema_decay)
        self.ema = AveragedModel(self.model, multi_avg_fn=average) if options.ema_decay else None
        if options.compile:
            self.model.compile()
        self.parallel = world.wrap(self.model, options.fsdp)
        self.optimizer = make_optimizer(
            options.optimizer, self.model, options.learning_rate, options.weight_decay, options.layer_decay
        )
        self.scheduler = self._make_scheduler()
        self.scaler = make_scaler(options, world)
        self.meter = Meter(world.device)
        self.step = self.samples = self.skipped = self.skipped_in_a_row = 0
        self.best_step = self.evaluated_step = 0
        self.pixels: Tensor | None = None  # of the batch at hand
        self.last: Score | None = None
        self.best: Score | None = None
        seed_everything(options.seed + world.rank)  # the weights are the same on every rank, the dropout masks are not

    @property
    def evaluated(self) -> FFVT:
        return self.model if self.ema is None else self.ema.module

    def _make_scheduler(self, done: int = 0) -> torch.optim.lr_scheduler.LambdaLR:
        options = self.options
        return make_scheduler(self.optimizer, options.decay_type, options.warmup_steps, options.num_steps, done)

    def capture(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """The evaluated model's tensors, all other tensors, and the rest in plain types.

        All ranks must call it; what it gives is of use on the main one.
        """
        model, tensors = {}, {}
        if self.world.is_main or self.options.fsdp:  # shards are put together on all ranks
            model = {name: whole(value) for name, value in self.evaluated.state_dict().items()}
            tensors = self._other_tensors()
        generators = []
        for rank, (plain, states) in enumerate(self.world.gather(_generator_states(self.world.device))):
            generators.append(plain)
            tensors |= {f"generator/{rank}/{kind}": value for kind, value in states.items()}
        plain = {
            "step": self.step,
            "samples": self.samples,
            "world_size": self.world.size,
            "schedule_steps": self.scheduler.last_epoch,
            "scaler": self.scaler.state_dict(),
            "averaged_steps": int(self.ema.n_averaged) if self.ema is not None else 0,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "meter": self.world.sum(self.meter.sums.clone()).tolist(),
            "last": self.last.summary() if self.last else None,
            "best": self.best.summary() if self.best else None,
            "best_step": self.best_step,
            "evaluated_step": self.evaluated_step,
            "generators": generators,
        }
        return model, tensors, plain

    def _other_tensors(self) -> dict[str, Tensor]:
        """The trained model, where another one is evaluated, and the optimiser's state, by their parameters' names."""
        tensors = {}
        if self.ema is not None:
            tensors |= {f"model/{name}": whole(value) for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    tensors[f"optimizer/{name}/{key}"] = whole(value)
        return tensors

    def restore(self, model: dict[str, Tensor], tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Takes on a captured state. All ranks must call it.

        Raises:
            ValueError: it is of another model, or of another kind of optimiser.
        """
        _fill(self.model, _part(tensors, "model") or model)
        if self.ema is not None:
            _fill(self.ema.module, model)
            self.ema.n_averaged.fill_(plain["averaged_steps"])
        self._restore_optimizer(_part(tensors, "optimizer"))
        self.scheduler = self._make_scheduler(plain["schedule_steps"])
        if self.scaler.is_enabled() and plain["scaler"]:
            self.scaler.load_state_dict(plain["scaler"])
        for name in ("step", "samples", "skipped", "skipped_in_a_row", "best_step", "evaluated_step"):
            setattr(self, name, plain[name])
        if self.world.is_main:  # the sums of all ranks are in one place
            self.meter.sums.copy_(torch.tensor(plain["meter"], dtype=torch.float64))
        self.last, self.best = (Score.from_summary(plain[name]) if plain[name] else None for name in ("last", "best"))
        if plain["world_size"] == self.world.size:
            rank = self.world.rank
            _set_generators(plain["generators"][rank], _part(tensors, f"generator/{rank}"), self.world.device)
        else:
            log.log(
                logging.WARNING if self.world.is_main else logging.INFO,
                "resuming on %d processes a run of %d: the images come in the same order, dropout masks differ",
                self.world.size,
                plain["world_size"],
            )
            seed_everything(self.options.seed + self.world.rank + 1000003 * self.step)

    def _restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        known = {"sgd": {"momentum_buffer"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}}[self.options.optimizer]
        for key, value in tensors.items():
            name, _, kind = key.rpartition("/")
            parameter = parameters[name]
            if kind not in known:
                raise ValueError(
                    f"resume: the optimiser must be the checkpoint's; got optimizer={self.options.optimizer!r}"
                )
            fits = value.shape == parameter.shape
            self.optimizer.state[parameter][kind] = (
                like_shards_of(parameter, value).to(parameter.device, copy=True) if fits else value
            )


class Meter:
    """Sums since the last line of the log, on the device: loss, images right, images, gradient norm, steps."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, right: Tensor, images: int, norm: Tensor) -> None:
        """One step of this rank: its mean loss, how many of its images were right, the norm of the mean gradient."""
        counts = torch.tensor([images, 1.0], dtype=torch.float64, device=loss.device)
        self.sums += torch.stack([loss.double(), right.double(), counts[0], norm.double(), counts[1]])

    def take(self, world: World) -> tuple[float, float, float]:
        """Mean loss, share right and mean gradient norm over all ranks; starts anew."""
        loss, right, images, norm, steps = world.sum(self.sums.clone()).tolist()
        self.sums.zero_()
        return loss / steps, right / images, norm / steps


def build_model(options: TrainOptions, num_classes: int) -> FFVT:
    """The model that `options` describe, with its starting weights."""
    model = create_model(
        options.model_type,
        image_size=options.img_size,
        num_classes=num_classes,
        num_select=options.num_token,
        feature_fusion=options.feature_fusion,
        **options.model_overrides,
    )
    if options.pretrained_dir:
        log.info("%s", load_weights(model, options.pretrained_dir, last_block=options.last_block))
    return model


def make_scaler(options: TrainOptions, world: World) -> torch.amp.GradScaler:
    """The gradient scaler of fp16; for the other precisions one that does nothing."""
    first = options.loss_scale or DEFAULT_LOSS_SCALE
    return torch.amp.GradScaler(world.device.type, init_scale=first, enabled=options.autocast_precision == "fp16")


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _generator_states(device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """States of Python's and NumPy's generators in plain types, and of PyTorch's as tensors."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    plain = {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
    }
    tensors = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return plain, tensors


def _set_generators(plain: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


@torch.no_grad()
def _fill(model: nn.Module, values: dict[str, Tensor]) -> None:
    own = model.state_dict()
    wrong = [name for name in own if name not in values or values[name].shape != own[name].shape]
    wrong += [name for name in values if name not in own]
    if wrong:
        raise ValueError(f"resume: the model must be the checkpoint's; it differs in {', '.join(wrong[:5])}")
    for name, value in own.items():
        value.copy_(like_shards_of(value, values[name]))
