"""Quantised matmul against Python's integers, which have no bound, and under other schedules."""

import numpy as np
import pytest

from exactmoe.parity.reference.dispatch import Dispatch, dispatch
from exactmoe.parity.reference.matmul import grouped_matmul, matmul
from exactmoe.parity.reference.q4_k import decode_q4_k
from exactmoe.parity.reference.q6_k import decode_q6_k
from exactmoe.parity.reference.quantize import PROFILES, Activations, quantize
from exactmoe.parity.reference.weights import BLOCK_BYTES, QuantMatrix


def f32(x):
    return float(np.float32(x))


def integers(type_name, block):
    """d, dmin, and the integer each activation is multiplied by in S and in T, of one block."""
    if type_name == "Q4_K":
        b = decode_q4_k(block)
        s = [int(b.scale[j // 32]) * int(b.code[j // 32, j % 32]) for j in range(256)]
        return float(b.d), float(b.dmin), s, [int(b.minimum[j // 32]) for j in range(256)]
    c = decode_q6_k(block)
    return float(c.d), 0.0, [int(c.scale[j // 16]) * int(c.code[j // 16, j % 16]) for j in range(256)], [0] * 256


def in_steps(weight, x, t, n, split=sum, at_once=False):
    """One output: sums by Python's integers, in the order of `split`, then the contract's operations one at a time.

    `at_once` is not the contract: it joins the slices before they are rounded."""
    size, y = BLOCK_BYTES[weight.type_name], 0.0
    for i in range(x.scale.shape[1]):
        d, dmin, s, m = integers(weight.type_name, weight.data[n, i * size : (i + 1) * size])
        slices = [[int(v) for v in q] for q in x.q[:, t, i * 256 : (i + 1) * 256]]

        def joined(w, slices=slices):
            sums = [split([a * b for a, b in zip(w, q, strict=True)]) for q in slices]
            if at_once:
                return f32(128 * sums[0] + sums[1])
            sums = [f32(s) for s in sums]
            return sums[0] if len(sums) == 1 else f32(f32(128 * sums[0]) + sums[1])

        product = f32(d * joined(s))
        if weight.type_name == "Q4_K":
            product = f32(product - f32(dmin * joined(m)))
        y = f32(y + f32(float(x.scale[t, i]) * product))
    return y


def in_steps_all(weight, x, **how):
    T, N = x.q.shape[1], weight.n
    return np.array([[in_steps(weight, x, t, n, **how) for n in range(N)] for t in range(T)], np.float32)


def activations(rng, t, k, profile):
    return quantize(rng.standard_normal((t, k)).astype(np.float32), profile)


def worst(type_name, profile, signs):
    """The largest sums there are: q=15, sc=mn=63 (or sc=-128, code -32) against slices at their bounds."""
    size = BLOCK_BYTES[type_name]
    raw = np.full((1, 2 * size), 0xFF, np.uint8)
    if type_name == "Q6_K":
        raw = np.zeros((1, 2 * size), np.uint8)
        raw[0, 192:208] = raw[0, size + 192 : size + 208] = 0x80
    at = slice(0, 4) if type_name == "Q4_K" else slice(208, 210)
    for block in raw.reshape(2, size):
        block[at] = np.array([1.0, 0.25][: (at.stop - at.start) // 2], np.float16).view(np.uint8)
    v = 127 if profile == "q8_k" else 16256
    q = np.broadcast_to(np.array(signs)[:, None] * v, (len(signs), 512))
    hi = (q + 64) // 128
    slices = q[None] if profile == "q8_k" else np.stack([hi, q - 128 * hi])
    scale = np.full((len(signs), 2), 0.3, np.float32)
    return QuantMatrix(raw, type_name), Activations(slices.astype(np.int8), scale)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("type_name", BLOCK_BYTES)
def test_matmul_equals_python_integers_and_single_roundings(type_name, profile, matrix, rng, same):
    weight, x = matrix(rng, (9,), 768, type_name), activations(rng, 5, 768, profile)
    same(matmul(weight, x), in_steps_all(weight, x))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("type_name", BLOCK_BYTES)
def test_the_largest_sums_are_exact(type_name, profile, same):
    weight, x = worst(type_name, profile, [1, -1])
    _, _, s, _ = integers(type_name, weight.data[0, : BLOCK_BYTES[type_name]])
    top = 63 * 15 if type_name == "Q4_K" else 128 * 32
    assert set(s) == {top}
    assert top * 127 * 256 > 2**24  # beyond what a binary32 accumulator holds
    same(matmul(weight, x), in_steps_all(weight, x))


@pytest.mark.parametrize("type_name", BLOCK_BYTES)
def test_sums_beyond_24_bits_are_rounded_slice_by_slice(type_name, rng, same):
    weight, _ = worst(type_name, "q16_k", [1])
    for block in weight.data.reshape(2, -1):
        if type_name == "Q6_K":
            block[192:208] = 0x81  # scales of -127: of -128, sums would be multiples of 128 and fit
        codes = slice(16, 144) if type_name == "Q4_K" else slice(0, 128)
        block[codes] ^= rng.integers(0, 2, 128).astype(np.uint8)
    x = quantize(rng.uniform(0.97, 1, (40, 512)).astype(np.float32), "q16_k")
    found = matmul(weight, x)
    same(found, in_steps_all(weight, x))
    assert (found != in_steps_all(weight, x, at_once=True)).any()  # the data tells the two apart


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("type_name", BLOCK_BYTES)
def test_any_order_and_any_split_of_a_block_gives_the_same_bits(type_name, profile, matrix, rng, same):
    weight, x = matrix(rng, (6,), 512, type_name), activations(rng, 3, 512, profile)

    def shuffled_in_parts(terms):
        order = rng.permutation(256)
        cuts = np.sort(rng.integers(0, 257, 3))
        return sum(sum(terms[i] for i in part) for part in np.split(order, cuts))

    same(matmul(weight, x), in_steps_all(weight, x, split=shuffled_in_parts))


def test_an_order_of_rounded_sums_would_show(matrix, rng):
    """The data of the test above tells schedules apart where sums are rounded."""
    weight, x = matrix(rng, (6,), 512, "Q4_K"), activations(rng, 3, 512, "q8_k")

    def rounded(terms):
        total = 0.0
        for term in terms:
            total = f32(total + f32(term * f32(0.1)))
        return total

    forwards = in_steps_all(weight, x, split=rounded)
    backwards = in_steps_all(weight, x, split=lambda terms: rounded(terms[::-1]))
    assert (forwards != backwards).any()


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("type_name", BLOCK_BYTES)
def test_a_row_does_not_know_what_shares_the_launch(type_name, profile, matrix, rng, same):
    weight, x = matrix(rng, (2500,), 256, type_name), activations(rng, 17, 256, profile)
    whole = matmul(weight, x)
    same(matmul(weight, Activations(x.q[:, 3:4], x.scale[3:4])), whole[3:4])
    same(matmul(QuantMatrix(weight.data[2040:2060], type_name), x), whole[:, 2040:2060])


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("type_name", BLOCK_BYTES)
def test_matmul_is_near_float64(type_name, profile, matrix, rng):
    from exactmoe.parity.exact import dequantize

    weight = matrix(rng, (64,), 2048, type_name)
    x = rng.standard_normal((9, 2048)).astype(np.float32)
    exact = x.astype(np.float64) @ dequantize(weight.data, type_name).T
    found = matmul(weight, quantize(x, profile))
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 1e-7 < error < {"q8_k": 0.02, "q16_k": 2e-4}[profile]


def test_a_nan_scale_makes_its_row_nan_and_no_other(matrix, rng):
    x = activations(rng, 3, 512, "q8_k")
    x.scale[1, 1] = np.nan
    assert np.isnan(matmul(matrix(rng, (4,), 512, "Q4_K"), x)).all(axis=1).tolist() == [False, True, False]


def test_blocks_of_zero_activations_give_zero(matrix, rng, same):
    x = quantize(np.zeros((2, 512), np.float32), "q16_k")
    same(np.abs(matmul(matrix(rng, (4,), 512, "Q4_K"), x)), np.zeros((2, 4), np.float32))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("type_name", BLOCK_BYTES)
def test_a_routed_row_is_its_activation_row_times_its_expert(type_name, profile, matrix, rng, same):
    E, T, A = 5, 7, 2
    expert = rng.choice([0, 2, 4], (T, A)).astype(np.int32)  # 1 and 3 stay empty
    weight = matrix(rng, (E, 6), 256, type_name)
    for x_rows, per in ((T, A), (T * A, 1)):
        x = activations(rng, x_rows, 256, profile)
        found = grouped_matmul(weight, x, dispatch(expert, E), per)
        rows = []
        for r, e in enumerate(expert.reshape(-1)):
            mine = Activations(x.q[:, r // per : r // per + 1], x.scale[r // per : r // per + 1])
            rows.append(matmul(QuantMatrix(weight.data[e], type_name), mine)[0])
        same(found, np.stack(rows))


def test_no_rows_give_no_rows(matrix, rng):
    x = activations(rng, 0, 256, "q16_k")
    assert matmul(matrix(rng, (4,), 256, "Q6_K"), x).shape == (0, 4)
    none = Dispatch(np.empty(0, np.int32), np.zeros(4, np.int32))
    assert grouped_matmul(matrix(rng, (3, 4), 256, "Q6_K"), x, none, 2).shape == (0, 4)


def test_widths_and_counts_that_do_not_meet_are_refused(matrix, rng):
    x = activations(rng, 4, 512, "q8_k")
    with pytest.raises(ValueError, match="activations of width 512 meet weights of width 256"):
        matmul(matrix(rng, (4,), 256, "Q4_K"), x)
    rows = dispatch(np.zeros((4, 2), np.int32), 3)
    with pytest.raises(ValueError, match="dispatch is for 3 experts, weights for 2"):
        grouped_matmul(matrix(rng, (2, 4), 512, "Q4_K"), x, rows, 2)
    with pytest.raises(ValueError, match="4 activation rows, 1 times each, are not 8 rows"):
        grouped_matmul(matrix(rng, (3, 4), 512, "Q4_K"), x, rows, 1)
