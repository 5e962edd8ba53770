"""What `pytest bench/` takes, and what it says of the run in the JSON of pytest-benchmark; for conftest.py there."""

from typing import Any

import pytest

from exactmoe.bench.run import Run
from exactmoe.kernels.tensors import PROFILES

RUN = pytest.StashKey[Run]()
"""Of a session's config: its rows, and under which circumstances they were timed."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """--exactmoe-model and --exactmoe-activations."""
    group = parser.getgroup("exactmoe")
    group.addoption(
        "--exactmoe-model",
        metavar="GGUF",
        help="benchmark this model instead of kernels: decode steps, prompts, loading and memory",
    )
    group.addoption(
        "--exactmoe-activations",
        choices=PROFILES,
        default="q8_k",
        help="how activations are quantised in benchmarks (default: %(default)s)",
    )


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Beside the benchmarks, whose extra_info is a row each: the device, roofs, versions and clocks of all."""
    if RUN in config.stash:
        found = config.stash[RUN].to_dict()
        output_json["exactmoe"] = {key: value for key, value in found.items() if key not in ("rows", "peers")}
