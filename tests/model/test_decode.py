"""How a decode step is captured; its bits are compared in tests/parity."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from exactmoe.bench.step import FIRST, prepare
from exactmoe.model.decode import collection_deferred
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


@pytest.mark.gpu
def test_a_graph_that_is_garbage_does_not_end_the_capture_of_another(model_file: Path, device: torch.device) -> None:
    model = load_model(model_file, device)
    first = prepare(model, 3, 3)
    first.decoder.token.fill_(FIRST)
    first.decoder.step()
    token = int(first.decoder.token)
    first.decoder.itself = first.decoder  # type: ignore[attr-defined]
    gc.disable()
    del first
    second = prepare(model, 3, 3)
    second.decoder.token.fill_(FIRST)
    gc.enable()
    gc.set_threshold(1, 1, 1)
    second.decoder.step()
    assert int(second.decoder.token) == token
