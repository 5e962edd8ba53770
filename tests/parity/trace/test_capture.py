"""Capture: what a plan selects of a traced run, on both sides."""

from pathlib import Path

import numpy as np
import pytest

from exactmoe.kernels.errors import InvalidInput
from exactmoe.model.gguf.reader import open_gguf
from exactmoe.model.plan import SaveTensorPlan
from exactmoe.model.stages import keys
from exactmoe.parity.bits import compare
from exactmoe.parity.load import reference_weights
from exactmoe.parity.reference.kv_cache import KVCache
from exactmoe.parity.reference.traced import forward_traced
from exactmoe.parity.trace.capture import capture, margin_ulp, select
from exactmoe.parity.trace.folder import open_trace

TOKENS = [3, 141, 59, 26, 5]


def plan(
    folder: Path, stages: str = "all", layers: str = "all", positions: str | None = None, experts: str | None = None
):
    return SaveTensorPlan.parse(
        stages, layers, positions, experts, n_layers=2, n_positions=len(TOKENS), n_experts=4, output_dir=folder
    )


@pytest.fixture(scope="module")
def stages(model_file: Path):
    weights = reference_weights(open_gguf(model_file))
    return forward_traced(weights, KVCache.allocate(weights.dims, len(TOKENS)), TOKENS, "q8_k").stages


def test_both_backends_save_every_stage_with_the_same_bits(model_file: Path, tmp_path: Path, stages) -> None:
    for backend in ("reference", "triton"):
        found = capture(open_gguf(model_file), TOKENS, plan(tmp_path / backend), backend)
        trace = open_trace(tmp_path / backend)
        assert trace.keys() == keys(2)
        for key in keys(2):
            assert compare(str(key), trace.read(*key), stages[key]).equal
        assert trace.manifest.tokens == tuple(TOKENS)
        assert trace.manifest.backend == backend
        assert found.bytes == sum(stages[key].nbytes for key in keys(2))


def test_positions_are_cut_out_and_named(model_file: Path, tmp_path: Path, stages) -> None:
    trace = capture(open_gguf(model_file), TOKENS, plan(tmp_path / "t", "q,lm_head", "1", "1,last"), "reference").trace
    assert trace.keys() == [("q", 1), ("lm_head", -1)]
    np.testing.assert_array_equal(trace.positions, [1, 4])
    np.testing.assert_array_equal(trace.read("q", 1), stages["q", 1][[1, 4]])


def test_experts_keep_their_rows_with_coordinates(model_file: Path, tmp_path: Path, stages) -> None:
    ids = stages["moe_router_indices", 1]
    expert = int(ids[2, 0])
    chosen = plan(tmp_path / "t", "moe_expert_out,moe_router", "1", "0..4", str(expert))
    trace = capture(open_gguf(model_file), TOKENS, chosen, "reference").trace
    rows = trace.rows("moe_expert_out", 1)
    assert rows is not None and len(rows) > 0
    expected = [(t, r, expert) for t in range(4) for r in range(2) if ids[t, r] == expert]
    assert [tuple(row) for row in rows.tolist()] == expected
    values = trace.read("moe_expert_out", 1)
    for (t, rank, _), value in zip(expected, values, strict=True):
        np.testing.assert_array_equal(value, stages["moe_expert_out", 1][t, rank])
    assert trace.read("moe_router", 1).shape == (4, 2)  # the others are whole


def test_the_margin_is_the_distance_of_the_last_choice_to_the_next(tmp_path: Path, model_file: Path, stages) -> None:
    trace = capture(open_gguf(model_file), TOKENS, plan(tmp_path / "t", "moe_router", "0"), "reference").trace
    assert trace.keys() == [("moe_router", 0)]
    logits = np.sort(stages["moe_router_logits", 0], axis=1)[:, ::-1]
    for found, row in zip(trace.margin_ulp(0), logits, strict=True):
        steps, at = 0, row[2]
        if found < 10_000:  # walked one number at a time
            while at < row[1]:
                at, steps = np.nextafter(at, np.float32(np.inf)), steps + 1
            assert found == steps
        assert found > 0


def test_margins_of_known_rows() -> None:
    one = np.float32(1)
    below = np.nextafter(one, np.float32(0))
    rows = np.array([[one, below, -5, -9], [0.0, -0.0, -1, -2], [np.nan, 0, 1, 2]], np.float32)
    np.testing.assert_array_equal(margin_ulp(rows, 1), [1, 0, -1])
    np.testing.assert_array_equal(margin_ulp(rows, 4), [2**32] * 3)


def test_a_stage_the_pass_did_not_keep_is_an_error(stages) -> None:
    short = {key: value for key, value in stages.items() if key != ("q", 1)}
    with pytest.raises(InvalidInput, match="stage q of layer 1 was asked for"):
        list(select(short, plan(Path("unused")), 2))


def test_a_plan_without_a_folder_is_refused(model_file: Path) -> None:
    with pytest.raises(InvalidInput, match="no output_dir"):
        capture(open_gguf(model_file), TOKENS, SaveTensorPlan(("q",), (0,)), "reference")


def test_a_plan_changes_no_kept_bit_and_keeps_nothing_else(model_file: Path, stages) -> None:
    weights = reference_weights(open_gguf(model_file))
    cache = KVCache.allocate(weights.dims, len(TOKENS))
    some = plan(Path("unused"), "moe_router,k", "1")
    kept = forward_traced(weights, cache, TOKENS, "q8_k", some).stages
    assert kept.keys() == {("moe_router", 1), ("k", 1)}
    for key, value in kept.items():
        assert compare(str(key), value, stages[key]).equal
