"""MixUp and CutMix by their formulas, and what decides them."""

import pytest
import torch

from ffvt.data.mixing import Mixing

IMAGES = torch.randn(6, 3, 20, 20, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 1, 4, 2, 0])


def test_mixup_is_a_share_of_two_images_and_of_their_labels():
    mixing = Mixing(0.4, 0.0, 5)
    for seed in range(10):
        images, targets = mixing(IMAGES, LABELS, seed)
        assert targets[0, 0] == 1  # image 0 and its neighbour, image 5, are of one class
        share = targets[1, 1]  # of image 1, whose neighbour is 0
        torch.testing.assert_close(images, share * IMAGES + (1 - share) * IMAGES.roll(1, 0))
        expected = torch.zeros(6, 5)
        expected[range(6), LABELS] += share
        expected[range(6), LABELS.roll(1)] += 1 - share
        torch.testing.assert_close(targets, expected)


def test_cutmix_pastes_a_rectangle_whose_area_is_the_share_of_its_label():
    mixing, shares = Mixing(0.0, 1.0, 5), []
    for seed in range(10):
        images, targets = mixing(IMAGES, LABELS, seed)
        is_own, is_pasted = (images == IMAGES).all(1), (images == IMAGES.roll(1, 0)).all(1)
        assert (is_own ^ is_pasted).all()
        assert (is_own == is_own[0]).all()
        rows, columns = is_pasted[0].any(1).sum(), is_pasted[0].any(0).sum()
        assert is_pasted[0].sum() == rows * columns
        shares.append(float(is_own[1].float().mean()))
        assert targets[1, 1].item() == pytest.approx(shares[-1])
        assert targets[1, 0].item() == pytest.approx(1 - shares[-1], abs=1e-6)
    assert len(set(shares)) > 5


def test_the_seed_alone_decides_and_with_both_alphas_each_kind_comes():
    state, mixing, pasted = torch.get_rng_state(), Mixing(1, 1, 5), 0
    for seed in range(40):
        images, targets = mixing(IMAGES, LABELS, seed)
        again = Mixing(1.0, 1.0, 5)(IMAGES, LABELS, seed)
        assert torch.equal(images, again[0])
        assert torch.equal(targets, again[1])
        pasted += bool(((images == IMAGES) | (images == IMAGES.roll(1, 0))).all())
    assert 10 < pasted < 30
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0, 100.0])
def test_the_shares_have_the_beta_distributions_mean_and_variance(alpha):
    images, shares = torch.zeros(2, 1, 1, 1), []
    mixing = Mixing(alpha, 0.0, 2)
    for seed in range(1500):
        shares.append(float(mixing(images, torch.tensor([0, 1]), seed)[1][0, 0]))
    shares = torch.tensor(shares)
    assert shares.mean().item() == pytest.approx(0.5, abs=0.04)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)
