"""Every plausible mistake in the catalogue is caught by a case of its op, and its planting alone changes nothing."""

from collections import Counter
from dataclasses import replace

import pytest

from exactmoe.kernels.errors import InvalidInput
from exactmoe.parity.bits import compare
from exactmoe.parity.cases import CASES, Case, cheap, reference_output
from exactmoe.parity.faults.catalogue import FAULTS
from exactmoe.parity.faults.plant import Fault, planted

CONTROLS = {(fault.op, fault.file): fault.control() for fault in FAULTS}


def _differs(fault: Fault, case: Case) -> bool:
    expected = reference_output(case)
    with planted(fault):
        found = reference_output(case)
    assert found.keys() == expected.keys()
    return not all(compare(name, found[name], expected[name], empty_allowed=True).equal for name in expected)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_caught_by_a_case_of_its_op(fault: Fault) -> None:
    assert any(_differs(fault, case) for case in cheap(fault.op)), f"no case of {fault.op} sees it: {fault.reason}"


@pytest.mark.parametrize("control", CONTROLS.values(), ids=[f"{op}-{file}" for op, file in CONTROLS])
def test_the_same_planting_without_a_fault_changes_no_case(control: Fault) -> None:
    cases = cheap(control.op)
    assert cases
    changed = [str(case) for case in cases if _differs(control, case)]
    assert not changed


def test_every_op_has_a_fault_and_every_fault_a_name_of_its_own() -> None:
    assert {fault.op for fault in FAULTS} == CASES.keys()
    assert max(Counter(fault.name for fault in FAULTS).values()) == 1


def test_a_fault_is_gone_after_its_block_even_after_an_error() -> None:
    fault, case = FAULTS[0], cheap(FAULTS[0].op)[-1]
    before = reference_output(case)
    with pytest.raises(RuntimeError, match="stop"), planted(fault):
        raise RuntimeError("stop")
    after = reference_output(case)
    assert all(compare(name, after[name], before[name]).equal for name in before)


@pytest.mark.parametrize("text", ["no such text", "np"])
def test_a_fault_whose_text_is_missing_or_ambiguous_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="its text stands"), planted(replace(FAULTS[0], right=text)):
        pass
