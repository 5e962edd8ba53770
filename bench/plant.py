"""A slowdown put there on purpose, to see whether a comparison sees it: the device spins between calls.

spins(calls, share)      where to spin, and how long, for `calls` to take `share` longer
planted(calls, spins)    a graph of `calls` with those spins, and the share that it is measured to take longer

A spin is a launch of its own and waits for what runs before it, so its length is found by timing the graph with it
against the graph without it, in turn. Where a spin after every call takes too long whatever its length, fewer are put
in."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from exactmoe.bench.clock import capture, replay_us, spin
from exactmoe.kernels.errors import InvalidInput

_REPLAYS = 9
_TRIES = 6
_NEAR = 0.1  # of the share wanted
_CYCLES_PER_US = 1500  # a first guess


class Spins(NamedTuple):
    """One spin of so many `cycles` behind each `every`-th call."""

    every: int
    cycles: int


def spins(calls: Sequence[Callable[[], object]], share: float) -> Spins:
    """Those that slow `calls` down by `share`. Raises InvalidInput where that little cannot be planted."""
    plain = capture(calls)
    us = statistics.median(replay_us(plain) for _ in range(_REPLAYS))
    every = 1
    while True:

        def measure(cycles: int, every: int = every) -> float:
            return _slower(plain, capture(spinning(calls, Spins(every, cycles))))

        found = calibrate(share, measure, share * us * every / len(calls) * _CYCLES_PER_US)
        if found is not None:
            return Spins(every, found)
        if every >= len(calls):
            raise InvalidInput(f"a delay of {100 * share:g}% of {us:.1f} us cannot be planted: a spin takes longer")
        every = min(2 * every, len(calls))


def planted(calls: Sequence[Callable[[], object]], where: Spins) -> tuple[torch.cuda.CUDAGraph, float]:
    """A graph of `calls` with spins, and by which share it is slower than one without."""
    graph = capture(spinning(calls, where))
    return graph, _slower(capture(calls), graph)


def _slower(plain: torch.cuda.CUDAGraph, spun: torch.cuda.CUDAGraph) -> float:
    pairs = [(replay_us(plain), replay_us(spun)) for _ in range(_REPLAYS)]
    return statistics.median(after / before for before, after in pairs) - 1


def spinning(calls: Sequence[Callable[[], object]], where: Spins) -> list[Callable[[], object]]:
    """`calls` with their spins, one behind the last in any case."""
    work: list[Callable[[], object]] = []
    for i, call in enumerate(calls, 1):
        work.append(call)
        if i % where.every == 0 or i == len(calls):
            work.append(partial(spin, where.cycles))
    return work


def calibrate(share: float, measure: Callable[[int], float], guess: float) -> int | None:
    """Cycles at which `measure` gives nearly `share`; None where no length does.

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
            return cycles
    return None
