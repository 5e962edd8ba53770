"""Freedom of schedule: block sizes, batches and chunks change speed, never bits."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from exactmoe.kernels import tiles
from exactmoe.kernels.tiles import AttentionTile, DecodeAttentionTile, MatmulTile, MatvecTile
from exactmoe.parity.cases import (
    CASES,
    Add,
    Append,
    Argmax,
    Attend,
    Case,
    Combine,
    DecodeAttention,
    Embed,
    GroupedMatmul,
    Matmul,
    QkNormRope,
    Quantize,
    RmsNorm,
    RmsNormQuantize,
    Route,
    RouterLogits,
    Swiglu,
    SwigluQuantize,
    cheap,
    grouped,
    kernel_output,
    reference_output,
)  # fmt: skip
from exactmoe.parity.reference.quantize import Activations

SCHEDULES: dict[str, dict[str, Any]] = {
    "small": {
        "rows_of_blocks": 1, "norm_rows": 1, "heads": 1, "elementwise": 128, "dispatch": 16, "router": (16, 16),
        "route": 1, "matmul": MatmulTile(16, 16, 4), "grouped_matmul": MatmulTile(16, 16, 4),
        "attention": AttentionTile(1, 16, 3, 4), "digest": (1, 32),
        "matvec": MatvecTile(8, 1, 4, 1), "decode_router": (1, 4),
        "experts_up": MatvecTile(64, 1, 4, 1), "experts_down": MatvecTile(32, 1, 4, 1),
        "decode_attention": DecodeAttentionTile(16, 3, 4, 4), "argmax": 64,
    },
    "middle": {
        "rows_of_blocks": 8, "norm_rows": 2, "heads": 8, "elementwise": 512, "dispatch": 64, "router": (32, 16),
        "route": 2, "matmul": MatmulTile(32, 64, 4), "grouped_matmul": MatmulTile(16, 64, 4),
        "attention": AttentionTile(2, 32, 2, 4), "digest": (4, 128),
        "matvec": MatvecTile(8, 5, 4, 3, 3), "decode_router": (3, 2),
        "experts_up": MatvecTile(16, 3, 4, 2), "experts_down": MatvecTile(16, 5, 4, 2),
        "decode_attention": DecodeAttentionTile(64, 2, 8, 4), "argmax": 128,
    },
    "large": {
        "rows_of_blocks": 16, "norm_rows": 4, "heads": 16, "elementwise": 2048, "dispatch": 1024, "router": (16, 64),
        "route": 4, "matmul": MatmulTile(64, 128, 8), "grouped_matmul": MatmulTile(64, 32, 8),
        "attention": AttentionTile(4, 32, 1, 8), "digest": (16, 1024),
        "matvec": MatvecTile(32, 8, 8, 99), "decode_router": (8, 8),
        "experts_up": MatvecTile(128, 4, 8, 8), "experts_down": MatvecTile(32, 8, 8, 8),
        "decode_attention": DecodeAttentionTile(128, 1, 8, 8), "argmax": 1024,
    },
}  # fmt: skip


_COST = {"experts_up": 2**19}  # its programs are many: one for each expert and tile


def _some(op: str) -> tuple[Case, ...]:
    """The largest cases of `op` that small blocks can afford in the interpreter."""
    fit = sorted(
        (case for case in cheap(op) if case.rows and case.cost < _COST.get(op, 2**20)), key=lambda case: case.cost
    )
    return tuple(fit[-3:])


def test_every_block_size_is_varied() -> None:
    functions = {name for name, fn in vars(tiles).items() if getattr(fn, "__module__", "") == tiles.__name__}
    sizes = {name for name in functions if not name.startswith("_") and name[0].islower()}
    for name, schedule in SCHEDULES.items():
        assert schedule.keys() == sizes, f"{name}: {sorted(sizes ^ schedule.keys())}"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("op", CASES)
def test_other_block_sizes_give_the_same_bits(
    op: str, schedule: str, check: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in SCHEDULES[schedule].items():
        monkeypatch.setattr(tiles, name, lambda *_, size=size: size)
    cases = _some(op)
    assert cases
    for case in cases:
        check(case)


@pytest.mark.parametrize("op", CASES)
def test_programs_in_reverse_order_give_the_same_bits(
    op: str, check: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU starts programs in any order; the interpreter runs one after another, so it can be told another order."""
    right = InterpreterBuilder.set_grid_idx

    def reversed_order(self: InterpreterBuilder, *index: int) -> None:
        right(self, *(of - 1 - i for of, i in zip(self.grid_dim, index, strict=True)))

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", reversed_order)
    for name, size in SCHEDULES["small"].items():
        monkeypatch.setattr(tiles, name, lambda *_, size=size: size)
    # Attention's programs write into one cache and one operand: which of them writes what depends on more than a tile.
    cases = [*_some(op), *(case for case in cheap(op) if op == "decode_attention" and case.cost < 2**18)]
    assert cases
    for case in cases:
        check(case)


@pytest.mark.parametrize("tile", [MatmulTile(16, 16, 4), MatmulTile(16, 128, 8), MatmulTile(64, 32, 4)], ids=str)
@pytest.mark.parametrize("fmt", ["Q4_K", "Q6_K"])
@pytest.mark.parametrize("profile", ["q8_k", "q16_k"])
def test_a_matmul_takes_any_tile(fmt: str, profile: str, tile: MatmulTile, check: Callable[..., None]) -> None:
    check(Matmul(17, 100, 512, fmt, profile), tile=tile)
    check(GroupedMatmul(7, 5, 3, 48, 256, fmt, profile, "ragged"), tile=tile)


@pytest.mark.parametrize("ahead", [1, 2, 5, 36])
def test_attention_adds_up_its_parts_a_few_at_a_time(
    ahead: int, check: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exactmoe.kernels.decode_attention._AHEAD", ahead)
    monkeypatch.setattr(tiles, "decode_attention", lambda *_: DecodeAttentionTile(16, 5, 4, 4))
    for position in (30, 64, 150):  # 2 active parts of 5, all of them, and parts of several tiles
        check(DecodeAttention(4, 2, 64, position, "q8_k"))


@pytest.mark.parametrize("split", [1, 2, 5, 16])
@pytest.mark.parametrize("keys", [16, 64])
def test_attention_takes_any_cut_of_the_keys(split: int, keys: int, check: Callable[..., None]) -> None:
    check(Attend(3, 4, 2, 64, 70), tile=AttentionTile(2, keys, split, 4))
    check(Attend(7, 8, 2, 128, 20, "nonfinite"), tile=AttentionTile(2, keys, split, 4))


def _row(x: Any, t: int, n: int = 1) -> Any:
    return np.ascontiguousarray(x[t * n : (t + 1) * n])


def _acts(x: Activations, t: int, n: int = 1) -> Activations:
    return Activations(np.ascontiguousarray(x.q[:, t * n : (t + 1) * n]), _row(x.scale, t, n))


def _first_and_second(a: tuple[Any, ...], t: int) -> tuple[Any, ...]:
    return (_row(a[0], t), _row(a[1], t), *a[2:])


def _first(a: tuple[Any, ...], t: int) -> tuple[Any, ...]:
    return (_row(a[0], t), *a[1:])


def _shifted(at: int) -> Callable[[tuple[Any, ...], int], tuple[Any, ...]]:
    """Token t stands at the start position, argument number `at`, plus t."""
    return lambda a, t: (_row(a[0], t), *a[1:at], a[at] + t)


PER_TOKEN: tuple[tuple[Case, Callable[[tuple[Any, ...], int], tuple[Any, ...]]], ...] = (
    (Quantize(7, 1024, "q8_k"), _first),
    (Quantize(7, 1024, "q16_k"), _first),
    (RmsNorm(7, 100), _first),
    (RmsNormQuantize(7, 768, "q8_k"), _first),
    (RmsNormQuantize(7, 768, "q16_k", "nonfinite"), _first),
    (RouterLogits(7, 12, 512, "outlier"), _first),
    (Route(7, 128, 8), _first),
    (Argmax(7, 257), _first),
    (Swiglu(7, 100), _first_and_second),
    (SwigluQuantize(7, 512, "q8_k"), _first_and_second),
    (Add(7, 100), _first_and_second),
    (Embed(7, 48, 512, "Q4_K"), lambda a, t: (a[0], _row(a[1], t))),
    (Matmul(7, 48, 512, "Q4_K", "q8_k"), lambda a, t: (a[0], _acts(a[1], t))),
    (Matmul(7, 48, 512, "Q6_K", "q16_k"), lambda a, t: (a[0], _acts(a[1], t))),
    (Combine(7, 3, 100), lambda a, t: (_row(a[0], t, a[1].shape[1]), _row(a[1], t))),
    (QkNormRope(7, 8, 128, 5), _shifted(4)),
    (Attend(7, 8, 2, 64, 255), _shifted(2)),
)  # fmt: skip


@pytest.mark.parametrize(("case", "token"), PER_TOKEN, ids=[f"{case.op}-{case}" for case, _ in PER_TOKEN])
def test_one_token_alone_equals_itself_in_a_batch(
    case: Case,
    token: Callable[[tuple[Any, ...], int], tuple[Any, ...]],
    device: torch.device,
    same: Callable[..., None],
) -> None:
    together = kernel_output(case, device)
    alone = [kernel_output(case, device, token(case.arguments(), t)) for t in range(case.rows)]
    joined = {name: np.concatenate([a[name] for a in alone], axis=_token_axis(name)) for name in together}
    same(joined, together, f"{case.op} {case}")


def _token_axis(name: str) -> int:
    return 1 if name in ("q", "group_sum") else 0


@pytest.mark.parametrize("side", ["up", "down"])
def test_one_routed_token_alone_equals_itself_in_a_batch(
    side: str, device: torch.device, same: Callable[..., None]
) -> None:
    case = GroupedMatmul(7, 5, 3, 48, 256, "Q4_K", "q8_k", "even", side)
    weight, x, rows, per = case.arguments()
    together = kernel_output(case, device)["out"]
    expert = np.searchsorted(rows.offset, np.argsort(rows.order), side="right") - 1
    for t in range(case.T):
        mine = expert.reshape(case.T, case.A)[t : t + 1].astype(np.int32)
        alone = kernel_output(case, device, (weight, _acts(x, t, case.A // per), grouped(mine, case.E), per))["out"]
        same({"out": alone}, {"out": together[t * case.A : (t + 1) * case.A]}, f"token {t}")


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_prompt_in_chunks_attends_as_in_one(chunk: int, device: torch.device, same: Callable[..., None]) -> None:
    case = Attend(7, 8, 2, 64, 255)
    q, kv, start = case.arguments()
    parts = [
        kernel_output(case, device, (np.ascontiguousarray(q[t : t + chunk]), kv, start + t))["out"]
        for t in range(0, case.T, chunk)
    ]
    same({"out": np.concatenate(parts)}, kernel_output(case, device), f"chunks of {chunk}")


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_prompt_in_chunks_fills_the_cache_as_in_one(
    chunk: int, device: torch.device, same: Callable[..., None]
) -> None:
    case = Append(7, 3, 128, 1)
    k, v, kv, start = case.arguments()
    for t in range(0, case.T, chunk):
        part = slice(t, t + chunk)
        kv = type(kv)(*kernel_output(case, device, (k[part].copy(), v[part].copy(), kv, start + t)).values())
    same(kv._asdict(), reference_output(case), f"chunks of {chunk}")
