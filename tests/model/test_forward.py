"""The forward pass as a library: what it refuses, and that no way of calling it changes a bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exactmoe.kernels.errors import InvalidInput
from exactmoe.model.cache import KVCache
from exactmoe.model.forward import forward, prefill
from exactmoe.model.stages import STAGES, keys
from exactmoe.model.traced import forward_traced
from exactmoe.model.weights import Model, load_model
from exactmoe.parity.bits import compare

TOKENS = [3, 500, 41, 41, 7]


@pytest.fixture(scope="module")
def model(model_file: Path) -> Model:
    from exactmoe.kernels.launch import resolve_device

    return load_model(model_file, resolve_device("auto"))


def assert_equal(name: str, left: torch.Tensor, right: torch.Tensor) -> None:
    verdict = compare(name, left.cpu().numpy(), right.cpu().numpy())
    assert verdict.equal, f"{name}: {verdict}"


def test_the_last_row_of_all_positions_is_what_one_position_gives(model: Model) -> None:
    every = forward(model, KVCache.allocate(model, 8), TOKENS, all_positions=True)
    assert every.shape == (len(TOKENS), model.config.vocab)
    assert_equal("last", every[-1], forward(model, KVCache.allocate(model, 8), TOKENS))


def test_tokens_from_the_device_and_from_a_list_give_the_same_bits_in_chunks_too(model: Model) -> None:
    whole, chunked = KVCache.allocate(model, 8), KVCache.allocate(model, 8)
    ids = torch.tensor(TOKENS, dtype=torch.int32, device=model.device)
    expected = forward(model, whole, ids)
    assert_equal("logits", expected, prefill(model, chunked, TOKENS, chunk=2))
    assert whole.length == chunked.length == len(TOKENS)
    for name in ("k", "k_scale", "v", "v_scale"):
        left, right = getattr(whole, name), getattr(chunked, name)
        assert_equal(name, left[:, : len(TOKENS)], right[:, : len(TOKENS)])


@pytest.mark.parametrize("tokens", [128, 131, 260])
def test_single_steps_across_tiles_of_keys_give_the_bits_of_one_piece(model: Model, tokens: int) -> None:
    model = replace(model, config=replace(model.config, context_length=512))
    ids = [(7 * i) % 500 for i in range(tokens)]
    whole, stepped = KVCache.allocate(model, 300), KVCache.allocate(model, 300)
    expected = forward(model, whole, ids)
    prefill(model, stepped, ids[:-3])
    for token in ids[-3:]:
        found = forward(model, stepped, [token])
    assert_equal("logits", expected, found)
    for name in ("k", "k_scale", "v", "v_scale"):
        assert_equal(name, getattr(whole, name)[:, :tokens], getattr(stepped, name)[:, :tokens])


def test_the_traced_pass_emits_every_stage_once_and_changes_no_bit(model: Model) -> None:
    traced = forward_traced(model, KVCache.allocate(model, 8), TOKENS)
    assert list(traced.stages) == keys(model.config.n_layers)
    assert len(traced.stages) == sum(model.config.n_layers if s.per_layer else 1 for s in STAGES)
    assert_equal("logits", traced.logits, forward(model, KVCache.allocate(model, 8), TOKENS, all_positions=True))


def test_what_cannot_run_is_refused_and_leaves_the_cache_as_it_was(model: Model) -> None:
    cache = KVCache.allocate(model, 4)
    with pytest.raises(InvalidInput, match="no token to run"):
        forward(model, cache, [])
    with pytest.raises(InvalidInput, match="token id 512 is outside the vocabulary of 512"):
        forward(model, cache, [1, 512])
    with pytest.raises(InvalidInput, match="token id -1 is outside"):
        prefill(model, cache, [-1])
    with pytest.raises(InvalidInput, match="5 tokens do not fit the cache: 4 of 4 positions left"):
        prefill(model, cache, TOKENS, chunk=2)
    with pytest.raises(InvalidInput, match="chunk must be positive, got 0"):
        prefill(model, cache, [1], chunk=0)
    with pytest.raises(InvalidInput, match=r"tokens must be i32 \[T\], got torch\.int64"):
        forward(model, cache, torch.tensor([1]))
    with pytest.raises(InvalidInput, match="cache capacity must be 1 to 64, got 65"):
        KVCache.allocate(model, 65)
    assert cache.length == 0


def test_an_unknown_activation_profile_is_refused_before_the_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="activation profile must be one of q8_k, q16_k, got 'int4'"):
        load_model(tmp_path / "absent.gguf", torch.device("cpu"), "int4")
