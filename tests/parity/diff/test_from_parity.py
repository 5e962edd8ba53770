from dataclasses import replace

import numpy as np
import pytest

from exactmoe.parity.bits import compare
from exactmoe.parity.diff.from_parity import report_of
from exactmoe.parity.diff.verdict import Verdict
from exactmoe.parity.html.page import render_report
from exactmoe.parity.junit import junit
from exactmoe.parity.report import Setting
from exactmoe.parity.run import Coverage, ParityResult, Schedule, ScheduleResult, Tally

X = np.ones((2, 3), np.float32)
SETTING = Setting("m.gguf", "ab" * 32, "numerics-v1 1.0.0", "q8_k", "an H100", {"torch": "2"})


def tally(name, left=X, right=X, layer=-1):
    made = Tally(name, layer)
    made.add("step 1", compare(name, left, right))
    return made


@pytest.fixture
def result():
    return ParityResult(
        tokens=(1, 2),
        steps=1,
        chosen=(3, 4),
        stages=(tally("embedding"), tally("q", layer=0), tally("q", layer=1)),
        caches=(tally("cache k", layer=0),),
        paths=(tally("next token"),),
        schedules=(ScheduleResult(Schedule("again", 2, 2), tally("again"), "main"),),
        coverage=Coverage(3, 3, 3, 3, (), ()),
        first=None,
        digest="all",
        run_digest="main",
        rope_digest="rope",
        nan_logits=0,
        seconds={},
    )


def test_an_equal_run_is_an_equal_report_of_all_it_compared(result):
    report = report_of(result, SETTING)
    assert result.equal
    assert report.equal
    assert [(row.stage, row.layer) for row in report.rows] == [
        ("embedding", -1), ("q", 0), ("q", 1), ("cache k", 0), ("next token", -1), ("again", -1),
    ]  # fmt: skip
    assert report.elements == 36
    assert "an H100" in render_report(report)


def changed(at, value):
    y = X.copy()
    y[at] = value
    return y


def test_the_place_of_a_difference_and_both_values_are_kept(result):
    wrong = tally("q", X, changed((1, 2), 2), layer=1)
    report = report_of(replace(result, stages=(*result.stages[:2], wrong)), SETTING)
    assert not report.equal
    assert str(report.first) == (
        "q, layer 1: 1 of 6 differ; step 1; first (1, 2) (step 1): 1.0 0x3f800000 != 2.0 0x40000000"
    )
    assert 'failures="1"' in junit(report)


@pytest.mark.parametrize(
    ("stage", "verdict"),
    [
        (tally("q", X, changed((0, 0), np.nan), layer=1), Verdict.NAN_RIGHT),
        (tally("q", changed((0, 0), np.nan), X, layer=1), Verdict.NAN_LEFT),
        (tally("q", X, X[:1], layer=1), Verdict.SHAPE),
        (tally("q", X[:0], X[:0], layer=1), Verdict.MISSING),
        (Tally("q", 1), Verdict.MISSING),
    ],
)
def test_what_does_not_pass_there_does_not_pass_here(result, stage, verdict):
    broken = replace(result, stages=(*result.stages[:2], stage))
    assert not broken.equal
    report = report_of(broken, SETTING)
    assert not report.equal
    assert report.first.verdict is verdict


def test_a_schedule_of_another_digest_is_the_row_that_does_not_pass(result):
    other = ScheduleResult(Schedule("again", 2, 2), tally("again"), "other")
    report = report_of(replace(result, schedules=(other,)), SETTING)
    assert [str(row) for row in report.failed] == ["again: digest other where the main run has main"]


@pytest.mark.parametrize(
    "change",
    [
        {"coverage": Coverage(3, 3, 2, 2, ("triton: q, layer 1",), ())},
        {"schedules": (ScheduleResult(Schedule("again", 2, 2), tally("again"), "other"),)},
        {"schedules": ()},
        {"caches": ()},
    ],
)
def test_a_run_that_fails_by_what_no_stage_shows_is_not_equal_either(result, change):
    broken = replace(result, **change)
    assert not broken.equal
    assert not report_of(broken, SETTING).equal
