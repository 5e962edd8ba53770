"""batch-invariance-v1 on whole models: neither chunks nor neighbours nor the machine change a bit."""

from pathlib import Path

import numpy as np
import pytest

from exactmoe.model.cache import KVCache
from exactmoe.model.forward import forward, prefill
from exactmoe.model.gguf.reader import GGUFFile, open_gguf
from exactmoe.model.weights import Model, load_model
from exactmoe.parity.bits import compare, digest
from exactmoe.parity.sides import KV_ARRAYS, ReferenceSide, Side, TritonSide

SHIPPED = Path(__file__).resolve().parents[2] / "model" / "tiny" / "qwen3-moe-tiny.gguf"
TOKENS = [3, 500, 41, 41, 7]


@pytest.fixture(scope="module")
def models(model_file: Path) -> dict[str, Model]:
    from exactmoe.kernels.launch import resolve_device

    return {profile: load_model(model_file, resolve_device("auto"), profile) for profile in ("q8_k", "q16_k")}


def assert_equal(name: str, left: np.ndarray, right: np.ndarray) -> None:
    verdict = compare(name, left, right)
    assert verdict.equal, f"{name}: {verdict}"


@pytest.mark.parametrize(("profile", "chunk"), [("q8_k", 1), ("q16_k", 3)])
def test_a_prompt_in_chunks_or_token_by_token_has_the_bits_that_it_has_in_one_piece(
    models: dict[str, Model], profile: str, chunk: int
) -> None:
    model = models[profile]
    whole, cut = KVCache.allocate(model, len(TOKENS)), KVCache.allocate(model, len(TOKENS))
    logits = forward(model, whole, TOKENS, all_positions=True)
    found = prefill(model, cut, TOKENS, chunk=chunk, all_positions=True)
    assert_equal("logits", logits.cpu().numpy(), found.cpu().numpy())
    assert cut.length == whole.length == len(TOKENS)
    for name in KV_ARRAYS:
        assert_equal(name, getattr(whole, name).cpu().numpy(), getattr(cut, name).cpu().numpy())


def test_a_token_has_the_bits_that_it_has_beside_others(models: dict[str, Model]) -> None:
    model = models["q8_k"]
    one, other = (
        forward(model, KVCache.allocate(model, 3), [*TOKENS[:2], last], all_positions=True).cpu().numpy()
        for last in (TOKENS[2], 499)
    )
    assert_equal("the first two", one[:2], other[:2])
    assert not compare("the last", one[2], other[2]).equal, "the other token made no difference"
    alone = forward(model, KVCache.allocate(model, 1), TOKENS[:1], all_positions=True).cpu().numpy()
    assert_equal("the first alone", one[:1], alone)


def side(file: GGUFFile, backend: str, profile: str) -> Side:
    if backend == "reference":
        return ReferenceSide(file, profile)
    from exactmoe.kernels.launch import resolve_device

    return TritonSide(load_model(file, resolve_device("auto"), profile))


DIGESTS = {  # of the file in the repository, found by the reference on an x86-64 CPU
    "q8_k": "6128aeec82ed7ed53e82ecc97b1f363cf47e5cf102ae8e61facff87dce624e19",
    "q16_k": "6ebabdcbb44de10ceb2be0f68b7b67fc9758889d9dec0bb2da98909b79ea135e",
}


@pytest.mark.parametrize(("backend", "profile"), [("reference", "q8_k"), ("reference", "q16_k"), ("triton", "q8_k")])
def test_the_shipped_model_has_the_same_bits_on_every_machine(backend: str, profile: str) -> None:
    of = side(open_gguf(SHIPPED), backend, profile)
    cache = of.cache(3)
    logits = of.run(cache, [17, 300], 2, True)
    step = of.run(cache, [int(of.argmax(logits)[-1])], 1, True)
    parts = [("logits", logits), ("step", step)]
    parts += [(f"{name} {i}", of.kv(cache, name, i)) for i in range(4) for name in KV_ARRAYS]
    assert all(values.size > 0 for _, values in parts)
    assert digest(parts) == DIGESTS[profile]
