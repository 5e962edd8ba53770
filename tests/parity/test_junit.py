from xml.etree import ElementTree as ET

import numpy as np
import pytest

from exactmoe.parity.diff.diff import diff_arrays
from exactmoe.parity.diff.traces import DiffReport, Fact
from exactmoe.parity.junit import junit

ONES = np.ones((2, 3), np.float32)


def report(*rows, **stated):
    return DiffReport("diff of <two>", "a & b", "c\x00", "bit for bit", rows, **stated)


def parsed(found):
    return ET.fromstring(junit(found))


def test_every_stage_of_every_layer_is_a_test_case():
    other = ONES.copy()
    other[1, 2] = 2
    rows = [
        diff_arrays("embedding", ONES, ONES),
        diff_arrays("q", ONES, ONES, layer=0),
        diff_arrays("q", ONES, other, layer=1),
    ]
    root = parsed(report(*rows))
    (suite,) = root
    assert [root.attrib[k] for k in ("tests", "failures", "errors")] == ["3", "1", "0"]
    cases = suite.findall("testcase")
    assert [(c.get("classname"), c.get("name"), len(c)) for c in cases] == [
        ("model", "embedding", 0), ("layer 0", "q", 0), ("layer 1", "q", 1),
    ]  # fmt: skip
    failure = cases[2][0]
    assert (failure.get("type"), failure.get("message")) == ("differ", "1 of 6 differ, 8,388,608 ULP at worst")
    assert failure.text.startswith("first (1, 2): 1.0 0x3f800000 != 2.0 0x40000000\nmax abs 1, ")


@pytest.mark.parametrize(
    ("left", "right", "kind"), [(ONES, None, "missing"), (ONES[:0], ONES[:0], "missing"), (ONES, ONES[0], "shape")]
)
def test_what_was_not_compared_is_a_failure(left, right, kind):
    root = parsed(report(diff_arrays("q", left, right)))
    assert root.get("failures") == "1"
    assert root.find(".//failure").get("type") == kind


def test_a_report_without_stages_is_a_failure():
    root = parsed(report())
    assert (root.get("tests"), root.get("failures")) == ("1", "1")
    assert root.find(".//failure").get("message") == "nothing was compared"


def test_facts_are_properties_and_text_is_escaped():
    found = {
        p.get("name"): p.get("value") for p in parsed(report(facts=(Fact("device", "cpu", "gpu"),))).iter("property")
    }
    assert (found["left"], found["right"], found["device"]) == ("a & b", "c\ufffd", "cpu | gpu")
