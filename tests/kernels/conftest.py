"""What every kernel test shares: the device, the cases, poisoned memory, and the comparison with the reference."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from exactmoe.parity.bits import compare
from exactmoe.parity.cases import CASES, Case, kernel_output, reference_output

_GUARD = 64  # elements on both sides of every allocation that must stay as they were


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cases(*ops): run the test once for each case of these ops")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("cases")
    if marker:
        params = [
            pytest.param(case, id=f"{op}-{case}", marks=[pytest.mark.gpu] if case.gpu else [])
            for op in marker.args
            for case in CASES[op]
        ]
        metafunc.parametrize("case", params)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make unwritten memory loud: `empty` is NaN or -1, and its surroundings must come back untouched."""
    held: list[torch.Tensor] = []
    empty = torch.empty

    def poisoned_empty(*shape: Any, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        size = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        dtype = dtype or torch.float32
        whole = empty(size.numel() + 2 * _GUARD, dtype=dtype, device=device).fill_(_poison(dtype))
        held.append(whole)
        return whole[_GUARD : _GUARD + size.numel()].view(size)

    def like(x: torch.Tensor) -> torch.Tensor:
        return poisoned_empty(*x.shape, dtype=x.dtype, device=x.device)

    def new(x: torch.Tensor, *shape: int, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        return poisoned_empty(*shape, dtype=dtype or x.dtype, device=device or x.device)

    monkeypatch.setattr(torch, "empty", poisoned_empty)
    monkeypatch.setattr(torch, "empty_like", like)
    monkeypatch.setattr(torch.Tensor, "new_empty", new)
    yield
    for whole in held:
        for guard in (whole[:_GUARD], whole[-_GUARD:]):
            kept = guard.isnan() if guard.is_floating_point() else guard == _poison(guard.dtype)
            assert bool(kept.all()), f"a kernel wrote outside its output {list(whole.shape)} {whole.dtype}"


def _poison(dtype: torch.dtype) -> float:
    if dtype.is_floating_point:
        return float("nan")
    return 255 if dtype == torch.uint8 else -1


def assert_same(left: dict[str, Any], right: dict[str, Any], what: str, empty_allowed: bool = False) -> None:
    assert left.keys() == right.keys(), f"{what}: outputs {sorted(left)} against {sorted(right)}"
    verdicts = [compare(f"{what}: {name}", left[name], right[name], empty_allowed=empty_allowed) for name in left]
    wrong = [f"{v.name}: {v}" for v in verdicts if not v.equal]
    assert not wrong, "; ".join(wrong)


@pytest.fixture
def same() -> Callable[..., None]:
    """Assert that two sets of named arrays are equal bit for bit."""
    return assert_same


@pytest.fixture
def check(device: torch.device) -> Callable[..., None]:
    """Assert that kernel and reference give the same bits for a case."""

    def check(case: Case, **options: Any) -> None:
        left, right = kernel_output(case, device, **options), reference_output(case)
        assert_same(left, right, f"{case.op} {case}", empty_allowed=case.rows == 0)

    return check
