"""What a decode step launches and a model holds, counted; speed and memory at the dims of 30B-A3B, measured."""

import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from exactmoe.kernels.launch import resolve_device
from exactmoe.model.cache import KVCache
from exactmoe.model.config import expected_tensors
from exactmoe.model.forward import decoder_of, forward, prefill
from exactmoe.model.gguf.reader import open_gguf
from exactmoe.model.gguf.writer import tensor_bytes
from exactmoe.model.synth import LIKES, q4_k_m, synthesise
from exactmoe.model.weights import Model, load_model
from exactmoe.parity.neutrality import Launch, recorded

LIKE = "qwen3-coder-30b-a3b"
CONTEXT = 4096
GIB = 2**30
STEPS, REPEATS = 128, 5


def held(thing: Any) -> int:
    """Bytes of all the memory that tensors anywhere in `thing` lie in, each piece counted once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in _tensors(thing))}.values())


def _tensors(thing: Any) -> Iterator[torch.Tensor]:
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, tuple):
        for part in thing:
            yield from _tensors(part)
    elif is_dataclass(thing):
        for field in fields(thing):
            yield from _tensors(getattr(thing, field.name))


def by_rule(sizes: dict[str, int], n_layers: int, n_experts: int) -> int:
    """Bytes of a model on its device: the file's, the planes of its Q6_K matrices, and a scale for each router row."""
    return sum(sizes.values()) + sizes["Q6_K"] + 4 * n_layers * n_experts


@pytest.fixture(scope="module")
def small(model_file: Path) -> Model:
    return load_model(model_file, resolve_device("auto"))


def test_a_model_holds_the_bytes_of_its_file_and_the_planes_of_its_q6_k_matrices(
    small: Model, model_file: Path
) -> None:
    sizes = dict.fromkeys(("F32", "Q4_K", "Q6_K"), 0)
    for info in open_gguf(model_file).tensors.values():
        sizes[info.type_name] += info.nbytes
    assert min(sizes.values()) > 0
    assert held(small) == by_rule(sizes, small.config.n_layers, small.config.n_experts)


def test_by_the_same_rule_30b_a3b_and_4096_positions_leave_half_a_gib_of_22_8() -> None:
    config = LIKES[LIKE].config
    sizes = dict.fromkeys(("F32", "Q4_K", "Q6_K"), 0)
    for want in expected_tensors(config):
        type_name = q4_k_m(want.name, config.n_layers)
        sizes[type_name] += tensor_bytes(want.name, want.shape, type_name)
    position = config.n_layers * config.n_kv_heads * 2 * (2 * config.head_dim + 4) + 4 * config.head_dim
    total = by_rule(sizes, config.n_layers, config.n_experts) + (CONTEXT + STEPS) * position
    assert 20 * GIB < total < 22.3 * GIB


def test_a_cache_holds_what_the_rule_says_of_a_position(small: Model) -> None:
    c = small.config
    cache = KVCache.allocate(small, 7)
    assert held(cache) == 7 * (c.n_layers * c.n_kv_heads * 2 * (2 * c.head_dim + 4) + 4 * c.head_dim)


@pytest.mark.parametrize(("most", "a_layer"), [(128, 6), (200, 8)])
def test_a_decode_step_launches_six_kernels_a_layer_and_eight_beyond_one_tile_of_keys(
    small: Model, most: int, a_layer: int
) -> None:
    longer = replace(small, config=replace(small.config, context_length=256))
    decoder = decoder_of(longer, KVCache.allocate(longer, 200))
    launches: list[Launch] = []
    with recorded(launches):
        decoder._run(most)  # what a GPU replays as a graph, in which single launches cannot be seen
    kernels = [launch.kernel for launch in launches]
    outside = len(kernels) - a_layer * small.config.n_layers
    assert kernels, "nothing was launched"
    assert 0 < outside <= 4, kernels


class Measured(NamedTuple):
    """One load of the model on the device."""

    load_seconds: float
    empty: float  # tokens a second
    full: float  # tokens a second after CONTEXT tokens
    gib: float  # in use on the device, the driver's context among it


def rate(model: Model, cache: KVCache, at: int) -> float:
    """Decode steps a second from position `at` on, the median of some runs."""
    decoder = decoder_of(model, cache)
    seconds = []
    for _ in range(REPEATS):
        cache.length = at
        decoder.step()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(STEPS):
            decoder.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return STEPS / statistics.median(seconds)


def measure(path: Path, profile: str) -> Measured:
    gc.collect()
    torch.cuda.empty_cache()
    started = time.perf_counter()
    model = load_model(path, resolve_device("cuda"), profile)
    torch.cuda.synchronize()
    loaded = time.perf_counter() - started
    cache = KVCache.allocate(model, CONTEXT + STEPS + 1)
    forward(model, cache, [1])
    empty = rate(model, cache, 1)
    cache.length = 0
    prefill(model, cache, [(37 * i + 11) % model.config.vocab for i in range(CONTEXT)])
    full = rate(model, cache, CONTEXT)
    free, total = torch.cuda.mem_get_info()
    return Measured(loaded, empty, full, (total - free) / GIB)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Measured]]:
    path = tmp_path_factory.mktemp("large") / "30b-a3b.gguf"
    try:
        synthesise(path, LIKE)
        yield {profile: measure(path, profile) for profile in ("q8_k", "q16_k")}
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.gpu
@pytest.mark.h100
def test_q8_k_decodes_700_tokens_a_second_at_empty_context(measured: dict[str, Measured]) -> None:
    assert measured["q8_k"].empty >= 700, measured


@pytest.mark.gpu
@pytest.mark.h100
def test_q8_k_decodes_600_tokens_a_second_after_4096(measured: dict[str, Measured]) -> None:
    assert measured["q8_k"].full >= 600, measured


@pytest.mark.gpu
@pytest.mark.h100
def test_q16_k_decodes_at_four_fifths_of_q8_k_or_faster(measured: dict[str, Measured]) -> None:
    q8, q16 = measured["q8_k"], measured["q16_k"]
    assert min(q16.empty / q8.empty, q16.full / q8.full) >= 0.8, measured


@pytest.mark.gpu
@pytest.mark.h100
def test_the_model_and_4096_positions_take_less_than_22_8_gib(measured: dict[str, Measured]) -> None:
    assert max(m.gib for m in measured.values()) < 22.8, measured


@pytest.mark.gpu
@pytest.mark.h100
def test_the_model_loads_in_less_than_30_seconds(measured: dict[str, Measured]) -> None:
    assert max(m.load_seconds for m in measured.values()) < 30, measured
