"""How a decode step is captured; its bits are compared in tests/parity."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from exactmoe.bench.step import prepare
from exactmoe.model.decode import Decoder, collection_deferred
from exactmoe.model.weights import load_model


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    was, thresholds = gc.isenabled(), gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    (gc.enable if was else gc.disable)()


@pytest.mark.parametrize("was", [True, False])
def test_garbage_waits_and_the_collector_is_left_as_it_was(was: bool) -> None:
    (gc.enable if was else gc.disable)()
    with collection_deferred():
        assert not gc.isenabled()
    assert gc.isenabled() == was
    with pytest.raises(KeyError), collection_deferred():
        raise KeyError
    assert gc.isenabled() == was


def test_garbage_waits_until_a_step_is_captured(
    model_file: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: in place of the graph that must not be destroyed meanwhile is any object."""
    alive: list[bool] = []

    class Other:
        """A cycle, as a decoder with a graph may be part of one."""

        def __init__(self) -> None:
            self.itself = self

    def run(_decoder: Decoder, _most: int) -> None:
        other = weakref.ref(Other())
        gc.set_threshold(1, 1, 1)
        kept = [[] for _ in range(1000)]  # type: list[list[int]]
        alive.append(other() is not None)
        gc.set_threshold(0)
        assert len(kept) == 1000

    decoder = prepare(load_model(model_file, device), 3, 3).decoder
    monkeypatch.setattr(Decoder, "_run", run)
    for name in ("CUDAGraph", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, object)
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    gc.enable()
    decoder._capture(128)
    assert alive == [False, True]  # of the run beforehand, and of the one that is captured
