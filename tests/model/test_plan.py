"""What a selection of stages, layers, positions and experts may say, and what it then selects."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exactmoe.kernels.errors import InvalidInput
from exactmoe.model.plan import SaveTensorPlan, parse_numbers, parse_stages
from exactmoe.model.stages import STAGES, WHOLE_MODEL, keys

NAMES = [stage.name for stage in STAGES]
SIZES = {"n_layers": 4, "n_positions": 10, "n_experts": 6}


def test_all_stages_of_all_layers_are_every_key_in_canonical_order() -> None:
    plan = SaveTensorPlan.parse("all", **SIZES)
    assert plan.selected() == keys(4)
    assert (plan.positions, plan.experts) == (None, None)


def test_names_are_read_in_any_case_with_spaces_and_without_repeats() -> None:
    assert parse_stages(" MoE_Router , q,Q ") == ("moe_router", "q")
    assert SaveTensorPlan.parse("moe_router, Q", "1", **SIZES).selected() == [("q", 1), ("moe_router", 1)]


def test_layer_output_is_the_residual_after_the_experts() -> None:
    assert parse_stages("Layer_Output") == ("post_ffn_residual",)


@pytest.mark.parametrize("text", ["", ",", "q,", "moe_rooter", "all,q", "moe router"])
def test_a_stage_that_there_is_not_is_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse_stages(text)
    if "all" not in text:
        assert all(name in str(refused.value) for name in NAMES)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("all", range(10)), ("ALL ", range(10)), ("3", [3]), ("0..4", [0, 1, 2, 3]), ("0,5,7..9", [0, 5, 7, 8]),
     ("last", [9]), ("8..last", [8]), (" 2 , 1 , 2 ", [1, 2])],
)  # fmt: skip
def test_numbers_and_ranges_without_their_end(text: str, numbers: list[int]) -> None:
    assert parse_numbers(text, "position", 10) == tuple(numbers)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "''"), ("x", "'x'"), ("-1", "'-1'"), ("1..", "'1..'"), ("..2", "'..2'"), ("4..4", "4..4 is empty"),
     ("5..3", "5..3 is empty"), ("10", "reaches position 10, the last is 9"), ("0..11", "reaches position 10"),
     ("1,,2", "''"), ("1.5", "'1.5'"), ("²", "'²'"), ("1..2..3", "'1..2..3'")],
)  # fmt: skip
def test_what_is_no_number_of_the_range_is_refused_by_name(text: str, said: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse_numbers(text, "position", 10)
    assert said in str(refused.value)


def test_last_is_a_position_only() -> None:
    with pytest.raises(InvalidInput, match="layers 'last'"):
        parse_numbers("last", "layer", 4)


@given(st.sets(st.integers(0, 30), min_size=1))
def test_any_set_of_numbers_survives_being_written_and_read(numbers: set[int]) -> None:
    assert parse_numbers(",".join(map(str, numbers)), "layer", 31) == tuple(sorted(numbers))


@given(st.integers(0, 30), st.integers(1, 31))
def test_a_range_selects_what_python_does(first: int, end: int) -> None:
    if first < end:
        assert parse_numbers(f"{first}..{end}", "layer", 31) == tuple(range(first, end))
    else:
        with pytest.raises(InvalidInput):
            parse_numbers(f"{first}..{end}", "layer", 31)


def test_a_plan_made_by_hand_is_held_to_the_same_rules() -> None:
    plan = SaveTensorPlan(("lm_head", "q"), (2, 0, 2), (3, 1), None, Path("out"))
    assert plan.stages == ("q", "lm_head")
    assert (plan.layers, plan.positions) == ((0, 2), (1, 3))
    assert plan.selected() == [("q", 0), ("q", 2), ("lm_head", WHOLE_MODEL)]
    for wrong in [((), (0,)), (("qq",), (0,)), (("q",), ()), (("q",), (-1,)), (("q",), (0,), ()), (("q",), (0,), (-2,)),
                  (("q",), (0,), None, ())]:  # fmt: skip
        with pytest.raises(InvalidInput):
            SaveTensorPlan(*wrong)


def test_stages_of_the_whole_model_need_no_layer() -> None:
    assert SaveTensorPlan(("lm_head",), ()).selected() == [("lm_head", WHOLE_MODEL)]


def test_a_plan_wants_what_it_selects_and_nothing_else() -> None:
    plan = SaveTensorPlan.parse("q,embedding", "1..3", **SIZES)
    assert [key for key in keys(4) if plan.wants(*key)] == plan.selected() == [("embedding", -1), ("q", 1), ("q", 2)]
