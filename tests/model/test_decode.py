"""How a decode step is captured; its bits are compared in tests/parity."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


class Operators(TorchDispatchMode):
    """Names of torch's operators that are called meanwhile; kernels of this package are none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_between_replays_there_is_no_kernel_that_may_not_overlap(
    model_file: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the replays that follow are slower on an H100: torch's operators launch such kernels."""
    sequence = prepare(load_model(model_file, device), 3, 4)
    decoder, cache = sequence.decoder, sequence.cache
    done: list[object] = []

    class Graph:
        def replay(self) -> None:
            done.append("replay")

    def placed(*args: object) -> None:
        assert args[:2] == (decoder.token, decoder._position)
        done.append(args[2:])

    decoder._graphs = {most: (Graph(), decoder.logits) for most in range(cache.capacity + 1)}  # type: ignore[misc]
    monkeypatch.setattr("exactmoe.model.decode.place", placed)
    token = torch.tensor([5], dtype=torch.int32, device=device)
    with Operators() as operators:
        decoder.step(token)
        decoder.step()
        decoder.step(token)
        cache.length = 2
        decoder.step()
        assert set(operators.names) <= {"aten.select.int"}  # a view of a layer's cache
        decoder.token.fill_(9)
    assert "aten.fill_.Scalar" in operators.names
    assert done == [(3, token), "replay", "replay", (5, token), "replay", (2, None), "replay"]


def test_a_captured_step_begins_where_it_was_before_the_capture(
    model_file: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: the run beforehand chooses a token and moves on, and the first replay must not see that."""
    sequence = prepare(load_model(model_file, device), 3, 3)
    decoder, cache = sequence.decoder, sequence.cache
    ran: list[tuple[float, float]] = []

    def run(self: Decoder, _most: int) -> None:
        ran.append((self.token.item(), self._position.item()))
        if len(ran) == 1:  # what is captured is not run
            self.token.fill_(99)
            self._position += 1

    class Graph:
        def replay(self) -> None:
            ran.append((decoder.token.item(), decoder._position.item()))

    monkeypatch.setattr(Decoder, "_run", run)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "synchronize", object)
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    monkeypatch.setattr(decoder, "_model", replace(decoder._model, device=torch.device("cuda")))
    decoder.token.fill_(7)
    decoder._position.fill_(2)
    decoder._at = cache.length = 2
    decoder.step()
    assert ran == [(7, 2), (7, 3), (7, 2)]  # beforehand, when captured, and when replayed
