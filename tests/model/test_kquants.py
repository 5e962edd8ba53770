"""Q4_K and Q6_K quantisers against gguf-py's dequantiser, which did not come from here."""

import zlib
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from exactmoe.kernels.errors import InvalidInput
from exactmoe.kernels.formats import BLOCK, EXECUTABLE
from exactmoe.model import kquants

FORMATS = ("Q4_K", "Q6_K")
F16_MAX = 65504


def generator(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


def read_back(data: np.ndarray, name: str) -> np.ndarray:
    return dequantize(data, gguf.GGMLQuantizationType[name])


def squared_error(x: np.ndarray, y: np.ndarray) -> float:
    assert x.shape == y.shape
    return float(np.square(x.astype(np.float64) - y.astype(np.float64)).sum())


def plainly_rounded(x: np.ndarray, name: str) -> np.ndarray:
    """The same block formats with every sub-block's extremes put at the ends of the code range, and no search."""
    if name == "Q4_K":
        sub = x.reshape(-1, 8, 32)
        low, high = np.minimum(sub.min(-1), 0), np.maximum(sub.max(-1), 0)
        scale, minimum = (high - low) / 15, -low
        d, dmin = (scale.max(1) / 63).astype(np.float16), (minimum.max(1) / 63).astype(np.float16)
        sc = np.rint(scale / scale.max(1, keepdims=True) * 63)
        m = np.rint(minimum / minimum.max(1, keepdims=True) * 63)
        width, offset = d[:, None].astype(np.float32) * sc, dmin[:, None].astype(np.float32) * m
        code = np.clip(np.rint((sub + offset[..., None]) / np.where(width > 0, width, 1)[..., None]), 0, 15)
        packed = kquants.pack_q4_k(
            d, dmin, sc.astype(np.uint8), m.astype(np.uint8), code.astype(np.uint8).reshape(-1, 256)
        )
    else:
        sub = x.reshape(-1, 16, 16)
        scale = np.abs(sub).max(-1) / 31
        d = (scale.max(1) / 127).astype(np.float16)
        sc = np.rint(scale / scale.max(1, keepdims=True) * 127)
        width = d[:, None].astype(np.float32) * sc
        code = np.clip(np.rint(sub / np.where(width > 0, width, 1)[..., None]), -32, 31) + 32
        packed = kquants.pack_q6_k(d, sc.astype(np.int8), code.astype(np.uint8).reshape(-1, 256))
    return read_back(packed.reshape(*x.shape[:-1], -1), name)


def weight_rows() -> np.ndarray:
    """Rows of the trained tiny model, before quantisation: [24, 512] f32."""
    rows = np.load(Path(__file__).parent / "weight_rows.npy").astype(np.float32)
    assert rows.shape == (24, 512)
    assert rows.std() > 0
    return rows


def random_q4_k(rng: np.random.Generator, n: int = 7) -> tuple[np.ndarray, ...]:
    d, dmin = rng.uniform(0.001, 2, (2, n)).astype(np.float16)
    scale, minimum = rng.integers(0, 64, (2, n, 8), dtype=np.uint8)
    return d, dmin, scale, minimum, rng.integers(0, 16, (n, 256), dtype=np.uint8)


def q4_k_values(
    d: np.ndarray, dmin: np.ndarray, scale: np.ndarray, minimum: np.ndarray, code: np.ndarray
) -> np.ndarray:
    """w = d*sc*q - dmin*m, weight by weight."""
    d, dmin = d.astype(np.float32), dmin.astype(np.float32)
    out = np.empty(code.shape, np.float32)
    for i, j in np.ndindex(code.shape):
        s = j // 32
        out[i, j] = d[i] * np.float32(scale[i, s]) * np.float32(code[i, j]) - dmin[i] * np.float32(minimum[i, s])
    return out


def random_q6_k(rng: np.random.Generator, n: int = 7) -> tuple[np.ndarray, ...]:
    d = rng.uniform(0.001, 2, n).astype(np.float16)
    return d, rng.integers(-128, 128, (n, 16), dtype=np.int8), rng.integers(0, 64, (n, 256), dtype=np.uint8)


def q6_k_values(d: np.ndarray, scale: np.ndarray, code: np.ndarray) -> np.ndarray:
    """w = d*sc*(q - 32), weight by weight."""
    d = d.astype(np.float32)
    out = np.empty(code.shape, np.float32)
    for i, j in np.ndindex(code.shape):
        out[i, j] = d[i] * np.float32(scale[i, j // 16]) * np.float32(int(code[i, j]) - 32)
    return out


def test_packed_q4_k_fields_are_read_back_by_gguf(request: pytest.FixtureRequest) -> None:
    fields = random_q4_k(generator(request))
    np.testing.assert_array_equal(read_back(kquants.pack_q4_k(*fields), "Q4_K"), q4_k_values(*fields))


def test_packed_q6_k_fields_are_read_back_by_gguf(request: pytest.FixtureRequest) -> None:
    fields = random_q6_k(generator(request))
    np.testing.assert_array_equal(read_back(kquants.pack_q6_k(*fields), "Q6_K"), q6_k_values(*fields))


def swap_nibbles(block: np.ndarray) -> np.ndarray:
    block[:, 16:] = (block[:, 16:] << 4) | (block[:, 16:] >> 4)
    return block


def swap_scales_and_mins(block: np.ndarray) -> np.ndarray:
    block[:, 4:12] = block[:, [8, 9, 10, 11, 4, 5, 6, 7]]
    return block


def drop_high_scale_bits(block: np.ndarray) -> np.ndarray:
    block[:, 4:12] &= 63
    return block


def swap_d_and_dmin(block: np.ndarray) -> np.ndarray:
    block[:, :4] = block[:, [2, 3, 0, 1]]
    return block


def neighbours_share_a_byte(block: np.ndarray) -> np.ndarray:
    code = np.empty((len(block), 4, 2, 32), np.uint8)
    chunk = block[:, 16:].reshape(-1, 4, 32)
    code[:, :, 0], code[:, :, 1] = chunk & 15, chunk >> 4
    flat = code.reshape(-1, 256)
    block[:, 16:] = flat[:, 0::2] | (flat[:, 1::2] << 4)
    return block


def swap_halves_of_ql(block: np.ndarray) -> np.ndarray:
    block[:, :128] = np.roll(block[:, :128], 64, axis=1)
    return block


def swap_pairs_of_ql(block: np.ndarray) -> np.ndarray:
    block[:, :128] = block[:, :128].reshape(-1, 2, 2, 32)[:, :, ::-1].reshape(-1, 128)
    return block


def reverse_high_bits(block: np.ndarray) -> np.ndarray:
    high = block[:, 128:192]
    block[:, 128:192] = (high << 6) | (high >> 2 & 3) << 4 | (high >> 4 & 3) << 2 | high >> 6
    return block


def d_first(block: np.ndarray) -> np.ndarray:
    return np.roll(block, 2, axis=1)


def unsigned_scales(block: np.ndarray) -> np.ndarray:
    block[:, 192:208] &= 127
    return block


@pytest.mark.parametrize(
    "fault", [swap_nibbles, swap_scales_and_mins, drop_high_scale_bits, swap_d_and_dmin, neighbours_share_a_byte]
)
def test_a_wrong_q4_k_packing_is_caught(
    fault: Callable[[np.ndarray], np.ndarray], request: pytest.FixtureRequest
) -> None:
    fields = random_q4_k(generator(request))
    assert not np.array_equal(read_back(fault(kquants.pack_q4_k(*fields)), "Q4_K"), q4_k_values(*fields))


@pytest.mark.parametrize("fault", [swap_halves_of_ql, swap_pairs_of_ql, reverse_high_bits, d_first, unsigned_scales])
def test_a_wrong_q6_k_packing_is_caught(
    fault: Callable[[np.ndarray], np.ndarray], request: pytest.FixtureRequest
) -> None:
    fields = random_q6_k(generator(request))
    with np.errstate(all="ignore"):  # a fault may read an exponent of Inf where d was
        assert not np.array_equal(read_back(fault(kquants.pack_q6_k(*fields)), "Q6_K"), q6_k_values(*fields))


# Share of the plain rounding's squared error that the search leaves, measured on these data, with a little room.
@pytest.mark.parametrize(("name", "share"), [("Q4_K", 0.86), ("Q6_K", 0.87)])
@pytest.mark.parametrize("data", ["gaussian", "trained"])
def test_the_search_beats_plain_rounding(name: str, share: float, data: str, request: pytest.FixtureRequest) -> None:
    x = weight_rows() if data == "trained" else generator(request).standard_normal((32, 512)).astype(np.float32)
    ours = squared_error(x, read_back(kquants.quantise(x, name), name))
    plain = squared_error(x, plainly_rounded(x, name))
    assert 0 < ours < share * plain


# Relative RMS error over Gaussian weights of llama.cpp's own quantiser (ggml_quantize_chunk): 0.07135 and 0.01774.
@pytest.mark.parametrize(("name", "bound"), [("Q4_K", 0.0725), ("Q6_K", 0.0180)])
def test_the_error_on_gaussian_weights_is_that_of_llama_cpp(
    name: str, bound: float, request: pytest.FixtureRequest
) -> None:
    x = generator(request).standard_normal((128, 1024)).astype(np.float32)
    y = read_back(kquants.quantise(x, name), name)
    assert 0.97 * bound < np.sqrt(squared_error(x, y) / np.square(x).sum()) < bound


def block_of(fill: float, **at: float) -> np.ndarray:
    x = np.full(BLOCK, fill, np.float32)
    for place, value in at.items():
        x[int(place[1:])] = value
    return x


WORST = {
    "zeros": block_of(0),
    "negative zeros": block_of(-0.0),
    "constant": block_of(0.37),
    "negative constant": block_of(-0.37),
    "one outlier": block_of(0, _77=1000),
    "one negative outlier": block_of(0, _77=-1000),
    "an outlier over noise": np.where(np.arange(BLOCK) == 200, 500, np.sin(np.arange(BLOCK))).astype(np.float32),
    "one sub-block tiny": np.where(np.arange(BLOCK) < 32, 1e-20, 1).astype(np.float32),
    "all tiny": (np.sin(np.arange(BLOCK)) * 1e-12).astype(np.float32),
    "subnormal": (np.sin(np.arange(BLOCK)) * 1e-40).astype(np.float32),
    "the smallest number": block_of(0, _3=float(np.float32(1e-45))),
    "f16 subnormal scale": (np.sin(np.arange(BLOCK)) * 2e-5).astype(np.float32),
    "large": (np.sin(np.arange(BLOCK)) * 4e6).astype(np.float32),
    "two values": np.where(np.arange(BLOCK) % 2, -0.5, 0.5).astype(np.float32),
    "scales of both signs": block_of(0, _0=1, _16=-1),
    "ramp": np.arange(-128, 128, dtype=np.float32),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", WORST)
def test_a_hard_block_stays_finite_and_near(case: str, name: str) -> None:
    x = WORST[case]
    y = read_back(kquants.quantise(x, name), name)
    assert np.isfinite(y).all()
    # A whole step of the codes is allowed, and what rounding d to float16's subnormals adds: 2^-25 * scale * code.
    step = (x.max(initial=0) - x.min(initial=0)) / 15 if name == "Q4_K" else np.abs(x).max() / 32
    reach = 63 * 16 if name == "Q4_K" else 128 * 32
    assert np.abs(y - x).max() <= step + 2.0**-25 * reach


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_are_stored_as_zeros(name: str) -> None:
    np.testing.assert_array_equal(
        read_back(kquants.quantise(np.zeros((2, 512), np.float32), name), name), np.zeros((2, 512))
    )


@pytest.mark.parametrize("name", FORMATS)
def test_weights_already_on_the_grid_come_back_almost_unchanged(name: str, request: pytest.FixtureRequest) -> None:
    x = read_back(kquants.quantise(generator(request).standard_normal((8, 512)).astype(np.float32), name), name)
    again = read_back(kquants.quantise(x, name), name)
    assert squared_error(x, again) < 2e-3 * squared_error(x, np.zeros_like(x))


@pytest.mark.parametrize("name", FORMATS)
def test_leading_dimensions_are_kept_and_rows_do_not_mix(name: str, request: pytest.FixtureRequest) -> None:
    x = generator(request).standard_normal((2, 3, 512)).astype(np.float32)
    data = kquants.quantise(x, name)
    assert data.dtype == np.uint8
    assert data.shape == (2, 3, 2 * EXECUTABLE[name].block_bytes)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_array_equal(kquants.quantise(x[i, j], name), data[i, j])


@pytest.mark.parametrize("name", FORMATS)
def test_a_tensor_longer_than_a_chunk_equals_its_parts(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = generator(request).standard_normal((5, 512)).astype(np.float32)
    whole = kquants.quantise(x, name)
    monkeypatch.setattr(kquants, "_CHUNK", 3)
    np.testing.assert_array_equal(kquants.quantise(x, name), whole)


@pytest.mark.parametrize("name", FORMATS)
def test_no_rows_give_no_blocks(name: str) -> None:
    assert kquants.quantise(np.zeros((0, 256), np.float32), name).shape == (0, EXECUTABLE[name].block_bytes)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("x", "text"),
    [
        (np.zeros(256), "float64"),
        (np.zeros(255, np.float32), "255"),
        (np.zeros(0, np.float32), "got 0"),
        (np.float32(1), "scalar"),
        (block_of(0, _9=np.nan), "NaN"),
        (block_of(0, _9=np.inf), "Inf"),
        (block_of(0, _9=-1e30), "1e\\+30"),
        (block_of(0, _9=1e29), "float16's largest"),
    ],
    ids=["f64", "ragged", "empty row", "scalar", "NaN", "Inf", "huge", "above f16"],
)
def test_weights_that_cannot_be_stored_are_refused(x: np.ndarray, text: str, name: str) -> None:
    with pytest.raises(InvalidInput, match=f"{name}.*{text}"):
        kquants.quantise(np.asarray(x), name)


def test_a_type_without_a_quantiser_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"'Q5_K'.*Q4_K, Q6_K"):
        kquants.quantise(np.zeros(256, np.float32), "Q5_K")
