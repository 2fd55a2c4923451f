"""The memory formulas against what autograd keeps and what a training step really takes."""

from dataclasses import asdict, replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import ffvt
from ffvt.data.transforms import PLAIN
from ffvt.kernels.backends import cpp_serves
from ffvt.model.config import make_config
from ffvt.model.ffvt import create_model
from ffvt.train.distributed import World
from ffvt.train.memory import SEED, saved_activations, training_memory
from ffvt.train.options import TrainOptions
from ffvt.train.state import TrainState
from ffvt.train.step import Preparation, training_step
from tests.helpers import MODEL_VARIANTS, batch_of, named, small_config

CPU = torch.device("cpu")

TRANSFG = {"head": "transfg"}
OBSERVED_VARIANTS = [
    {"criterion": "class_row"},
    {"criterion": "psm", "gradient_checkpointing": True},
    TRANSFG,
    TRANSFG | {"prune_dead_rows": False, "patch_stride": 12},
    TRANSFG | {"gradient_checkpointing": True},
    {"keep_rate": 0.6, "locations": (0, 1)},
    {"keep_rate": 0.6, "locations": (1,), "gradient_checkpointing": True},
    {"keep_rate": 0.6, "locations": (0, 2), "feature_fusion": False},
]


def bytes_kept_by_autograd(config, batch, precision):
    """Of the distinct memory that a forward hands to autograd, parameters left out."""
    model = create_model("vit_s16", **asdict(config)).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.nbytes():
            kept[storage.data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    autocast = torch.autocast("cpu", dtype, enabled=precision != "fp32")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        model(torch.randn(batch, 3, config.image_size, config.image_size))
    return sorted(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("changes", [*MODEL_VARIANTS, *OBSERVED_VARIANTS], ids=named)
def test_saved_activations_are_those_that_autograd_keeps_to_the_byte(changes, precision):
    config = small_config(**changes)
    kept = bytes_kept_by_autograd(config, 3, precision)
    assert sum(saved_activations(config, 3, precision).values()) == sum(kept)


def test_each_saved_tensor_is_one_that_autograd_keeps():
    config = small_config()
    sizes = []
    for name, size in saved_activations(config, 3).items():
        count = 2 if name.endswith("mean and deviation") else size // SEED if name == "dropout seeds" else 1
        sizes += [size // count] * count
    assert sorted(sizes) == bytes_kept_by_autograd(config, 3, "fp32")


def test_masks_of_pytorch_take_a_byte_on_cuda_and_an_element_on_a_cpu():
    config = small_config()
    with ffvt.use_backend("torch"):
        on_cpu, on_cuda = (saved_activations(config, 2, "bf16", device) for device in ("cpu", "cuda"))
    assert on_cpu["block 0 hidden mask"] == 2 * on_cuda["block 0 hidden mask"]
    assert {name for name in on_cpu if on_cpu[name] != on_cuda[name]} == {name for name in on_cpu if "mask" in name}


def test_masks_of_pytorch_are_counted_to_the_byte_too():
    config = small_config()
    with ffvt.use_backend("torch"):
        counted = saved_activations(config, 3)
        kept = bytes_kept_by_autograd(config, 3, "fp32")
    row_max = sum(size for name, size in counted.items() if name.endswith("row_max"))  # zeros here, of stride zero
    assert sum(counted.values()) - row_max <= sum(kept) <= sum(counted.values())
    assert any("mask" in name for name in counted)


def measured_peak(state, batch):
    """Bytes of tensors that one step holds at most: weights, what the optimiser keeps, the images, and all it makes."""
    size = state.options.img_size
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    labels = torch.zeros(batch, dtype=torch.int64)
    training_step(state, batch_of(images, labels), Preparation(PLAIN))  # makes the optimiser's state
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        training_step(state, batch_of(images, labels), Preparation(PLAIN))  # a new one: old memory would not show
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    models = [state.model] if state.ema is None else [state.model, state.ema.module]
    held = [parameter for model in models for parameter in model.parameters()]
    held += [value for values in state.optimizer.state.values() for value in values.values() if value.ndim]
    return peak + images.nbytes + sum(tensor.nbytes for tensor in held)


@pytest.mark.parametrize(
    ("batch", "changes", "error"),
    [
        (8, {}, 0.01),
        (4, {"precision": "bf16"}, 0.01),
        pytest.param(8, {"feature_fusion": False, "dropout": 0.0, "precision": "bf16"}, 0.01, marks=pytest.mark.slow),
        pytest.param(4, {"feature_fusion": False}, 0.01, marks=pytest.mark.slow),
        (2, {"optimizer": "adamw", "ema_decay": 0.9}, 0.01),
        pytest.param(1, {"optimizer": "adamw", "precision": "bf16"}, 0.01, marks=pytest.mark.slow),
        (8, {"gradient_checkpointing": True, "precision": "bf16"}, 0.015),
        pytest.param(8, {"gradient_checkpointing": True}, 0.015, marks=pytest.mark.slow),
        pytest.param(4, {"img_size": 384, "resize_size": 384, "depth": 4}, 0.01, marks=pytest.mark.slow),
        (4, TRANSFG, 0.01),
        (4, {**TRANSFG, "gradient_checkpointing": True, "precision": "bf16"}, 0.03),
        (4, {"criterion": "psm", "precision": "bf16"}, 0.01),
        (4, {"keep_rate": 0.5, "locations": (1, 3)}, 0.02),
        (1, {}, 0.04),  # the scratch of the patch embedding's backward, 5 MiB, shows
    ],
    ids=lambda value: named(value) if isinstance(value, dict) else str(value),
)
def test_memory_is_within_a_percent_or_so_of_what_a_step_holds(batch, changes, error):
    torch.use_deterministic_algorithms(False)  # the poison of fresh memory is no part of the step
    defaults = {"img_size": 224, "resize_size": 224, "depth": 6, "feature_fusion": True, "warmup_steps": 0}
    options = TrainOptions(model_type="vit_s16", **{**defaults, **changes})
    state = TrainState(options, World(0, 1, CPU), 10)
    ema = options.ema_decay > 0
    memory = training_memory(state.model.config, batch, options.optimizer, options.autocast_precision, ema)
    assert memory.total == pytest.approx(measured_peak(state, batch), rel=error)
    assert memory.weights == sum(parameter.nbytes for parameter in state.model.parameters())
    kept = [value for values in state.optimizer.state.values() for value in values.values() if value.ndim]
    assert memory.optimizer_state == sum(value.nbytes for value in kept)


@pytest.mark.parametrize(
    ("backend", "pruned", "fusion", "mebibytes"),
    [("cpp", True, True, 1076.4), ("torch", False, True, 1395.1), ("cpp", True, False, 1134.0)],
)
def test_memory_of_the_large_model_is_within_half_a_percent_of_the_benchmark(backend, pruned, fusion, mebibytes):
    """What a step adds to weights, momentum and images in benchmarks/results/model.jsonl: ours, composition, plain."""
    if backend == "cpp" and not cpp_serves():
        pytest.skip("the C++ kernels do not serve")
    config = make_config("vit_b16", prune_dead_rows=pruned, feature_fusion=fusion)
    with ffvt.use_backend(backend):
        memory = training_memory(config, 4, "sgd", "bf16")
    images = 4 * 3 * 448**2 * 5  # uint8 and fp32, which the benchmark holds before
    added = memory.gradients + memory.activations + memory.temporary - images
    assert added == pytest.approx(mebibytes * 2**20, rel=0.005)


def test_memory_grows_with_all_that_costs_some():
    config = make_config("vit_s16", image_size=224)
    base = training_memory(config, 8, precision="bf16").total
    more = [
        training_memory(config, 9, precision="bf16"),
        training_memory(config, 8, precision="bf16", optimizer="adamw"),
        training_memory(config, 8, precision="bf16", ema=True),
        training_memory(config, 8, precision="fp32"),
        training_memory(replace(config, image_size=240), 8, precision="bf16"),
        training_memory(replace(config, prune_dead_rows=False), 8, precision="bf16"),
    ]
    less = [
        training_memory(replace(config, gradient_checkpointing=True), 8, precision="bf16"),
    ]
    assert all(memory.total > base for memory in more)
    assert all(memory.total < base for memory in less)
    with_masks = training_memory(config, 8, precision="bf16", device="cuda")
    assert training_memory(replace(config, dropout=0.0), 8, precision="bf16", device="cuda").total < with_masks.total


@pytest.mark.parametrize(
    ("argument", "value"),
    [("batch_size", 0), ("batch_size", 1.5), ("optimizer", "lion"), ("precision", "int8"), ("device", "tpu")],
)
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=f"^plan: {argument} must be .*; got {argument}={value!r}"):
        training_memory(small_config(), **{"batch_size": 1, argument: value})


def test_the_hybrid_is_refused():
    with pytest.raises(NotImplementedError, match="backbone must be None.*got backbone='r50'"):
        training_memory(make_config("r50_vit_b16"), 1)
