"""Dispatch, SwiGLU, combine, the residual and argmax."""

import numpy as np
import pytest

from exactmoe.parity.reference.argmax import argmax
from exactmoe.parity.reference.combine import combine
from exactmoe.parity.reference.dispatch import dispatch
from exactmoe.parity.reference.numerics import exp
from exactmoe.parity.reference.quantize import quantize
from exactmoe.parity.reference.residual import add
from exactmoe.parity.reference.swiglu import swiglu, swiglu_quantize


def f32(x):
    return float(np.float32(x))


@pytest.mark.parametrize(("T", "A", "E"), [(0, 2, 4), (1, 1, 1), (17, 4, 5), (33, 8, 128)])
def test_rows_are_grouped_by_expert_in_their_own_order(T, A, E, rng):
    expert = np.array([rng.permutation(E)[:A] for _ in range(T)], np.int32).reshape(T, A)
    order, offset = dispatch(expert, E)
    flat = expert.reshape(-1).tolist()
    assert order.dtype == offset.dtype == np.int32
    assert order.tolist() == sorted(range(T * A), key=lambda r: (flat[r], r))
    assert offset.tolist() == [sum(e < limit for e in flat) for limit in range(E + 1)]


def test_experts_without_rows_keep_their_offset():
    found = dispatch(np.int32([[3, 1], [1, 3]]), 5)
    assert found.order.tolist() == [1, 2, 0, 3]
    assert found.offset.tolist() == [0, 0, 2, 2, 4, 4]


@pytest.mark.parametrize("bad", [-1, 4])
def test_an_expert_that_does_not_exist_is_refused(bad):
    with pytest.raises(ValueError, match="expert ids must be 0 to 3, got"):
        dispatch(np.int32([[0, bad]]), 4)


def test_swiglu_follows_the_formula_step_by_step(rng, same):
    gate = np.concatenate([rng.uniform(-120, 120, 500), rng.standard_normal(500), [0, -0.0, 1e-42, 3e38, -3e38]])
    gate, up = gate.astype(np.float32)[None], rng.standard_normal((1, 1005)).astype(np.float32)
    e = exp(-gate)[0]
    expected = [
        f32(f32(float(g) * f32(1 / f32(1 + float(p)))) * float(u)) for g, p, u in zip(gate[0], e, up[0], strict=True)
    ]
    same(swiglu(gate, up)[0], np.array(expected, np.float32))


def test_swiglu_is_near_float64(rng):
    gate, up = (rng.standard_normal((3, 512)) * 4).astype(np.float32), rng.standard_normal((3, 512)).astype(np.float32)
    g = gate.astype(np.float64)
    exact = g / (1 + np.exp(-g)) * up
    assert (np.abs(swiglu(gate, up) - exact) <= np.abs(exact) * 5 * 2.0**-23).all()


def test_swiglu_keeps_nan_and_infinity():
    found = swiglu(np.float32([[np.nan, np.inf, -np.inf, 1]]), np.float32([[1, 1, 1, np.nan]]))
    assert np.isnan(found[0, [0, 3]]).all()
    assert found[0, 1] == np.inf and found[0, 2] == -np.inf  # -inf times a number above zero: exp stops at 88


def test_swiglu_and_quantise_is_one_after_the_other(rng, same):
    gate, up = rng.standard_normal((2, 3, 512)).astype(np.float32)
    both, expected = swiglu_quantize(gate, up, "q8_k"), quantize(swiglu(gate, up), "q8_k")
    same(both.q, expected.q)
    same(both.scale, expected.scale)


def test_experts_are_folded_in_the_order_of_their_rank(rng, same):
    T, A, D = 5, 4, 7
    out, weight = rng.standard_normal((T * A, D)).astype(np.float32), rng.random((T, A)).astype(np.float32)
    expected = np.empty((T, D), np.float32)
    for t in range(T):
        for j in range(D):
            total = 0.0
            for k in range(A):
                total = f32(total + f32(float(weight[t, k]) * float(out[t * A + k, j])))
            expected[t, j] = total
    same(combine(out, weight), expected)
    backwards = combine(out.reshape(T, A, D)[:, ::-1].reshape(-1, D), weight[:, ::-1])
    assert (backwards != expected).any()  # the data tells the order


def test_one_expert_of_negative_zeros_sums_to_positive_zero(same):
    same(combine(np.float32([[-0.0]]), np.float32([[1]])), np.float32([[0.0]]))


def test_the_residual_is_one_rounded_sum(rng, same):
    a, b = rng.standard_normal((2, 5, 9)).astype(np.float32)
    same(add(a, b), (a.astype(np.float64) + b.astype(np.float64)).astype(np.float32))


def test_shapes_that_do_not_meet_are_refused():
    a, b = np.zeros((2, 3), np.float32), np.zeros((1, 3), np.float32)
    for op in (add, swiglu):
        with pytest.raises(ValueError, match=r"must have shape \[2, 3\], got \[1, 3\]"):
            op(a, b)
    with pytest.raises(ValueError, match="2 expert rows are not 1 tokens of 3 experts"):
        combine(a, b)


@pytest.mark.parametrize(
    ("logits", "token"),
    [
        ([1, 3, 3, 2], 1),
        ([-0.0, 0.0, -1, 0.0], 0),
        ([np.nan, -1, np.nan, -2], 1),
        ([np.nan, -np.inf, np.nan, np.nan], 1),
        ([np.nan, np.nan, np.nan, np.nan], 0),
        ([-np.inf, -np.inf, -3e38, np.inf], 3),
        ([np.inf, np.nan, np.inf, 0], 0),
    ],
)
def test_the_token_is_the_smallest_id_of_the_largest_logit(logits, token):
    found = argmax(np.float32([[9, 0, 0, 0], logits]))
    assert found.dtype == np.int32 and found.tolist() == [0, token]


def test_no_tokens_give_no_rows():
    empty = np.empty((0, 4), np.float32)
    for op in (add, swiglu):
        assert op(empty, empty).shape == (0, 4)
    assert combine(empty, np.empty((0, 2), np.float32)).shape == (0, 4)
    assert argmax(empty).shape == (0,)
    with pytest.raises(ValueError, match="logits must have shape"):
        argmax(np.empty((2, 0), np.float32))
