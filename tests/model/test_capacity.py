"""What a model needs of a device is said, and what does not fit is refused, before anything is loaded."""

from pathlib import Path

import pytest
import torch

from exactmoe.kernels.errors import MissingEnvironment
from exactmoe.model import weights
from exactmoe.model.capacity import WORKSPACE, Capacity, needed, require_capacity
from exactmoe.model.config import Config
from exactmoe.model.gguf.reader import open_gguf
from exactmoe.model.weights import load_model

CUDA = torch.device("cuda", 0)


def test_a_model_needs_its_file_its_planes_and_a_cache_that_grows_with_the_positions(model_file: Path) -> None:
    file = open_gguf(model_file)
    config = Config.from_gguf(file)
    none, some = needed(file, config), needed(file, config, 10)
    assert none.file == sum(info.nbytes for info in file.tensors.values())
    assert 0 < none.planes < none.file
    # Two layers of one kv head: keys and values of 128 in i16 with a scale each; 64 cosines and 64 sines.
    assert (none.cache, some.cache) == (0, 10 * (2 * 2 * (2 * 128 + 4) + 4 * 128))
    assert some.total == none.file + none.planes + none.routers + some.cache + WORKSPACE


@pytest.mark.parametrize(("free", "fits"), [(100, True), (99, False)])
def test_what_exceeds_the_free_memory_is_refused_with_the_arithmetic(
    monkeypatch: pytest.MonkeyPatch, free: int, fits: bool
) -> None:
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * gib, 120 * gib))
    wanted = Capacity(80 * gib, 15 * gib, 0, 5 * gib, 0)
    if fits:
        require_capacity(wanted, CUDA, "big.gguf")
        return
    said = r"big\.gguf needs 100\.00 GiB \(file 80\.00, planes 15\.00, cache 5\.00\); .* 99\.00 of 120\.00 GiB free"
    with pytest.raises(MissingEnvironment, match=said):
        require_capacity(wanted, CUDA, "big.gguf")


def test_a_model_that_does_not_fit_is_refused_before_a_byte_is_read(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(weights, "from_file", read)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**20, 2**40))
    with pytest.raises(MissingEnvironment, match="with 7 positions needs"):
        load_model(model_file, CUDA, "q8_k", 7)


def test_loading_tells_how_many_bytes_are_there_up_to_all(model_file: Path, device: torch.device) -> None:
    told: list[tuple[int, int]] = []
    load_model(model_file, device, progress=lambda done, total: told.append((done, total)))
    done = [d for d, _ in told]
    assert done == sorted(set(done))
    assert told[-1][0] == told[-1][1] == sum(info.nbytes for info in open_gguf(model_file).tensors.values())
