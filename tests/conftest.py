"""Every test starts from one seed, with unwritten memory poisoned.

A test that takes `backend` runs once per backend. Without a GPU the Triton kernels run in Triton's interpreter, on CPU
tensors; with one they run there, as `-m gpu`.
"""

import os

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS

ON_CPU = ("cpp", "torch", "reference", *(() if torch.cuda.is_available() else ("triton",)))
ON_GPU = ("triton", "torch") if torch.cuda.is_available() else ()


@pytest.fixture(
    params=[
        *(pytest.param((name, "cpu"), id=name) for name in ON_CPU),
        *(pytest.param((name, "cuda"), id=f"{name}-cuda", marks=pytest.mark.gpu) for name in ON_GPU),
    ]
)
def backend(request):
    """The name of a backend; tensors are made on a device that it serves."""
    name, device = request.param
    with torch.device(device):
        yield name


def pytest_collection_modifyitems(items):
    """Slow in Triton's interpreter: large shapes, where the smaller ones take the same path; packed gradients, where
    separate ones do; what is compiled, which is the same graph whatever backend serves its operators; criteria in fp16,
    which are formulas over what the kernels give."""
    for item in items:
        names = set(item.callspec.id.split("-") if hasattr(item, "callspec") else ())
        compiled = bool(names) and "dynamic" in item.callspec.params
        criterion = item.path.name == "test_criteria.py" and "torch.float16" in names
        if "triton" in names and (names & {"real", "prime", "packed"} or compiled or criterion):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # torch.empty then fills with NaN, so an unwritten output shows
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def photographs(tmp_path):
    """An ImageFolder of 3 classes: train 5 each, test 2 of two classes only, one file no picture."""
    draw = np.random.default_rng(0)
    for split, classes, count in (("train", "abc", 5), ("test", "ac", 2)):
        for label, name in enumerate(classes):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (40, 60 + 10 * label, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "photos" / "train" / "a" / "notes.txt").write_text("not a picture")
    return tmp_path / "photos"


@pytest.fixture
def one_thread():
    """The number of threads decides the order of sums, and so the rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
