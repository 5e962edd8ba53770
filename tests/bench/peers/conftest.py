"""A stand-in for transformers, which is no dependency."""

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from exactmoe.bench.peers import hf_transformers


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a package of that name there, whose modelling has the classes that are given."""

    def put(**classes: Any) -> None:
        monkeypatch.setattr(hf_transformers, "version", lambda _: "5.0")
        names = ["transformers", "transformers.models", "transformers.models.qwen3_moe"]
        leaves = {
            f"{names[2]}.configuration_qwen3_moe": {"Qwen3MoeConfig": SimpleNamespace},
            f"{names[2]}.modeling_qwen3_moe": classes,
        }
        for name in (*names, *leaves):
            module = ModuleType(name)
            module.__path__ = []
            vars(module).update(leaves.get(name, {}))
            monkeypatch.setitem(sys.modules, name, module)

    return put
