"""The hash of a stage: equal to its twin on every case, and changed by whatever changes a stage."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exactmoe.kernels.errors import InvalidInput
from exactmoe.kernels.stage_digest import stage_digest
from exactmoe.parity.reference.stage_digest import stage_digest as reference


@pytest.mark.cases("stage_digest")
def test_a_stage_hashes_as_its_twin_says(case, check) -> None:
    check(case)


def test_a_known_row_has_a_known_hash() -> None:
    """By hand, in Python's integers."""

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    row = np.float32([1.0, -0.0, np.nan])
    bits = [0x3F800000, 0x80000000, 0x7FC00000]
    expected = sum(mix((i + 1) * 2**32 + b) for i, b in enumerate(bits)) % 2**64
    found = stage_digest(torch.from_numpy(row[None]))
    assert int(found[0]) % 2**64 == expected
    assert int(reference(row[None])[0]) % 2**64 == expected


def _changes(x: np.ndarray) -> dict[str, np.ndarray]:
    """Stages that differ from `x` [4, 8] as real mistakes make them differ."""
    bits = x.view(np.int32)
    changed = {name: bits.copy() for name in ("ulp", "sign", "pair", "exchanged", "rows", "shifted", "doubled")}
    changed["ulp"][2, 3] += 1
    changed["sign"][2, 3] ^= -(2**31)
    changed["pair"][2, 3] += 1
    changed["pair"][2, 5] -= 1
    changed["exchanged"][2, [3, 5]] = bits[2, [5, 3]]
    changed["rows"][[1, 2]] = bits[[2, 1]]
    changed["shifted"][2] = np.roll(bits[2], 1)
    changed["doubled"][2, [3, 5]] = bits[2, 3]
    return {name: values.view(np.float32) for name, values in changed.items()}


@given(st.integers(0, 2**32 - 1))
def test_every_change_of_a_stage_changes_a_hash(seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((4, 8)).astype(np.float32)
    before = reference(x)
    for name, values in _changes(x).items():
        touched = (values.view(np.int32) != x.view(np.int32)).any(axis=1)
        assert touched.any()
        np.testing.assert_array_equal(reference(values) != before, touched, err_msg=name)


def test_a_row_hashes_alike_alone_and_among_others() -> None:
    x = torch.randn(9, 300, generator=torch.Generator().manual_seed(1))
    whole = stage_digest(x)
    for t in (0, 4, 8):
        assert torch.equal(stage_digest(x[t : t + 1].contiguous()), whole[t : t + 1])
    assert len(set(whole.tolist())) == 9


def test_axes_after_the_first_are_one_row() -> None:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(stage_digest(x), stage_digest(x.view(3, 20)))


@pytest.mark.parametrize("values", [torch.zeros(2, 3, dtype=torch.float64), torch.zeros(()), torch.zeros(4, 6).t()])
def test_what_is_no_stage_is_refused(values: torch.Tensor) -> None:
    with pytest.raises(InvalidInput):
        stage_digest(values)
