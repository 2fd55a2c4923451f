"""What timing on a GPU adds: replay from a CUDA graph, and a cold L2 cache.

"eager": launched from Python; "graph": replayed from a CUDA graph. "hot": the same inputs again and again; "cold": the
L2 cache is overwritten before each call. A CPU has the first form alone, "eager" and "hot".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.harness import NOT_SERVED, Case, Timing, describe_error, measure

BUSY_CYCLES = 200_000  # of the device's clock, about 100 us
FLOOD_BYTES = 2**28  # several times any L2

Setup = Callable[[], Callable[[], object]]


class Form(NamedTuple):
    """How a call reaches the device, and what its L2 cache holds."""

    launch: str
    l2: str


EAGER, GRAPH, COLD_GRAPH = Form("eager", "hot"), Form("graph", "hot"), Form("graph", "cold")
FORMS = {"cpu": (EAGER,), "cuda": (EAGER, GRAPH, COLD_GRAPH)}


@dataclass(frozen=True)
class Replay:
    """A captured graph with the function that it was captured from, whose tensors the graph reads."""

    graph: torch.cuda.CUDAGraph
    function: Callable[[], object]

    def __call__(self) -> None:
        self.graph.replay()


def capture(setup: Setup) -> Replay:
    """A CUDA graph of the function that `setup` makes.

    The set-up runs on the captured stream: a backward runs on the stream of its forward, and autograd ties a leaf to
    the stream on which it was first used.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function = setup()
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return Replay(graph, function)


def prepare(
    setups: Mapping[str, Setup], form: Form, refusals: tuple[type[Exception], ...] = NOT_SERVED
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """The functions to time in one form; for each that cannot be made, why.

    Args:
        setups: by name; each builds its state and returns the function to measure.
        form: one of `FORMS`.
        refusals: errors that say that a function cannot be made; others pass through.
    """
    functions, refused = {}, {}
    for name, setup in setups.items():
        try:
            functions[name] = capture(setup) if form.launch == "graph" else setup()
        except refusals as error:
            refused[name] = describe_error(error)
    return functions, refused


def measure_form(
    functions: Mapping[str, Callable[[], object]], form: Form, device: str, rounds: int, warmup: int, calls: int
) -> dict[str, Timing]:
    """Interleaved times of functions from `prepare`; with a hot cache `calls` calls make one sample.

    Hot graphs are launched behind work that keeps the device busy, so that they are timed without their launch.
    """
    cases = [Case(name, lambda function=function: function) for name, function in functions.items()]
    if form.l2 == "cold":
        flood = torch.empty(FLOOD_BYTES, dtype=torch.int8, device=device)
        return measure(cases, rounds, warmup, device, before=flood.zero_)
    before = partial(torch.cuda._sleep, BUSY_CYCLES) if form.launch == "graph" else None
    return measure(cases, rounds, warmup, device, calls=calls, before=before)
