"""Attention in any cut of its keys, in any chunks of its queries, and against float64."""

import numpy as np
import pytest

from exactmoe.parity.reference.attention import MAX_KEYS, attend, attention_scores, attention_softmax
from exactmoe.parity.reference.kv_cache import KVLayer, append
from exactmoe.parity.reference.numerics import exp
from exactmoe.parity.reference.quantize import quantize_15

T, H, G, C = 23, 6, 2, 96


def layer(capacity, g=G, c=C):
    shape = (capacity, g)
    poison = np.full(shape, np.nan, np.float32)
    return KVLayer(np.full((*shape, c), -1, np.int16), poison, np.full((*shape, c), -1, np.int16), poison.copy())


@pytest.fixture
def filled(rng):
    """Queries, keys and values of T positions, and the cache that holds the latter."""
    q = rng.standard_normal((T, H, C)).astype(np.float32) * np.float32(1.5)
    k = rng.standard_normal((T, G, C)).astype(np.float32)
    v = (rng.standard_normal((T, G, C)) * np.exp2(rng.integers(-3, 4, (T, G, 1)))).astype(np.float32)
    kv = layer(T + 3)  # poison behind the last position
    append(k, v.reshape(T, -1), kv, 0)
    return q, k, v, kv


def f32(x):
    return float(np.float32(x))


def scores_in_steps(q, kv, g, keys):
    """Scores of one head's query, by key."""
    v, scale = (a[0] for a in quantize_15(q[None]))
    c = f32(float(scale) * f32(1 / f32(np.sqrt(len(q)))))
    dots = {s: sum(int(a) * int(b) for a, b in zip(v, kv.k[s, g], strict=True)) for s in keys}
    return {s: f32(f32(f32(dot) * c) * float(kv.k_scale[s, g])) for s, dot in dots.items()}


def query_in_steps(q, kv, g, t, parts):
    """One head's output for the query at position t, its keys cut into `parts`, every sum by Python's integers."""
    keys = [s for part in parts for s in part]
    assert sorted(keys) == list(range(t + 1))
    score = scores_in_steps(q, kv, g, keys)
    m, w = max(score.values()), max(float(kv.v_scale[s, g]) for s in keys)
    p = {s: float(exp(np.float32([f32(score[s] - m)]))[0]) for s in keys}
    den = f32(sum(sum(round(p[s] * 2**20) for s in part) for part in parts))
    out = []
    weight = {s: round(f32(p[s] * f32(float(kv.v_scale[s, g]) / w)) * 2**20) for s in keys}
    for j in range(len(q)):
        total = sum(sum(weight[s] * int(kv.v[s, g, j]) for s in part) for part in parts)
        out.append(f32(f32(f32(total) / den) * w))
    return out


def test_any_cut_of_the_keys_in_any_order_gives_the_same_bits(filled, rng, same):
    q, _, _, kv = filled
    found = attend(q, kv, 0).reshape(T, H, C)
    for t in (0, 1, 7, T - 1):
        for h in (0, 2, 3, H - 1):
            order = rng.permutation(t + 1)
            parts = np.split(order, np.sort(rng.integers(0, t + 2, 3)))
            same(found[t, h], np.array(query_in_steps(q[t, h], kv, h // (H // G), t, parts), np.float32))


def test_scores_follow_the_formula_step_by_step(filled, same):
    q, _, _, kv = filled
    found = attention_scores(q, kv, 0)
    for t in range(T):
        for h in range(H):
            expected = scores_in_steps(q[t, h], kv, h // (H // G), range(t + 1))
            same(found[t, h, : t + 1], np.array(list(expected.values()), np.float32))


def test_any_chunks_of_the_queries_give_the_same_bits(filled, same):
    q, k, v, _ = filled
    whole = layer(T)
    append(k, v.reshape(T, -1), whole, 0)
    expected = attend(q, whole, 0)
    for chunk in (1, 4, 7):
        kv, rows = layer(T), []
        for start in range(0, T, chunk):
            at = slice(start, start + chunk)
            append(k[at], v[at].reshape(-1, G * C), kv, start)
            rows.append(attend(q[at], kv, start))
        same(np.concatenate(rows), expected)


def test_attention_is_near_float64(filled):
    """Keys and queries have 15 bits, values 13, probabilities 20: off by less than 2^-11 of the largest value."""
    q, k, v, kv = filled
    found = attend(q, kv, 0).reshape(T, H, C)
    worst = 0.0
    for h in range(H):
        g = h // (H // G)
        score = q[:, h].astype(float) @ k[:, g].astype(float).T / np.sqrt(C)
        score[np.triu_indices(T, 1)] = -np.inf
        p = np.exp(score - score.max(axis=1, keepdims=True))
        exact = (p / p.sum(axis=1, keepdims=True)) @ v[:, g].astype(float)
        worst = max(worst, float((np.abs(found[:, h] - exact) / np.abs(v[:, g]).max()).max()))
    assert 0 < worst < 2.0**-11


def test_scores_and_softmax_are_near_float64(filled):
    q, k, _, kv = filled
    score, softmax = attention_scores(q, kv, 0), attention_softmax(q, kv, 0)
    future = np.triu(np.ones((T, T), bool), 1)
    for h in range(H):
        exact = q[:, h].astype(float) @ k[:, h // (H // G)].astype(float).T / np.sqrt(C)
        assert np.abs(score[:, h] - exact)[~future].max() < 2e-3
        p = np.where(future, 0, np.exp(exact - np.where(future, -np.inf, exact).max(axis=1, keepdims=True)))
        assert np.abs(softmax[:, h] - p / p.sum(axis=1, keepdims=True)).max() < 1e-3


def test_keys_of_the_future_have_score_minus_infinity_and_weight_zero(filled):
    q, _, _, kv = filled
    future = np.arange(T) > np.arange(5, T)[:, None]
    score, softmax = attention_scores(q[5:], kv, 5), attention_softmax(q[5:], kv, 5)
    assert score.shape == softmax.shape == (T - 5, H, T)
    for h in range(H):
        assert (score[:, h][future] == -np.inf).all() and np.isfinite(score[:, h][~future]).all()
        assert (softmax[:, h][future] == 0).all() and (softmax[:, h][~future] > 0).any()


def test_the_weights_of_a_query_sum_to_one(filled):
    q, _, _, kv = filled
    total = attention_softmax(q, kv, 0).astype(np.float64).sum(axis=2)
    assert np.abs(total - 1).max() < T * 2.0**-24


def test_the_first_token_attends_to_itself_alone(filled, same):
    q, _, _, kv = filled
    own = kv.v[0].astype(np.float32) * kv.v_scale[0][:, None]
    same(attend(q[:1], kv, 0).reshape(H, C), np.repeat(own, H // G, axis=0))


def test_equal_keys_share_equally_and_far_ones_get_nothing(rng, same):
    kv = layer(4)
    k = np.ones((4, G, C), np.float32)
    k[1] *= -100
    v = rng.integers(-8, 8, (4, G, C)).astype(np.float32)
    append(k, v.reshape(4, -1), kv, 0)
    q = np.full((1, H, C), 50, np.float32)
    softmax = attention_softmax(q, kv, 3)
    third = np.float32(2**20) / np.float32(3 * 2**20)
    same(softmax, np.broadcast_to(np.float32([third, 0, third, third]), (1, H, 4)).copy())


def test_a_head_without_values_gives_zero(filled):
    q, k, v, _ = filled
    kv = layer(T)
    v[:, 0] = 0
    append(k, v.reshape(T, -1), kv, 0)
    found = attend(q, kv, 0).reshape(T, G, H // G, C)
    assert (found[:, 0] == 0).all() and (found[:, 1] != 0).any()


def test_a_bad_key_or_value_is_nan_to_those_that_see_it_only(filled, same):
    q, _, _, kv = filled
    good = attend(q, kv, 0).reshape(T, G, H // G, C)
    for scale, at, g in ((kv.k_scale, 9, 0), (kv.v_scale, 15, 1)):
        scale[at, g] = np.nan
        found = attend(q, kv, 0).reshape(T, G, H // G, C)
        assert np.isnan(found[at:, g]).all()
        same(found[:at, g], good[:at, g])
    same(found[:9], good[:9])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_query_makes_its_head_nan_and_no_other(filled, bad, same):
    q, _, _, kv = filled
    good = attend(q, kv, 0).reshape(T, H, C)
    q[4, 2, 3] = bad
    found = attend(q, kv, 0).reshape(T, H, C)
    assert np.isnan(found[4, 2]).all()
    same(np.delete(found.reshape(-1, C), 4 * H + 2, axis=0), np.delete(good.reshape(-1, C), 4 * H + 2, axis=0))


def test_a_score_that_overflows_makes_its_head_nan(filled):
    q, _, _, kv = filled
    q[4, 2], kv.k_scale[:T, 0] = 3e38, 1e30
    assert np.isnan(attend(q, kv, 0).reshape(T, H, C)[4, 2]).all()
    score, softmax = attention_scores(q, kv, 0), attention_softmax(q, kv, 0)
    assert np.isinf(score[4, 2, :5]).any() and not np.isnan(score).any()
    assert np.isnan(softmax[4, 2, :5]).all() and (softmax[4, 2, 5:] == 0).all()
    assert not np.isnan(softmax[4, 3:]).any()


def test_the_largest_sums_stay_exact():
    """Keys, values and probabilities at their bounds: N*v and q*k pass 2^31, neither passes 2^53."""
    S, C = 4096, 256
    kv = KVLayer(
        np.full((S, 1, C), 16256, np.int16),
        np.full((S, 1), 1e-4, np.float32),
        np.full((S, 1, C), -8192, np.int16),
        np.full((S, 1), 2.0**-12, np.float32),
    )
    out = attend(np.ones((1, 1, C), np.float32), kv, S - 1)
    assert out.tolist() == [[-2.0] * C]
    assert MAX_KEYS * 2**20 * 8192 <= 2**53 and 256 * 16256**2 <= 2**53


def test_no_queries_give_no_rows(filled):
    q, _, _, kv = filled
    assert attend(q[:0], kv, 5).shape == (0, H * C)
    assert attention_scores(q[:0], kv, 5).shape == attention_softmax(q[:0], kv, 5).shape == (0, H, 5)


def test_positions_and_heads_that_do_not_fit_are_refused(filled):
    q, _, _, kv = filled
    with pytest.raises(ValueError, match="positions 4 to 26 are not among the cache's 26"):
        attend(q, kv, 4)
    with pytest.raises(ValueError, match="5 query heads do not share 2 kv heads evenly"):
        attend(q[:, :5], kv, 0)
