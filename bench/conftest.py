"""The hooks of `pytest bench/`. pytest knows this file by another name than its neighbours do, so it holds nothing."""

from exactmoe.bench.plugin import pytest_addoption, pytest_benchmark_update_json

__all__ = ["pytest_addoption", "pytest_benchmark_update_json"]
