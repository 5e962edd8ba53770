"""Bisection on known faults: what it answers, what it counts, and what it will not say."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from exactmoe.kernels.errors import InvalidInput
from exactmoe.model.gguf.reader import GGUFFile, open_gguf
from exactmoe.model.stages import keys
from exactmoe.parity.bisect.search import CLEAN, HIDDEN, INHERITED, MADE_HERE, bisect
from exactmoe.parity.bisect.suspects import user_op
from exactmoe.parity.faults.catalogue import FAULTS
from exactmoe.parity.faults.catalogue_model import _Faulty, find, prepared
from exactmoe.parity.load import reference_weights
from exactmoe.parity.steps import ReferenceSteps

TOKENS = [3, 141, 59, 26, 5, 300, 17, 88]


@pytest.fixture(scope="module")
def file(model_file: Path) -> GGUFFile:
    return open_gguf(model_file)


@pytest.fixture
def reference(file: GGUFFile) -> ReferenceSteps:
    return ReferenceSteps(reference_weights(file), "q8_k")


def test_the_reference_against_itself_is_clean_after_every_stage_was_compared(file: GGUFFile, reference) -> None:
    found = bisect(reference, ReferenceSteps(reference.weights, "q8_k"), file, TOKENS)
    assert found.clean
    assert found.compared == found.stages == len(keys(2))
    assert found.passes <= found.most_passes == 7  # ceil(log2 45) + 1
    assert all(equal for *_, equal in found.probes)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_fault_is_named_in_the_layer_it_is_planted_in(file: GGUFFile, layer: int) -> None:
    with prepared(find("combine-contracted"), file, TOKENS, "q8_k", layer=layer) as pair:
        found = bisect(pair.reference, pair.suspect, file, TOKENS)
    assert (found.stage, found.layer) == ("moe_ffn_out", layer)
    assert found.origin is not None and found.origin.verdict == MADE_HERE
    assert found.origin.inputs_equal and found.origin.reference_on_suspect and not found.origin.suspect_on_reference


@pytest.mark.parametrize("profile", ["q8_k", "q16_k"])
def test_a_spoilt_block_is_named_with_its_bytes_in_the_file(file: GGUFFile, profile: str) -> None:
    with prepared(find("one-wrong-sub-scale"), file, TOKENS, profile) as pair:
        found = bisect(pair.reference, pair.suspect, file, TOKENS)
    place, spot = found.place, pair.spot
    assert place is not None
    assert (place.tensor, place.quant_type) == ("blk.0.ffn_up_exps.weight", "Q4_K")
    assert (place.experts, place.row, place.block, place.alone) == ((spot.expert,), spot.row, spot.block, True)
    info = file.tensors["blk.0.ffn_up_exps.weight"]
    assert info.shape == (4, 256, 256)
    begin = info.offset + (spot.expert * 256 + spot.row) * 144
    assert place.bytes == (begin, begin + 144)
    assert place.resident is not None
    assert place.resident.startswith(f"expert {spot.expert}, row {spot.row}, block 0, byte 4: ")


def test_a_stage_after_the_fault_is_called_inherited(file: GGUFFile) -> None:
    with prepared(find("eps-outside-the-root"), file, TOKENS, "q8_k", layer=0) as pair:
        found = bisect(pair.reference, pair.suspect, file, TOKENS, stage=("attn_out", 0))
    assert found.origin is not None and found.origin.verdict == INHERITED
    assert (found.stage, found.layer, found.passes) == ("attn_out", 0, 2)


def test_a_stage_before_the_fault_is_clean(file: GGUFFile) -> None:
    with prepared(find("approximate-exp"), file, TOKENS, "q8_k", layer=1) as pair:
        found = bisect(pair.reference, pair.suspect, file, TOKENS, stage=("attn_out", 0))
    assert found.clean
    assert found.compared == 1
    assert CLEAN in found.sentence


def test_what_a_single_stage_does_not_show_is_called_hidden(file: GGUFFile, reference) -> None:
    class Racy(ReferenceSteps):
        """Wrong in a whole pass, right alone: as scratch memory that another launch writes."""

        def trace(self, past, tokens, plan):
            stages = super().trace(past, tokens, plan)
            if ("q", 1) in stages:
                stages["q", 1] = stages["q", 1] + np.float32(1)
            return stages

    found = bisect(reference, Racy(reference.weights, "q8_k"), file, TOKENS)
    assert (found.stage, found.layer) == ("q", 1)
    assert found.origin is not None and found.origin.verdict == HIDDEN
    assert found.place is not None and found.place.block is None


def test_a_cache_before_the_pass_is_used(file: GGUFFile, reference) -> None:
    """A fault that forgets where the chunk starts is right for a prompt and wrong after it."""
    fault = next(f for f in FAULTS if f.name == "cache-always-from-zero")
    wrong = _Faulty(reference.weights, "q8_k", fault, 1)
    assert bisect(reference, wrong, file, TOKENS).clean
    found = bisect(reference, wrong, file, TOKENS[3:], past=TOKENS[:3])
    assert (found.stage, found.layer) == ("attn_scores", 1)
    assert found.place is not None and min(found.place.positions) >= 3


def test_a_suspect_that_keeps_less_than_it_was_asked_for_is_an_error(file: GGUFFile, reference) -> None:
    class Forgetful(ReferenceSteps):
        def trace(self, past, tokens, plan):
            return {key: value for key, value in super().trace(past, tokens, plan).items() if key[0] != "k"}

    with pytest.raises(InvalidInput, match="kept no k, layer 0"):
        bisect(reference, Forgetful(reference.weights, "q8_k"), file, TOKENS)


def test_no_token_is_refused(file: GGUFFile, reference) -> None:
    with pytest.raises(InvalidInput, match="nothing would be compared"):
        bisect(reference, reference, file, [])


def test_another_shape_is_a_difference_and_not_a_crash(file: GGUFFile, reference) -> None:
    class Short(ReferenceSteps):
        def trace(self, past, tokens, plan):
            return {k: v[:-1] if k == ("attn_norm", 0) else v for k, v in super().trace(past, tokens, plan).items()}

    found = bisect(reference, Short(reference.weights, "q8_k"), file, TOKENS)
    assert (found.stage, found.layer, found.clean) == ("attn_norm", 0, False)


@pytest.mark.parametrize(
    ("spec", "said"),
    [("nothing", "is none of"), ("route=", "is none of"), ("route=x.py", "is none of"), ("rout=x.py:f", "no op 'rout'"),
     ("route=/no/such.py:f", "no such file"), ("route=no.such.module:f", "cannot be imported"),
     ("route=math:pi", "cannot be called"), ("route=math:no", "has no 'no'")],
)  # fmt: skip
def test_a_suspect_that_names_nothing_is_refused(spec: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        user_op(spec)


def test_a_function_of_a_file_or_a_module_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(x):\n    return x\n")
    op, function = user_op(f"swiglu={tmp_path / 'mine.py'}:f")
    assert (op, function(3)) == ("swiglu", 3)
    assert user_op("add=operator:add")[1](2, 3) == 5
    (tmp_path / "broken.py").write_text("1/0\n")
    with pytest.raises(InvalidInput, match="ZeroDivisionError"):
        user_op(f"swiglu={tmp_path / 'broken.py'}:f")


def test_the_sentence_names_what_was_found(file: GGUFFile) -> None:
    with prepared(find("nan-in-one-expert"), file, TOKENS, "q8_k") as pair:
        found = bisect(pair.reference, pair.suspect, file, TOKENS, name="mine")
    assert found.sentence == (
        f"mine: first wrong stage moe_expert_gate, layer 0, made here, expert {pair.spot.expert}, row 37, block 0"
    )
    assert SimpleNamespace(**found.to_dict()).sentence == found.sentence
