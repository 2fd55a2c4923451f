"""One optimiser step: parts, clipping, smoothing, low precision, steps that are skipped, the average of the weights."""

import pytest
import torch

from ffvt.data.mixing import Mixing
from ffvt.data.sampling import mix
from ffvt.data.transforms import NO_JITTER, PLAIN, Recipe, augment, normalize
from ffvt.train.distributed import World
from ffvt.train.options import TrainOptions
from ffvt.train.state import TrainState, build_model
from ffvt.train.step import Preparation, batch_loss, count_correct, training_step
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


def explicit_loss(logits, shares, smoothing, weights):
    """Each class's part of a smoothed target counts by its weight; the mean is over images."""
    targets = (1 - smoothing) * shares + smoothing / shares.shape[1]
    return -(weights * targets * logits.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 1.0, 3.0, 0.5])])
def test_the_loss_of_mixed_smoothed_weighted_targets_is_its_formula(smoothing, weights):
    logits, labels = 3 * torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 2, 0])
    ones, own = torch.eye(4)[labels], torch.ones(4) if weights is None else weights
    mixed = 0.3 * ones + 0.7 * ones.roll(1, 0)
    for targets, shares in ((labels, ones), (mixed, mixed)):
        found = batch_loss(logits, targets, smoothing, weights)
        torch.testing.assert_close(found, explicit_loss(logits, shares, smoothing, own))
    halves = [batch_loss(logits[part], labels[part], smoothing, weights) for part in (slice(3), slice(3, 6))]
    torch.testing.assert_close(sum(halves) / 2, batch_loss(logits, labels, smoothing, weights))


def test_the_loss_without_weights_or_mixing_has_pytorchs_bits():
    logits, labels = torch.randn(64, 40, requires_grad=True), torch.randint(40, (64,))
    for smoothing in (0.0, 0.1):
        losses = [
            batch_loss(logits.half(), labels, smoothing, None),
            torch.nn.functional.cross_entropy(logits.half().float(), labels, label_smoothing=smoothing),
        ]
        gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
        assert torch.equal(*losses)
        assert torch.equal(*gradients)


def test_a_mixed_image_is_correct_as_what_it_is_most():
    logits = torch.eye(4)  # images are taken for class 0, 1, 2 and 3
    assert count_correct(logits, torch.tensor([0, 1, 0, 3])) == 3
    shares = torch.tensor([[0.6, 0.4, 0, 0], [0.7, 0.3, 0, 0], [0, 0, 1, 0], [0, 0, 0.5, 0.5]])
    assert count_correct(logits, shares) == 3


class SecondOfTwo(World):
    """A rank that need not wait for the other."""

    def any(self, *flags):
        return flags


def test_what_is_mixed_is_decided_by_the_place_in_the_stream_whatever_the_ranks_and_parts():
    seen = []

    class Recorded(Preparation):
        def mix(self, pixels, labels, seed):
            mixed, targets = super().mix(pixels, labels, seed)
            seen.append((seed, labels.tolist(), mixed.clone(), targets))
            return mixed, targets

    images, labels = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8), torch.arange(8)
    alone = TrainState(TrainOptions(**{**SMALL, "gradient_accumulation_steps": 2}), ALONE, 9)
    second = TrainState(TrainOptions(**{**SMALL, "train_batch_size": 4}), ALONE, 9)
    second.world = SecondOfTwo(1, 2, torch.device("cpu"))
    alone.samples = second.samples = 80
    prepare = Recorded(PLAIN, Mixing(0.5, 0.5, 9))
    training_step(alone, batch_of(images, labels), prepare)
    training_step(second, batch_of(images[4:], labels[4:]), prepare)
    assert [seed for seed, *_ in seen] == [mix(42, 80, -4), mix(42, 84, -4), mix(42, 84, -4)]
    assert seen[1][1] == seen[2][1] == [4, 5, 6, 7]
    assert torch.equal(seen[1][2], seen[2][2])
    assert torch.equal(seen[1][3], seen[2][3])
    assert (alone.samples, second.samples) == (88, 88)


def test_rectangles_are_erased_after_normalising_and_only_where_the_recipe_erases():
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    erased = torch.tensor([[3, 5, 10, 20], [0, 0, 0, 0]])
    expected = normalize(images)
    assert torch.equal(Preparation(PLAIN)(images, None, erased), expected)
    expected[0, :, 3:13, 5:25] = 0
    assert torch.equal(Preparation(Recipe(erasing=0.5))(images, None, erased), expected)
