"""One optimiser step: parts, clipping, smoothing, low precision, steps that are skipped, the average of the weights."""

import pytest
import torch

from ffvt.data.transforms import NO_JITTER, PLAIN, Recipe, augment, normalize
from ffvt.train.distributed import World
from ffvt.train.options import TrainOptions
from ffvt.train.state import TrainState, build_model
from ffvt.train.step import Preparation, training_step
from tests.helpers import SMALL, batch_of

ALONE = World(0, 1, torch.device("cpu"))


def one_step(head_std=0.0, poison=None, **changes):
    """loss, gradient norm, state, images of one SGD step at rate 0.1 on 8 random images."""
    options = {"learning_rate": 0.1, "warmup_steps": 0, "num_steps": 10, **changes}
    state = TrainState(TrainOptions(**{**SMALL, **options}), ALONE, 9)
    torch.nn.init.normal_(state.model.head.weight, std=head_std)
    torch.manual_seed(1)
    images, labels = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8), torch.arange(8)
    if poison:
        state.model.head.bias.register_hook(lambda gradient: gradient * poison)
    result = training_step(state, batch_of(images, labels), Preparation(PLAIN))
    return result.loss, result.norm, state, images


def test_accumulated_parts_make_the_step_of_the_whole_batch():
    whole, parts = one_step(), one_step(gradient_accumulation_steps=4)
    torch.testing.assert_close(whole[:2], parts[:2])
    torch.testing.assert_close(list(whole[2].model.parameters()), list(parts[2].model.parameters()))


def build_model_like(head_std=0.0):
    torch.manual_seed(TrainOptions.seed)
    model = build_model(TrainOptions(**SMALL), 9)
    torch.manual_seed(TrainOptions.seed)
    torch.nn.init.normal_(model.head.weight, std=head_std)
    return model


def test_gradients_are_clipped_after_unscaling_and_labels_smoothed():
    plain, clipped = one_step(max_grad_norm=0.0), one_step(max_grad_norm=1e-3)
    start = build_model_like()
    torch.testing.assert_close(plain[1], clipped[1])
    moved = torch.cat([(a - b).flatten() for a, b in zip(clipped[2].model.parameters(), start.parameters())])
    assert moved.norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)  # learning rate times the clipped norm
    scaled = one_step(precision="fp16", loss_scale=2.0**12, max_grad_norm=1e-3)
    torch.testing.assert_close(scaled[1], plain[1], rtol=2e-2, atol=0)
    smoothed = one_step(smoothing_value=0.3, head_std=1.0)[0]
    assert smoothed.item() != pytest.approx(one_step(head_std=1.0)[0].item(), rel=1e-3)
    logits = build_model_like(head_std=1.0)(normalize(plain[3]))
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(8), label_smoothing=0.3)
    torch.testing.assert_close(smoothed, expected.detach())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_steps_stay_near_fp32(precision):
    low, full = one_step(precision=precision), one_step()
    torch.testing.assert_close(low[0], full[0], rtol=2e-2, atol=2e-2)
    assert all(p.isfinite().all() for p in low[2].model.parameters())


@pytest.mark.parametrize(("precision", "poison"), [("fp16", None), ("fp32", float("nan")), ("bf16", float("inf"))])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(precision, poison):
    scale = {"loss_scale": 2.0**60} if precision == "fp16" else {}  # the scaled gradients overflow
    _, _, state, _ = one_step(precision=precision, poison=poison, ema_decay=0.9, **scale)
    assert (state.step, state.samples, state.skipped, state.skipped_in_a_row) == (1, 8, 1, 1)
    assert state.scheduler.last_epoch == 0
    assert state.scaler.get_scale() == (2.0**59 if precision == "fp16" else 1.0)
    start = build_model_like()
    assert all(torch.equal(a, b) for a, b in zip(state.model.blocks.parameters(), start.blocks.parameters()))
    assert int(state.ema.n_averaged) == 0
    assert all(parameter.grad is None for parameter in state.model.parameters())


def test_the_average_of_the_weights_is_what_is_evaluated():
    state = one_step(ema_decay=0.75, num_steps=5)[2]
    first = [p.detach().clone() for p in state.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(state.evaluated.parameters(), first))  # of one step so far
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    training_step(state, batch_of(images, torch.arange(8)), Preparation(PLAIN))
    expected = [0.75 * a + 0.25 * b for a, b in zip(first, state.model.parameters())]
    torch.testing.assert_close(list(state.evaluated.parameters()), expected)
    assert not torch.equal(first[0], next(state.model.parameters()))


def test_each_part_of_a_batch_is_prepared_with_its_own_jitter():
    recipe, seen = Recipe(jitter=0.4), []

    class Recorded(Preparation):
        def __call__(self, *given):
            seen.append(super().__call__(*given).clone())
            return seen[-1]

    options = TrainOptions(**{**SMALL, "gradient_accumulation_steps": 4})
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    jitter = NO_JITTER.repeat(8, 1)
    jitter[:, 0] = torch.linspace(0.6, 1.4, 8)
    training_step(TrainState(options, ALONE, 9), batch_of(images, torch.arange(8), jitter), Recorded(recipe))
    assert [len(part) for part in seen] == [2, 2, 2, 2]
    torch.testing.assert_close(torch.cat(seen), augment(images, jitter, recipe), rtol=0, atol=1e-6)
