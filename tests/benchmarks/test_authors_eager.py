"""The rival in the authors' form computes what the authors' own modules computed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.authors_eager import AuthorsEagerFFVT
from benchmarks.harness import require_close
from tests.benchmarks.conftest import TINY

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_fusion.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files if arrays[name].dtype.kind in "fi"}


def part(golden: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}


@pytest.fixture
def eager(golden: dict[str, torch.Tensor]) -> AuthorsEagerFFVT:
    model = AuthorsEagerFFVT(TINY)
    model.load_state_dict(part(golden, "w/"), strict=True)
    return model


def test_authors_form_reproduces_the_authors_logits_and_picks(
    golden: dict[str, torch.Tensor], eager: AuthorsEagerFFVT
) -> None:
    logits, index = eager.forward_with_index(golden["x"])
    assert torch.equal(index, golden["indices"])
    require_close("logits", logits, golden["logits"], 1e-5)


def test_authors_form_reproduces_every_gradient_of_the_authors_loss(
    golden: dict[str, torch.Tensor], eager: AuthorsEagerFFVT
) -> None:
    loss = F.cross_entropy(eager(golden["x"]), golden["labels"])
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=1e-5)
    gradients = {name: parameter.grad for name, parameter in eager.named_parameters()}
    expected = part(golden, "g/")
    assert gradients.keys() == expected.keys()
    largest = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():  # a key's bias has no gradient but rounding: compared to the largest of all
        assert (gradients[name] - value).abs().max().item() <= 1e-5 * max(value.abs().max().item(), 1e-2 * largest), (
            name
        )


def test_authors_form_keeps_a_full_map_per_block(golden: dict[str, torch.Tensor], eager: AuthorsEagerFFVT) -> None:
    _, maps, _ = eager.transformer(golden["x"])
    fused = 1 + (TINY.depth - 1) * TINY.num_select
    assert [tuple(m.shape) for m in maps] == [(2, 4, 17, 17)] * 3 + [(2, 4, fused, fused)]
    for probs in maps:
        torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:-1]))


@pytest.mark.parametrize("change", [{"feature_fusion": False}, {"layer_scale": 1e-5}, {"first_candidate": 1}])
def test_authors_form_refuses_what_the_authors_model_lacks(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="authors' fusion model"):
        AuthorsEagerFFVT(dataclasses.replace(TINY, **change))
