"""The catalogue of whole-model faults: every one is named, every control is clean, and bits see more than the rest."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from exactmoe.kernels.errors import InvalidInput
from exactmoe.model.gguf.reader import open_gguf
from exactmoe.model.tiny.evaluate import MODEL
from exactmoe.model.tokenizer import load_tokenizer
from exactmoe.parity.faults.catalogue_model import MODEL_FAULTS, find, prepared
from exactmoe.parity.faults.plant import Fault, planted
from exactmoe.parity.faults.power import METRICS, detected
from exactmoe.parity.faults.score import TOKENS, Score, markdown, score, table
from exactmoe.parity.html.score import render_score


@pytest.fixture(scope="module")
def result() -> Score:
    file = open_gguf(MODEL)
    text = MODEL.with_name("prompt.txt").read_text(encoding="utf-8")
    return score(file, load_tokenizer(file).encode(text, add_special_tokens=False).ids[:TOKENS])


def test_every_fault_is_named_to_its_stage_expert_and_block_and_every_control_is_clean(result: Score) -> None:
    assert [row.fault for row in result.rows] == [fault.name for fault in MODEL_FAULTS]
    wrong = [
        (row.fault, row.planted, row.named, row.expert_or_block, row.control_clean)
        for row in result.rows
        if not row.right
    ]
    assert not wrong
    assert result.perfect


def test_no_bisection_runs_more_passes_than_the_logarithm_of_the_stages(result: Score) -> None:
    assert {row.most_passes for row in result.rows} == {8}  # 87 stages: ceil(log2 87) + 1
    assert all(1 <= row.passes <= 8 for row in result.rows)
    assert max(row.passes for row in result.rows) > 3  # late stages take more than one look


def test_only_bits_detect_every_fault(result: Score) -> None:
    n = len(result.rows)
    power = result.power()
    assert power["bits"] == (n, n)
    assert set(power) == set(METRICS)
    assert all(stage < n for name, (stage, _) in power.items() if name != "bits")


def test_the_readme_has_this_score(result: Score) -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    assert markdown(result) in readme


def test_the_page_says_of_every_fault_what_each_metric_saw(result: Score) -> None:
    page = render_score(result)
    lines = [line for line in page.split("<tr>") if '<td class="tag">' in line]
    assert len(lines) == len(result.rows)
    for row, line in zip(result.rows, lines, strict=True):
        assert f">{row.fault}</th>" in line
        cells = [cell.split("</td>")[0] for cell in line.split('<td class="tag">')[1:]]
        stage, logits = row.stage_metrics.values(), row.logit_metrics.values()
        assert [["apart" not in half for half in cell.split(" / ")] for cell in cells] == [
            list(pair) for pair in zip(stage, logits, strict=True)
        ]
    assert "://" not in page
    assert "<script" not in page


def test_a_score_of_nothing_is_not_perfect() -> None:
    assert not Score((), 0.0).perfect


def test_one_miss_spoils_the_score_and_shows_in_the_table(result: Score) -> None:
    from dataclasses import replace

    for change in ({"named": None}, {"named": "q, layer 0"}, {"expert_or_block": False}, {"control_clean": False}):
        spoilt = Score((*result.rows[1:], replace(result.rows[0], **change)), 1.0)
        assert not spoilt.perfect
        assert "NOT PERFECT" in table(spoilt)
    assert "SCORE: perfect" in table(result)


def test_the_markdown_has_the_counts(result: Score) -> None:
    text = markdown(result)
    n = len(result.rows)
    assert f"| caught | {n} of {n} |" in text
    assert f"| bits | {n} | {n} |" in text


def test_the_catalogue_is_large_enough_and_its_names_are_unique() -> None:
    assert len(MODEL_FAULTS) >= 30
    assert max(Counter(fault.name for fault in MODEL_FAULTS).values()) == 1
    assert sum(fault.expert or fault.block is not None for fault in MODEL_FAULTS) >= 5


def test_an_unknown_fault_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidInput, match="approximate-exp"):
        find("no-such-fault")


def test_a_fault_is_refused_in_a_layer_there_is_not() -> None:
    file = open_gguf(MODEL)
    for name, layer in (("approximate-exp", 4), ("approximate-exp", -1), ("final-norm-divides", 0)):
        with (
            pytest.raises(InvalidInput, match="cannot be planted in layer"),
            prepared(find(name), file, [1], "q8_k", layer=layer),
        ):
            pass


def test_a_fault_planted_in_one_layer_is_gone_afterwards() -> None:
    from exactmoe.parity.reference import combine, traced

    before = (combine.combine, traced.combine, traced._attention, traced._moe)
    fault = find("top-expert-dropped").plant
    assert isinstance(fault, Fault)
    with planted(fault, 1):
        assert traced.combine is not before[1]
    assert (combine.combine, traced.combine, traced._attention, traced._moe) == before


def test_the_metrics_pass_equal_arrays_and_detect_a_nan() -> None:
    x = np.float32([1.0, -2.0, 0.0, -np.inf])
    assert not any(detected(x, x.copy()).values())
    y = x.copy()
    y[0] = np.nan
    assert all(detected(x, y).values())


def test_ids_off_by_one_pass_a_cosine() -> None:
    ids = np.array([[90, 17], [64, 33]], np.int32)
    found = detected(ids, ids + 1)
    assert not found["cosine 0.999"]
    assert found["bits"]


def test_arrays_that_cannot_be_judged_are_refused() -> None:
    with pytest.raises(InvalidInput):
        detected(np.zeros(0, np.float32), np.zeros(0, np.float32))
