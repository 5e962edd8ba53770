"""The shared device functions, each against the reference's, on every kind of binary32."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from exactmoe.kernels import numerics
from exactmoe.kernels.launch import FAITHFUL
from exactmoe.parity.reference import numerics as reference


@triton.jit
def _exp_kernel(x_ptr, y_ptr, M: tl.constexpr):
    i = tl.program_id(0) * M + tl.arange(0, M)
    tl.store(y_ptr + i, numerics.exp(tl.load(x_ptr + i)))


@triton.jit
def _reciprocal_kernel(x_ptr, y_ptr, M: tl.constexpr):
    i = tl.program_id(0) * M + tl.arange(0, M)
    tl.store(y_ptr + i, numerics.reciprocal(tl.load(x_ptr + i)))


@triton.jit
def _ordered_kernel(x_ptr, y_ptr, M: tl.constexpr):
    i = tl.program_id(0) * M + tl.arange(0, M)
    tl.store(y_ptr + i, numerics.ordered(tl.load(x_ptr + i)))


SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    87.0,
    88.0,
    89.0,
    -87.0,
    -88.0,
    -104.0,
    0.34657359,
    -0.34657359,
    np.inf,
    -np.inf,
    np.nan,
]
SIZE = 1 << 16


def _every_kind(rng: np.random.Generator) -> np.ndarray:
    """Random bit patterns, values where exp is neither 0 nor infinite, and the special ones."""
    bits = rng.integers(0, 2**32, SIZE // 2, dtype=np.uint64).astype(np.uint32).view(np.float32)
    x = np.concatenate([bits, rng.uniform(-90, 90, SIZE // 2).astype(np.float32)])
    x[: len(SPECIAL)] = SPECIAL
    return x


def _apply(kernel: object, x: np.ndarray, dtype: torch.dtype, device: torch.device) -> np.ndarray:
    source = torch.from_numpy(x).to(device)
    out = torch.empty(SIZE, dtype=dtype, device=device)
    M = SIZE if device.type == "cpu" else 1024
    with np.errstate(all="ignore"):
        kernel[(SIZE // M,)](source, out, M=M, **FAITHFUL)  # type: ignore[index]
    return out.cpu().numpy()


def test_exp_equals_the_reference_on_every_kind_of_float(
    rng: np.random.Generator, device: torch.device, same: Callable[..., None]
) -> None:
    x = _every_kind(rng)
    same({"exp": _apply(_exp_kernel, x, torch.float32, device)}, {"exp": reference.exp(x)}, "exp")


def test_exp_is_within_one_ulp(rng: np.random.Generator, device: torch.device) -> None:
    x = np.linspace(-87, 88, SIZE).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    error = np.abs(_apply(_exp_kernel, x, torch.float32, device) - exact) / np.spacing(exact.astype(np.float32))
    assert error.max() <= 1.0


def test_a_reciprocal_is_correctly_rounded(
    rng: np.random.Generator, device: torch.device, same: Callable[..., None]
) -> None:
    x = _every_kind(rng)
    with np.errstate(all="ignore"):
        expected = np.float32(1) / x
    same({"1/x": _apply(_reciprocal_kernel, x, torch.float32, device)}, {"1/x": expected}, "reciprocal")


def test_ordered_integers_order_the_floats(rng: np.random.Generator, device: torch.device) -> None:
    x = np.sort(_every_kind(rng)[np.newaxis]).ravel()  # NaN last
    key = _apply(_ordered_kernel, x, torch.int32, device).astype(np.int64)
    real = ~np.isnan(x)
    assert (np.diff(key[real]) >= 0).all()
    assert ((np.diff(x[real]) == 0) | (np.diff(key[real]) > 0)).all()
    assert ((np.diff(x[real]) != 0) | (np.diff(key[real]) == 0)).all()
    assert key[~real].max() < key[real].min()


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_exp_of_both_zeros_is_one(value: float, device: torch.device) -> None:
    x = np.full(SIZE, value, np.float32)
    assert (_apply(_exp_kernel, x, torch.float32, device) == 1).all()
