"""Q4_K and Q6_K decoders: against gguf-py, which did not come from here, and field by field."""

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from exactmoe.parity import exact
from exactmoe.parity.reference.embedding import embed
from exactmoe.parity.reference.q4_k import decode_q4_k
from exactmoe.parity.reference.q6_k import decode_q6_k
from exactmoe.parity.reference.weights import BLOCK_BYTES, QuantMatrix

FACTORS = {"Q4_K": (0, 4), "Q6_K": (208, 210)}  # bytes of d (and dmin)


def random_rows(rng, n, blocks, type_name):
    """Every bit of scales and codes random; factors any finite f16, subnormals and both signs included."""
    raw = rng.integers(0, 256, (n, blocks, BLOCK_BYTES[type_name]), dtype=np.uint8)
    first, last = FACTORS[type_name]
    factors = rng.integers(0, 0x7C00, (n, blocks, (last - first) // 2)) | rng.integers(0, 2, (n, blocks, 1)) << 15
    raw[..., first:last] = factors.astype(np.uint16).view(np.uint8)
    return raw.reshape(n, -1)


@pytest.mark.parametrize("type_name", BLOCK_BYTES)
def test_embedding_rows_equal_the_dequantiser_of_gguf_bit_for_bit(type_name, rng, same):
    rows = random_rows(rng, 200, 3, type_name)
    found = embed(QuantMatrix(rows, type_name), np.arange(200, dtype=np.int32))
    same(found, dequantize(rows, gguf.GGMLQuantizationType[type_name]))


@pytest.mark.parametrize("type_name", BLOCK_BYTES)
def test_float64_weights_round_to_those_of_gguf_but_for_the_last_bits(type_name, rng):
    rows = random_rows(rng, 200, 3, type_name)
    ours, theirs = exact.dequantize(rows, type_name), dequantize(rows, gguf.GGMLQuantizationType[type_name])
    terms = np.abs(ours)
    if type_name == "Q4_K":  # a difference of two products: its rounding is relative to them, not to the result
        b = decode_q4_k(rows.reshape(200, 3, 144))
        terms = np.abs(b.d.astype(float))[..., None, None] * b.scale[..., None] * b.code
        terms = (terms + (np.abs(b.dmin.astype(float))[..., None] * b.minimum)[..., None]).reshape(200, 768)
    assert (np.abs(ours - theirs) <= terms * 2.0**-23).all()
    assert np.abs(ours).max() > 0


@pytest.mark.parametrize("type_name", BLOCK_BYTES)
def test_integers_times_factors_are_the_float64_weights(type_name, rng, same):
    rows = random_rows(rng, 50, 2, type_name)
    blocks = rows.reshape(50, 2, -1)
    if type_name == "Q4_K":
        b = decode_q4_k(blocks)
        w = b.d.astype(np.float64)[..., None, None] * b.scale[..., None] * b.code
        w = w - (b.dmin.astype(np.float64)[..., None] * b.minimum)[..., None]
    else:
        c = decode_q6_k(blocks)
        w = c.d.astype(np.float64)[..., None, None] * c.scale[..., None] * c.code
    same(w.reshape(50, 512), exact.dequantize(rows, type_name))


def test_fields_of_q4_k_have_their_ranges(rng):
    b = decode_q4_k(random_rows(rng, 2000, 1, "Q4_K"))
    for field, top in ((b.scale, 63), (b.minimum, 63), (b.code, 15)):
        assert (field.min(), field.max()) == (0, top)


def test_fields_of_q6_k_have_their_ranges(rng):
    c = decode_q6_k(random_rows(rng, 2000, 1, "Q6_K"))
    assert (c.scale.min(), c.scale.max(), c.code.min(), c.code.max()) == (-128, 127, -32, 31)


@pytest.mark.parametrize(
    ("weight", "byte", "value"),
    [(0, 0, 0x09), (31, 31, 0x09), (32, 0, 0x90), (63, 31, 0x90), (64, 32, 0x09), (95, 63, 0x09), (255, 127, 0x90)],
)
def test_a_code_of_q4_k_lies_where_the_layout_says(weight, byte, value):
    block = np.zeros(144, np.uint8)
    block[16 + byte] = value
    code = decode_q4_k(block).code.reshape(256)
    assert code[weight] == 9 and np.count_nonzero(code) == 1


@pytest.mark.parametrize(
    ("weight", "low", "low_value", "high", "high_value"),
    [
        (0, 0, 0x09, 0, 0x02),
        (32, 32, 0x09, 0, 0x08),
        (64, 0, 0x90, 0, 0x20),
        (127, 63, 0x90, 31, 0x80),
        (128, 64, 0x09, 32, 0x02),
        (255, 127, 0x90, 63, 0x80),
    ],
)
def test_a_code_of_q6_k_lies_where_the_layout_says(weight, low, low_value, high, high_value):
    block = np.zeros(210, np.uint8)
    block[low], block[128 + high] = low_value, high_value
    code = decode_q6_k(block).code.reshape(256)
    assert code[weight] == 9 + 16 * 2 - 32 and np.count_nonzero(code != -32) == 1


def test_a_token_outside_the_vocabulary_is_refused(rng):
    table = QuantMatrix(random_rows(rng, 4, 1, "Q4_K"), "Q4_K")
    for token in (-1, 4):
        with pytest.raises(ValueError, match=f"token id .{token}. is outside the vocabulary of 4"):
            embed(table, np.array([0, token], np.int32))


def test_no_tokens_give_no_rows(rng):
    table = QuantMatrix(random_rows(rng, 4, 1, "Q6_K"), "Q6_K")
    assert embed(table, np.empty(0, np.int32)).shape == (0, 256)


@pytest.mark.parametrize(
    ("shape", "type_name", "said"),
    [
        ((3, 145), "Q4_K", "a row of 145 bytes is no whole number of Q4_K blocks"),
        ((3, 0), "Q6_K", "a row of 0 bytes"),
        ((3, 144), "Q5_K", "type Q5_K has no reference; supported: Q4_K, Q6_K"),
    ],
)
def test_bytes_that_are_no_whole_blocks_are_refused(shape, type_name, said):
    matrix = QuantMatrix(np.zeros(shape, np.uint8), type_name)
    with pytest.raises(ValueError, match=said):
        assert matrix.k
