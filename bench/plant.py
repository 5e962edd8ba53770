"""A slowdown put there on purpose, to see whether a comparison sees it: the device spins between calls.

planted(calls, share)    a graph of `calls` that takes `share` longer than without, and the share that was measured

A spin is a launch of its own and waits for what runs before it, so its length is found by timing the graph with it
against the graph without it, in turn. Where a spin after every call takes too long whatever its length, fewer are put
in."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch

from exactmoe.bench.clock import capture, replay_us, spin
from exactmoe.kernels.errors import InvalidInput

_REPLAYS = 21
_TRIES = 6
_NEAR = 0.1  # of the share wanted
_CYCLES_PER_US = 1500  # a first guess


def planted(calls: Sequence[Callable[[], object]], share: float) -> tuple[torch.cuda.CUDAGraph, float]:
    """A graph of `calls` slowed down by `share`. Raises InvalidInput where that little cannot be planted."""
    plain = capture(calls)
    us = statistics.median(replay_us(plain) for _ in range(_REPLAYS))
    every, best = 1, plain

    def measure(cycles: int) -> float:
        nonlocal best
        best = capture(spinning(calls, every, cycles))
        pairs = [(replay_us(plain), replay_us(best)) for _ in range(_REPLAYS)]
        return statistics.median(spun / before for before, spun in pairs) - 1

    while True:
        found = calibrate(share, measure, share * us * every / len(calls) * _CYCLES_PER_US)
        if found is not None:
            return best, found
        if every >= len(calls):
            raise InvalidInput(f"a delay of {100 * share:g}% of {us:.1f} us cannot be planted: a spin takes longer")
        every = min(2 * every, len(calls))


def spinning(calls: Sequence[Callable[[], object]], every: int, cycles: int) -> list[Callable[[], object]]:
    """`calls` with a spin behind each `every`-th of them, and behind the last."""
    work: list[Callable[[], object]] = []
    for i, call in enumerate(calls, 1):
        work.append(call)
        if i % every == 0 or i == len(calls):
            work.append(partial(spin, cycles))
    return work


def calibrate(share: float, measure: Callable[[int], float], guess: float) -> float | None:
    """Find cycles at which `measure` gives nearly `share`, and measure them last; None where no length does.

    What `measure` gives grows with the cycles; it need not begin at 0."""
    before, cycles = max(1, round(guess / 2)), max(2, round(2 * guess))
    last, found = measure(before), measure(cycles)
    for _ in range(_TRIES):
        if cycles == before or (found - last) / (cycles - before) <= 0:
            return None
        slope = (found - last) / (cycles - before)
        before, last, cycles = cycles, found, round(cycles + (share - found) / slope)
        if cycles < 1:
            return None
        found = measure(cycles)
        if abs(found - share) <= _NEAR * share:
            return found
    return None
