"""Every test starts from one seed, with unwritten memory poisoned."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # torch.empty then fills with NaN, so an unwritten output shows
    yield
    torch.use_deterministic_algorithms(False)
