"""All that changes in a run: weights, optimiser, schedule, scaler, random generators, position in the data."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ffvt.model.registry import config_of, load_weights, model_of
from ffvt.train.cpu_products import choose_products, keep_products, products_of
from ffvt.train.distributed import World
from ffvt.train.evaluate import Score
from ffvt.train.fit import check_tensors, part_of
from ffvt.train.generators import generator_states, seed_everything, set_generators
from ffvt.train.optim import make_optimizer, make_scheduler
from ffvt.train.options import TrainOptions

log = logging.getLogger("ffvt")

DEFAULT_LOSS_SCALE = 2.0**16
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # shards put together, on the main rank
COUNTERS = ("step", "samples", "skipped", "skipped_in_a_row", "best_step", "evaluated_step")


class TrainState:
    """A run's state, new or taken from a checkpoint by `restore`.

    Attributes:
        model: the model.
        parallel: what trains it, on all ranks.
        evaluated: what is evaluated and saved as the model: the moving average of the weights where there is one.
        step: steps done, skipped ones included.
        samples: images drawn, of all ranks together.
        last, best: scores of the last and the best evaluation, made at evaluated_step and best_step.

    Args:
        is_resumed: a checkpoint's weights will replace those of `pretrained_dir`, which are then not read.
    """

    def __init__(self, options: TrainOptions, world: World, num_classes: int, is_resumed: bool = False) -> None:
        self.options, self.world = options, world
        seed_everything(options.seed)
        self.model = build_model(options, num_classes, with_weights=not is_resumed).to(world.device)
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
        self.last: Score | None = None
        self.best: Score | None = None
        choose_products(options.autocast_precision, world)
        seed_everything(options.seed + world.rank)  # the weights are the same on every rank, the dropout masks are not

    @property
    def evaluated(self) -> nn.Module:
        return self.model if self.ema is None else self.ema.module

    def _make_scheduler(self, done: int = 0) -> torch.optim.lr_scheduler.LambdaLR:
        options = self.options
        return make_scheduler(self.optimizer, options.decay_type, options.warmup_steps, options.num_steps, done)

    def capture(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """The evaluated model's tensors, all other tensors, and the rest in plain types.

        All ranks must call it; what it gives is of use on the main one.
        """
        # First, as it shards the parameters again that an evaluation has put together (FSDP2).
        model, tensors = get_model_state_dict(self.evaluated, options=WHOLE), {}
        if self.ema is not None:
            tensors |= {f"model/{name}": t for name, t in get_model_state_dict(self.model, options=WHOLE).items()}
        if self.optimizer.state:  # else PyTorch would make one, by a step
            found = get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE).get("state", {})
            tensors |= {f"optimizer/{name}/{kind}": t for name, kinds in found.items() for kind, t in kinds.items()}
        generators = []
        for rank, (plain, states) in enumerate(self.world.gather(generator_states(self.world.device))):
            generators.append(plain)
            tensors |= {f"generator/{rank}/{kind}": state for kind, state in states.items()}
        plain = {name: getattr(self, name) for name in COUNTERS} | {
            "world_size": self.world.size,
            "schedule_steps": self.scheduler.last_epoch,
            "scaler": self.scaler.state_dict(),
            "averaged_steps": int(self.ema.n_averaged) if self.ema is not None else 0,
            "meter": self.world.sum(self.meter.sums.clone()).tolist(),
            "last": self.last.summary() if self.last else None,
            "best": self.best.summary() if self.best else None,
            "generators": generators,
            "cpu_products": products_of(self.options.autocast_precision, self.world),
            "optimizer_tensors": sum(name.startswith("optimizer/") for name in tensors),
        }
        return model, tensors, plain

    def restore(self, model: dict[str, Tensor], tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Takes on a captured state. All ranks must call it.

        Raises:
            ValueError: it is of another model, or of another kind of optimiser; nothing is changed then.
        """
        check_tensors(self.model, self.options.optimizer, self.world, model, tensors, plain)
        self._restore_optimizer(part_of(tensors, "optimizer"))  # before the weights: it makes a step at rate 0
        set_model_state_dict(self.model, part_of(tensors, "model") or model, options=WHOLE)
        if self.ema is not None:
            set_model_state_dict(self.ema.module, model, options=WHOLE)
            self.ema.n_averaged.fill_(plain["averaged_steps"])
        self.scheduler = self._make_scheduler(plain["schedule_steps"])
        if self.scaler.is_enabled() and plain["scaler"]:
            self.scaler.load_state_dict(plain["scaler"])
        for name in COUNTERS:
            setattr(self, name, plain[name])
        if self.world.is_main:  # the sums of all ranks are in one place
            found = torch.tensor(plain["meter"], dtype=torch.float64)  # older versions had fewer sums
            self.meter.sums[: len(found)] = found.to(self.meter.sums)
        self.last, self.best = (Score.from_summary(plain[name]) if plain[name] else None for name in ("last", "best"))
        keep_products(plain.get("cpu_products"), self.options.autocast_precision, self.world)
        self._restore_generators(plain, tensors)

    def _restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        state: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, kind = key.rpartition("/")
            state.setdefault(name, {})[kind] = value
        if state:
            groups = [{**group, "params": [names[p] for p in group["params"]]} for group in self.optimizer.param_groups]
            whole = {"state": state, "param_groups": groups}
            set_optimizer_state_dict(self.model, self.optimizer, whole, options=WHOLE)

    def _restore_generators(self, plain: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        rank, size, device = self.world.rank, self.world.size, self.world.device
        if plain["world_size"] == size:
            set_generators(plain["generators"][rank], part_of(tensors, f"generator/{rank}"), device)
            return
        log.log(
            logging.WARNING if self.world.is_main else logging.INFO,
            "resuming on %d processes a run of %d: the images come in the same order, dropout masks differ",
            size,
            plain["world_size"],
        )
        seed_everything(self.options.seed + rank + 1000003 * self.step)


class Meter:
    """Sums since the last line of the log, on the device: loss, images correct, images, gradient norm, steps, and the
    contrastive part of the loss."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(6, dtype=torch.float64, device=device)

    @property
    def steps(self) -> int:
        """How many steps were added."""
        return int(self.sums[4])

    def add(self, loss: Tensor, correct: Tensor, images: int, norm: Tensor, contrast: Tensor) -> None:
        """One step of this rank: its mean loss, how many of its images were correct, the norm of the mean gradient, and
        the contrastive part of the loss."""
        counts = torch.tensor([images, 1.0], dtype=torch.float64, device=loss.device)
        own = [loss.double(), correct.double(), counts[0], norm.double(), counts[1], contrast.double()]
        self.sums += torch.stack(own)

    def take(self, world: World) -> tuple[float, float, float, float]:
        """Mean loss, fraction correct, mean gradient norm and mean contrastive loss over all ranks; starts anew."""
        loss, correct, images, norm, steps, contrast = world.sum(self.sums.clone()).tolist()
        self.sums.zero_()
        return loss / steps, correct / images, norm / steps, contrast / steps


def build_model(options: TrainOptions, num_classes: int, with_weights: bool = True) -> nn.Module:
    """The model that `options` describe, with its starting weights, or without those of `pretrained_dir`."""
    model = model_of(config_of(options.model_type, **options.model_fields(num_classes)))
    if options.pretrained_dir and with_weights:
        log.info("%s", load_weights(model, options.pretrained_dir, last_block=options.last_block))
    return model


def make_scaler(options: TrainOptions, world: World) -> torch.amp.GradScaler:
    """The gradient scaler of fp16; for the other precisions one that does nothing."""
    first = options.loss_scale or DEFAULT_LOSS_SCALE
    return torch.amp.GradScaler(world.device.type, init_scale=first, enabled=options.autocast_precision == "fp16")
