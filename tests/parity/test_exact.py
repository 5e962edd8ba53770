"""The float64 forward pass: against another implementation, in torch, and by its own properties."""

import ast
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from exactmoe.kernels.errors import InvalidInput
from exactmoe.model.config import Config
from exactmoe.model.gguf.reader import open_gguf
from exactmoe.model.synth import LIKES, Like, synthesise
from exactmoe.model.tiny.evaluate import network_from_gguf
from exactmoe.parity import exact
from exactmoe.parity.exact import dequantize, exact_forward

SMALL = Config(
    hidden=256,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=64,
    n_experts=6,
    n_active=2,
    expert_width=256,
    vocab=512,
    context_length=32,
    eps=np.float32(1e-6),
    rope_base=1e6,
)
TOKENS = [3, 511, 0, 77, 77, 140, 9, 254, 31, 8, 401]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LIKES, "small", Like("small", "6x1M", 512, SMALL))
        synthesise(path, "small", seed=5)
    return path


@pytest.fixture(scope="module")
def found(path):
    return exact_forward(open_gguf(path), TOKENS)


def test_logits_are_those_of_a_torch_network_on_the_weights_of_gguf(path, found):
    with torch.no_grad():
        logits = network_from_gguf(path)(torch.tensor([TOKENS]))[0][0].numpy().astype(np.float64)
    assert logits.shape == found.logits.shape == (len(TOKENS), 512)
    assert np.abs(found.logits).max() > 0.1
    assert np.abs(logits - found.logits).max() < 2e-5 * np.abs(found.logits).max()  # binary32 against binary64


def test_a_token_is_not_changed_by_those_after_it(path, found):
    part = exact_forward(open_gguf(path), TOKENS[:4])
    assert np.abs(part.logits - found.logits[:4]).max() < 1e-12 * np.abs(found.logits).max()
    assert (part.experts == found.experts[:, :4]).all()


def test_a_token_is_changed_by_those_before_it(path, found):
    other = exact_forward(open_gguf(path), [4, *TOKENS[1:]])
    assert (np.abs(other.logits - found.logits).max(axis=1) > 1e-6).all()


def test_experts_are_the_most_probable_ones_best_first(found):
    assert found.router.shape == (3, len(TOKENS), 6) and found.experts.shape == (3, len(TOKENS), 2)
    assert np.abs(found.router.sum(axis=-1) - 1).max() < 1e-14
    ranked = np.sort(found.router, axis=-1)[..., ::-1]
    assert (np.take_along_axis(found.router, found.experts, -1) == ranked[..., :2]).all()


def test_weights_are_exact(rng):
    """One block of each format by Python's fractions."""
    q4, q6 = rng.integers(0, 256, (1, 144), dtype=np.uint8), rng.integers(0, 256, (1, 210), dtype=np.uint8)
    q4[0, :4], q6[0, 208:] = np.float16([0.0123, 1.7e-6]).view(np.uint8), np.float16([-3.1e-5]).view(np.uint8)
    d, dmin = (Fraction(float(v)) for v in q4[0, :4].view(np.float16))
    found = dequantize(q4, "Q4_K")[0]
    for j in range(8):
        s = [int(b) for b in q4[0, 4:16]]
        scale = s[j] % 64 if j < 4 else s[j + 4] % 16 + s[j - 4] // 64 * 16
        minimum = s[j + 4] % 64 if j < 4 else s[j + 4] // 16 + s[j] // 64 * 16
        for i in range(32):
            code = int(q4[0, 16 + 32 * (j // 2) + i]) // 16 ** (j % 2) % 16
            assert Fraction(found[32 * j + i]) == d * scale * code - dmin * minimum
    d6, found = Fraction(float(q6[0, 208:].view(np.float16)[0])), dequantize(q6, "Q6_K")[0]
    for n in range(256):
        half, run, i = n // 128, n // 32 % 4, n % 32
        low = int(q6[0, 64 * half + 32 * (run % 2) + i]) // 16 ** (run // 2) % 16
        high = int(q6[0, 128 + 32 * half + i]) // 4**run % 4
        assert Fraction(found[n]) == d6 * int(q6[0, 192 + n // 16 : 193 + n // 16].view(np.int8)[0]) * (
            16 * high + low - 32
        )


def test_it_shares_no_code_with_the_reference():
    imported = [
        node.module
        for node in ast.walk(ast.parse(Path(exact.__file__).read_text()))
        if isinstance(node, ast.ImportFrom)
    ]
    assert imported and not [name for name in imported if name and "reference" in name]


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([], "no token to run"),
        ([0, 512], "is outside the vocabulary of 512"),
        ([-1], "is outside the vocabulary of 512"),
        ([0] * 33, "33 tokens exceed the context of 32"),
    ],
)
def test_tokens_it_cannot_run_are_refused(path, tokens, said):
    with pytest.raises(InvalidInput, match=said):
        exact_forward(open_gguf(path), tokens)
