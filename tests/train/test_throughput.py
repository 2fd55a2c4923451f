"""Images per second of a run, and the rate of matrix products."""

import time

import pytest
import torch

from ffvt.train.throughput import Throughput, measure_matmul_flops

CPU = torch.device("cpu")


def test_images_are_counted_against_the_clock_and_forgotten(monkeypatch):
    clock = iter([10.0, 12.0, 12.0, 20.0, 24.0, 24.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    throughput = Throughput()  # at 10
    throughput.count(3)
    throughput.count(5)
    assert throughput.take() == 8 / 2  # at 12
    throughput.count(7)
    throughput.restart()  # at 20: what came before does not count
    throughput.count(6)
    assert throughput.take() == 6 / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_measuring_is_quick_on_every_type_and_leaves_random_numbers_alone(dtype):
    before, started = torch.get_rng_state(), time.perf_counter()
    assert 1e7 < measure_matmul_flops(CPU, dtype) < 1e15
    assert time.perf_counter() - started < 10  # one side of 1024 takes 2 s in fp16 on some CPUs
    assert torch.equal(before, torch.get_rng_state())
