"""The benchmarks under pytest-benchmark:      pytest bench/      pytest bench/ --exactmoe-model big.gguf

The rows are those of `exactmoe bench`, and timed as there, by the clock of the device: the table's times are of a call,
a token, a prompt or a load. With --benchmark-json each has its whole row in `extra_info`, and "exactmoe" says on which
device, between which roofs, of which commit. Memory, which takes no time, is in the rows of a model, "gib"."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

import pytest
import torch

from exactmoe.bench.cases import benches
from exactmoe.bench.clock import Reading, Sampler, sample
from exactmoe.bench.plugin import RUN
from exactmoe.bench.run import Roofs, Row, Run, describe, measure
from exactmoe.bench.whole import ModelBench, refusal, wholes
from exactmoe.kernels.launch import resolve_device
from exactmoe.model.config import Config
from exactmoe.model.gguf.reader import open_gguf

Measure = Callable[[str, Sampler], Row]  # a row by its name
Describe = Callable[[list[Row]], Run]


class DeviceClock:
    """A timer for pytest-benchmark, which takes the difference of two readings."""

    __name__ = "device_clock"
    calls = 1  # between two readings

    def __call__(self) -> Reading:
        """The point that the device's queue has come to; waits for nothing."""
        return Reading(self.calls)


CLOCK = DeviceClock()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The rows of the model that was given, else the kernels."""
    timed = [name for name in wholes() if not name.startswith("memory")]
    metafunc.parametrize("name", timed if metafunc.config.getoption("exactmoe_model") else benches())


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> Iterator[Measure]:
    """Judges and times a row. Without a CUDA device there is nothing to time, and that is a failure."""
    device, rows = resolve_device("cuda"), []
    profile, path = (pytestconfig.getoption(f"exactmoe_{name}") for name in ("activations", "model"))
    row, described = _kernels(device, profile) if path is None else _model(path, device, profile)

    def kept(name: str, sampler: Sampler) -> Row:
        rows.append(row(name, sampler))
        return rows[-1]

    yield kept
    if rows:
        pytestconfig.stash[RUN] = described(rows)


def _kernels(device: torch.device, profile: str) -> tuple[Measure, Describe]:
    table, roofs = benches(profile), Roofs.of(device)
    return (
        lambda name, sampler: measure(table[name], device, roofs, sampler),
        lambda rows: describe(device, profile, roofs, rows),
    )


def _model(path: str, device: torch.device, profile: str) -> tuple[Measure, Describe]:
    file, table = open_gguf(path), wholes()
    refused = {name: refusal(row, file, Config.from_gguf(file), device) for name, row in table.items()}
    bench = ModelBench(file, device, profile)
    held = bench.row(table["memory-loaded"])

    def row(name: str, sampler: Sampler) -> Row:
        if error := refused[name]:
            raise error
        if not held.equal:
            return replace(held, name=name)
        timed = bench.row(table[name], sampler)
        return replace(timed, gib=bench.row(table["memory-most"]).gib)

    return row, bench.describe


@pytest.mark.benchmark(timer=CLOCK)
def test_bench(name: str, measured: Measure, benchmark) -> None:  # type: ignore[no-untyped-def]
    """Judge, then time."""

    def sampler(
        prepare: Callable[[], None], work: Callable[[], object], rounds: int, warmup: int = 0, calls: int = 1
    ) -> list[float]:
        CLOCK.calls = calls
        benchmark.pedantic(work, setup=prepare, rounds=rounds, warmup_rounds=warmup)
        if benchmark.stats is None:  # --benchmark-disable
            return sample(prepare, work, 1, calls=calls)
        return [1e6 * seconds for seconds in benchmark.stats.stats.data]

    row = measured(name, sampler)
    assert row.equal, "its bits are not those it is judged by, so it has no speed"
    benchmark.extra_info |= asdict(row)
