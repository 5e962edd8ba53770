import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch

from exactmoe.kernels.router import Routing
from exactmoe.parity.cases import CASES, cheap, kernel_output, reference_output
from exactmoe.parity.under_test import ParityCase, check, kernel_report

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLE = Path(__file__).parent / "example_my_add.py"

RIGHT = """
import pytest
from exactmoe.kernels.router import route

@pytest.mark.exactmoe("route", where=lambda case: case.T in (0, 7))
def test_my_router(parity_case):
    parity_case.check(route(**parity_case.inputs))
"""

WRONG = RIGHT.replace(
    "parity_case.check(",
    """weight, expert = route(**parity_case.inputs)
    bits = weight.clone().view(__import__("torch").int32)
    bits[-1:, -1] ^= 1
    parity_case.check((bits.view(weight.dtype), expert)) if len(bits) else parity_case.check(""",
)


@pytest.fixture
def run(pytester):
    def run(text, *arguments):
        pytester.makepyfile(test_planted=text)
        # by the name of its entry point: once, whether the package is installed or not
        options = ("-p", "exactmoe.parity.plugin", "-p", "no:cacheprovider", "--strict-markers", "-W", "error")
        return pytester.runpytest_inprocess(*options, *arguments)

    return run


def last(result):
    return [line for line in result.outlines if line.startswith("exactmoe:")]


def test_a_right_kernel_is_green_and_what_was_compared_is_counted(run):
    result = run(RIGHT)
    cases = [case for case in cheap("route") if case.T in (0, 7)]
    result.assert_outcomes(passed=len(cases))
    assert result.ret == 0
    elements = sum(array.size for case in cases for array in reference_output(case).values())
    outputs = 2 * sum(case.T > 0 for case in cases)
    assert last(result) == [
        f"exactmoe: {outputs} outputs and {elements} elements of {len(cases)} tests compared, all equal"
    ]


def test_one_flipped_bit_is_red_with_its_coordinate_and_both_values(run):
    result = run(WRONG)
    assert result.ret == 1
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.re_match_lines(
        [
            r".*AssertionError: not what the reference gives:",
            r".*route T7-E128-A8 weight: 1 of 56 differ, 1 ULP at worst; "
            r"first \(6, 7\): 0\.\d+ 0x[0-9a-f]{8} != 0\.\d+ 0x[0-9a-f]{8}",
            r"exactmoe: .* 1 not equal",
        ]
    )


def example():
    """The text of the example, kept to the cases that the interpreter is quick at."""
    text = EXAMPLE.read_text()
    assert '("add")' in text
    return text.replace('("add")', '("add", where=lambda case: case.T < 200)')


def test_the_example_is_green_in_a_process_of_its_own_and_says_what_it_compared(pytester, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    pytester.makepyfile(test_example=example())
    result = pytester.runpytest_subprocess("-p", "exactmoe.parity.plugin", "-p", "no:cacheprovider", "-W", "error")
    assert result.ret == 0
    cases = [case for case in CASES["add"] if case.T < 200]
    assert last(result)[0].endswith(f"elements of {len(cases)} tests compared, all equal")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("tl.load(a + i, i < N) + tl.load(b + i, i < N)", "tl.load(a + i, i < N) - tl.load(b + i, i < N)"),
        ("triton.cdiv(y.numel(), 1024)", "max(y.numel() // 1024, 1)"),
        ("i < N) + tl.load(b + i, i < N)", "i < N) + tl.load(b + i, i < N) * 1.0000001"),
    ],
)
def test_the_example_with_a_mistake_in_it_is_red(run, right, wrong):
    text = example()
    assert right in text
    result = run(text.replace(right, wrong))
    assert result.ret == 1
    assert "not equal" in last(result)[0]


def test_a_test_that_compares_nothing_fails(run):
    result = run(RIGHT.replace("parity_case.check(route(**parity_case.inputs))", "pass"))
    assert result.ret == 1
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*was given parity_case and compared nothing"])
    assert "nothing was compared, which is a failure" in last(result)[1]


def test_a_run_that_compared_only_empty_outputs_fails(run):
    result = run(RIGHT.replace("in (0, 7)", "== 0"))
    result.assert_outcomes(passed=1)
    assert result.ret == 1
    assert "nothing was compared, which is a failure" in last(result)[1]


def test_a_run_in_which_every_comparison_was_skipped_fails(run):
    result = run(RIGHT.replace("parity_case.check(route(**parity_case.inputs))", "pytest.skip('later')"))
    result.assert_outcomes(skipped=2)
    assert result.ret == 1


def test_a_run_without_such_tests_is_left_alone(run):
    result = run("def test_other():\n    pass\n")
    assert result.ret == 0
    assert last(result) == []


@pytest.mark.parametrize(
    ("marker", "said"),
    [
        ("", "parity_case needs the marker exactmoe with one op"),
        ("@pytest.mark.exactmoe()", "parity_case needs the marker exactmoe with one op"),
        ("@pytest.mark.exactmoe('route', were=1)", "parity_case needs the marker exactmoe with one op"),
        ("@pytest.mark.exactmoe('routes')", "no op 'routes' has cases; those are add, append, argmax"),
        ("@pytest.mark.exactmoe('route', where=lambda case: False)", "no case of route is left to compare"),
    ],
)
def test_a_marker_that_gives_no_cases_is_an_error(run, marker, said):
    result = run(f"import pytest\n{marker}\ndef test_it(parity_case):\n    pass\n")
    assert result.ret == 2
    result.stdout.fnmatch_lines([f"*{said}*"])


def test_data_of_ones_own_is_compared_and_reported_too(run, pytester):
    text = """
import numpy as np
def test_same(parity_check):
    parity_check(np.ones(3, np.float32), np.ones(3, np.float32))
def test_other(parity_check):
    parity_check((np.ones(2), np.ones(2)), (np.ones(2), np.zeros(2)), "pair")
def test_close(parity_check):
    parity_check(np.ones(2), np.ones(2) + 1e-9, atol=1e-6)
def test_forgets(parity_check):
    pass
"""
    result = run(text, "--exactmoe-report", "found.json")
    result.assert_outcomes(passed=2, failed=2)
    found = json.loads((pytester.path / "found.json").read_text())
    assert [(row["stage"], row["verdict"]) for row in found["rows"]] == [
        ("test_same out", "match"),
        ("test_other pair out0", "match"),
        ("test_other pair out1", "differ"),
        ("test_close out", "match"),
        ("test_forgets", "missing"),
    ]
    assert any("match within atol=1e-06" in note for note in found["notes"])
    assert found["verdict"] == "not equal"


WORKERS = ("-n", "2", "--dist", "load", "--maxschedchunk", "1")  # neighbours go to different workers
EVERY_KIND = """
import numpy as np
import pytest
@pytest.mark.exactmoe("swiglu", where=lambda case: case.gpu or case.rows < 3)
def test_cases(parity_case):
    parity_case.check(parity_case.reference)
@pytest.mark.parametrize("n", range(20))
def test_ones(parity_check, n):
    parity_check(np.ones(n), np.ones(n) + (n == 13))
def test_in_parts(parity_check):
    parity_check((np.ones(2), np.ones(2)), (np.ones(2), np.ones(2)), "first")
    parity_check(np.ones(2), np.ones(2), "then")
@pytest.fixture
def early(parity_check):
    parity_check(np.ones(3), np.ones(3), "in a fixture")
def test_forgets(early):
    pass
def test_breaks(parity_check):
    raise OSError
"""


def test_workers_compare_what_one_process_compares_and_report_it_in_the_same_order(run, pytester):
    alone = run(EVERY_KIND, "--exactmoe-report", "alone.json")
    workers = run(EVERY_KIND, "--exactmoe-report", "workers.json", *WORKERS)
    assert "2 workers" in workers.stdout.str()
    assert workers.ret == alone.ret == 1
    assert last(workers) == last(alone)
    assert "cases left out, too large" in last(alone)[-1]
    rows = json.loads((pytester.path / "alone.json").read_text())["rows"]
    assert len(rows) > 24 and rows[-1]["verdict"] == "missing"
    assert (pytester.path / "workers.json").read_text() == (pytester.path / "alone.json").read_text()


def test_workers_that_compared_nothing_fail_and_those_that_compared_something_do_not(run):
    result = run(RIGHT.replace("in (0, 7)", "== 0"), *WORKERS)
    result.assert_outcomes(passed=1)
    assert result.ret == 1
    assert "nothing was compared, which is a failure" in last(result)[1]
    result = run(RIGHT, *WORKERS)  # one worker has the case without elements
    assert result.ret == 0
    assert "of 2 tests compared, all equal" in last(result)[0]


def test_the_report_is_written_as_its_ending_says(run, pytester):
    assert run(WRONG, "--exactmoe-report", "found.xml").ret == 1
    (suite,) = ET.parse(pytester.path / "found.xml").getroot()
    cases = suite.findall("testcase")
    assert [len(case) for case in cases] == [1, 0]
    assert cases[0][0].text.startswith("first (6, 7): ")
    assert run(RIGHT, "--exactmoe-report", "found.html").ret == 0
    page = (pytester.path / "found.html").read_text()
    assert "<strong>Equal</strong>" in page
    assert "route T7-E128-A8 expert" in page


def test_a_report_of_a_run_that_broke_before_comparing_is_not_equal(run, pytester):
    broken = RIGHT.replace("parity_case.check(", "raise OSError(").replace("== 7", ">= 0")
    assert run(broken, "--exactmoe-report", "found.json").ret == 1
    found = json.loads((pytester.path / "found.json").read_text())
    assert found["verdict"] == "not equal"
    assert {row["verdict"] for row in found["rows"]} == {"missing"}


def test_a_report_of_another_ending_is_refused(run):
    result = run(RIGHT, "--exactmoe-report", "found.txt")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*--exactmoe-report found.txt: must end in one of .html, .xml, .json"])


def test_loading_the_plugin_loads_neither_torch_nor_numpy():
    code = "import sys, exactmoe.parity.plugin; print([m for m in ('torch', 'triton', 'numpy') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


SMALLEST = [min((case for case in cases if case.rows), key=lambda case: case.cost) for cases in CASES.values()]


@pytest.mark.parametrize("case", SMALLEST, ids=lambda case: case.op)
def test_inputs_go_to_an_op_of_ours_by_name(case, device):
    from importlib import import_module

    rows = []
    given = ParityCase(case, rows.append)
    op = getattr(import_module(f"exactmoe.kernels.{case.module}"), case.op)
    output = op(**given.inputs)
    given.check(output)
    assert [row.count for row in rows] == [array.size for array in given.reference.values()]
    assert all(row.passed for row in rows)


ROUTE = next(case for case in cheap("route") if case.T == 7)


@pytest.fixture
def output():
    return reference_output(ROUTE)


def compared(output):
    rows = []
    ParityCase(ROUTE, rows.append).check(output)
    return [row.stage.split()[-1] for row in rows]


def test_an_output_may_be_a_mapping_a_named_tuple_or_a_sequence_of_arrays_or_tensors(output, device):
    parts = list(output.values())
    named = Routing(*(torch.from_numpy(part) for part in parts))
    for form in (output, named, parts, tuple(parts), dict(reversed(output.items())), kernel_output(ROUTE, device)):
        assert compared(form) == ["weight", "expert"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda parts: parts[:1], "1 outputs where the reference has 2: weight, expert"),
        (lambda parts: {"weight": parts[0]}, "expert: missing on the right"),
        (lambda parts: {"weight": parts[0], "expert": parts[1], "more": parts[1]}, "more: missing on the left"),
        (lambda parts: parts[0], "weight: missing on the right"),
        (lambda parts: Routing(torch.from_numpy(parts[0]), None), "expert: missing on the right"),
        (lambda parts: [parts[0], parts[1].astype(np.int64)], r"expert: int32 \[7, 8\] != int64 \[7, 8\]"),
        (lambda parts: [parts[0], parts[1][:0]], r"expert: int32 \[7, 8\] != int32 \[0, 8\]"),
        (lambda parts: [parts[0], 7], "an output must be a tensor or an array, got int"),
    ],
)
def test_an_output_of_another_form_is_red(output, change, said):
    with pytest.raises(AssertionError, match=said):
        compared(change(list(output.values())))


def test_nan_where_the_reference_has_nan_matches_and_elsewhere_does_not():
    nan = np.array([1, np.nan], np.float32)
    check("x", nan, nan.copy(), lambda row: None)
    with pytest.raises(AssertionError, match="NaN on one side only: 0 left, 1 right"):
        check("x", np.ones(2, np.float32), nan, lambda row: None)


def test_no_element_of_another_form_is_red():
    check("x", np.zeros((0, 8)), np.zeros((0, 8)), lambda row: None)
    with pytest.raises(AssertionError, match=r"float64 \[0, 8\] != float64 \[0, 9\]"):
        check("x", np.zeros((0, 8)), np.zeros((0, 9)), lambda row: None)


def test_a_report_of_nothing_is_not_equal():
    assert not kernel_report([]).equal
