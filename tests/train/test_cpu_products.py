"""The operands of bf16 products that a run keeps: over a resume, and among its ranks."""

import json

import pytest
import torch

from ffvt.kernels import backends
from ffvt.train.checkpoint import checkpoints
from ffvt.train.cpu_products import choose_products, keep_products, products_of
from ffvt.train.distributed import World
from ffvt.train.engine import train
from tests import faults
from tests.helpers import values

REASON = "; ".join(backends._missing("cpp"))
if not REASON and not backends.extension_info()["product_gflops"]["bf16"]:
    REASON = "this CPU or this build does not multiply bf16"
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)
ALONE = World(0, 1, torch.device("cpu"))
OTHER = {"bf16": "fp32", "fp32": "bf16"}


@pytest.fixture(autouse=True)
def _choice_given_back(monkeypatch):
    from ffvt.kernels import backend_cpp

    monkeypatch.delenv("FFVT_CPU_PRODUCTS", raising=False)
    yield
    monkeypatch.undo()
    backend_cpp.force_products("auto")


@pytest.mark.parametrize("operands", ["bf16", "fp32"])
def test_a_resumed_run_takes_the_operands_of_its_checkpoint_and_ends_with_the_same_bits(
    tmp_path, operands, monkeypatch
):
    from ffvt.kernels import backend_cpp

    settings = dict(precision="bf16", num_steps=4)
    with monkeypatch.context() as forced:
        forced.setenv("FFVT_CPU_PRODUCTS", operands)
        backend_cpp.force_products(operands)
        whole = train(faults.options(tmp_path, "whole", **settings))
        train(faults.options(tmp_path, "parts", precision="bf16", num_steps=2))
    state = json.loads((checkpoints(tmp_path / "parts")[-1] / "state.json").read_text())
    assert state["cpu_products"] == operands
    backends.set_cpu_products(OTHER[operands])
    resumed = train(faults.options(tmp_path, "parts", **settings))
    assert backends.cpu_products() == operands
    assert values(resumed.folder) == values(whole.folder)


def test_operands_that_cannot_be_taken_are_named(monkeypatch, caplog):
    own = backends.cpu_products()
    monkeypatch.setenv("FFVT_CPU_PRODUCTS", own)
    keep_products(OTHER[own], "bf16", ALONE)
    assert backends.cpu_products() == own
    assert f"multiplied with {OTHER[own]} operands before and is now with {own} (FFVT_CPU_PRODUCTS" in caplog.text


def test_an_empty_variable_forces_nothing(monkeypatch):
    own = backends.cpu_products()
    monkeypatch.setenv("FFVT_CPU_PRODUCTS", "")
    keep_products(OTHER[own], "bf16", ALONE)
    assert backends.cpu_products() == OTHER[own]


def test_runs_without_such_products_and_old_checkpoints_say_nothing(caplog):
    own = backends.cpu_products()
    keep_products(OTHER[own], "fp32", ALONE)
    keep_products(None, "bf16", ALONE)
    assert backends.cpu_products() == own
    assert products_of("fp32", ALONE) is None
    assert caplog.text == ""


def test_all_ranks_take_the_operands_of_the_main_one(monkeypatch):
    own = backends.cpu_products()
    world = World(1, 2, torch.device("cpu"))
    monkeypatch.setattr(World, "gather", lambda self, value: [OTHER[own], value])
    choose_products("bf16", world)
    assert backends.cpu_products() == OTHER[own]


def test_a_new_run_does_not_take_what_an_earlier_one_in_the_process_took():
    own = backends.cpu_products()
    keep_products(OTHER[own], "bf16", ALONE)
    assert backends.cpu_products() == OTHER[own]
    choose_products("bf16", ALONE)
    assert backends.cpu_products() == own


def test_kernels_that_are_gone_are_named(monkeypatch, caplog):
    monkeypatch.setattr("ffvt.train.cpu_products.cpu_products", lambda: None)
    keep_products("bf16", "bf16", ALONE)
    assert "the C++ kernels served before and do not now" in caplog.text
