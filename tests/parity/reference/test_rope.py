"""The rope table and the turning of heads."""

import numpy as np
import pytest

from exactmoe.parity.reference.norm import rms_norm
from exactmoe.parity.reference.rope import RopeTable, qk_norm_rope, rope_table

EPS = np.float32(1e-6)


def f32(x):
    return float(np.float32(x))


def test_the_table_is_cos_and_sin_to_the_nearest_binary32():
    table = rope_table(500, 128, 1e6)
    angle = np.arange(500)[:, None] * 1e6 ** (-np.arange(0, 128, 2) / 128)
    for found, exact in ((table.cos, np.cos(angle)), (table.sin, np.sin(angle))):
        assert found.dtype == np.float32 and found.shape == (500, 64)
        half_ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64) / 2
        assert (np.abs(found - exact) <= half_ulp + 1e-13).all()  # numpy's angles differ from these in their last bit


def test_the_digest_of_a_table_is_that_of_its_bytes_and_known():
    assert rope_table(64, 128, 1e6).digest() == "395672ffaf49a3c83360d2617f6fee8c93b08d41ce33460cb88f95b93acdb3d6"
    assert rope_table(64, 128, 1e6).digest() != rope_table(64, 128, 1e4).digest() != rope_table(65, 128, 1e4).digest()


def test_a_shared_table_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        rope_table(3, 8, 1e4).cos[0, 0] = 2


def test_heads_are_normed_then_pairs_half_a_head_apart_are_turned(rng, same):
    T, n, C, start = 3, 2, 8, 5
    x, weight = rng.standard_normal((T, n * C)).astype(np.float32), rng.standard_normal(C).astype(np.float32)
    table = rope_table(20, C, 1e4)
    expected = np.empty((T, n, C), np.float32)
    for t in range(T):
        for h in range(n):
            y = rms_norm(x[t, h * C : (h + 1) * C], weight, EPS).astype(float)
            for i in range(C // 2):
                cos, sin = float(table.cos[start + t, i]), float(table.sin[start + t, i])
                a, b = float(y[i]), float(y[i + C // 2])
                expected[t, h, i] = f32(f32(a * cos) - f32(b * sin))
                expected[t, h, i + C // 2] = f32(f32(b * cos) + f32(a * sin))
    same(qk_norm_rope(x, weight, EPS, table, start), expected)


def test_position_zero_does_not_turn(rng, same):
    x, weight = rng.standard_normal((1, 256)).astype(np.float32), np.ones(128, np.float32)
    turned = qk_norm_rope(x, weight, EPS, rope_table(1, 128, 1e6), 0)
    same(turned, rms_norm(x.reshape(1, 2, 128), weight, EPS))


def test_scores_depend_on_the_distance_of_positions_only(rng):
    q, k = rng.standard_normal((2, 1, 128)).astype(np.float32)
    weight, table = np.ones(128, np.float32), rope_table(400, 128, 1e6)

    def score(p, s):
        a, b = (qk_norm_rope(x, weight, EPS, table, at).astype(np.float64).ravel() for x, at in ((q, p), (k, s)))
        return float(a @ b)

    assert score(9, 2) == pytest.approx(score(307, 300), abs=1e-4)
    assert score(9, 2) != pytest.approx(score(9, 3), abs=1e-2)


def test_no_rows_give_no_rows():
    assert qk_norm_rope(np.empty((0, 16), np.float32), np.ones(8, np.float32), EPS, rope_table(4, 8, 1e4), 4).shape == (
        0,
        2,
        8,
    )


def test_what_does_not_fit_is_refused():
    table, weight = rope_table(4, 8, 1e4), np.ones(8, np.float32)
    with pytest.raises(ValueError, match="head width must be even, got 7"):
        rope_table(4, 7, 1e4)
    with pytest.raises(ValueError, match="rows of 12 are no whole number of heads of 8"):
        qk_norm_rope(np.ones((1, 12), np.float32), weight, EPS, table, 0)
    with pytest.raises(ValueError, match="positions 3 to 4 are not among the table's 4"):
        qk_norm_rope(np.ones((2, 8), np.float32), weight, EPS, RopeTable(*table), 3)
