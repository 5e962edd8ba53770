"""A pass made of single steps is the traced pass, on both sides; and the graph names what each step reads."""

from pathlib import Path

import numpy as np
import pytest
import torch

from exactmoe.kernels.errors import InvalidInput
from exactmoe.model.gguf.reader import GGUFFile, open_gguf
from exactmoe.model.stages import STAGES, WHOLE_MODEL, keys
from exactmoe.model.weights import load_model
from exactmoe.parity.bits import compare
from exactmoe.parity.graph import NODES, inputs, parse_stage, tensor_name
from exactmoe.parity.load import reference_weights
from exactmoe.parity.steps import ReferenceSteps, Steps, TritonSteps, load_steps

TOKENS = [3, 141, 59, 26, 5]
PAST = [7, 8]


class Everything:
    def wants(self, stage: str, layer: int) -> bool:
        return True


@pytest.fixture(scope="module")
def file(model_file: Path) -> GGUFFile:
    return open_gguf(model_file)


@pytest.fixture(scope="module")
def reference(file: GGUFFile) -> ReferenceSteps:
    return ReferenceSteps(reference_weights(file), "q8_k")


def _each_step_makes_its_stage(steps: Steps, past: list[int]) -> None:
    stages = steps.trace(past, TOKENS, Everything())
    assert list(stages) == keys(2) or set(stages) == set(keys(2))
    for key in keys(2):
        found = steps.step(key, {k: stages[k] for k in inputs(*key, 2)}, past, TOKENS)
        assert compare(str(key), stages[key], found).equal


@pytest.mark.parametrize("past", [[], PAST], ids=["empty cache", "after two tokens"])
def test_each_step_of_the_reference_makes_its_stage_of_the_traced_pass(
    reference: ReferenceSteps, past: list[int]
) -> None:
    _each_step_makes_its_stage(reference, past)


def test_each_step_of_the_kernels_makes_its_stage_of_the_traced_pass(file: GGUFFile, device: torch.device) -> None:
    _each_step_makes_its_stage(TritonSteps(load_model(file, device, "q8_k")), PAST)


def test_every_stage_is_in_the_graph_and_reads_only_stages_before_it() -> None:
    assert set(NODES) == {stage.name for stage in STAGES}
    order = keys(3)
    for i, key in enumerate(order):
        assert all(order.index(read) < i for read in inputs(*key, 3))


def test_the_tensors_of_the_graph_are_the_files(file: GGUFFile) -> None:
    used = {tensor_name(*key) for key in keys(2)} - {None}
    assert used == set(file.tensors)


def test_resident_weights_are_the_files_bytes_on_both_sides(
    file: GGUFFile, reference: ReferenceSteps, device: torch.device
) -> None:
    triton = TritonSteps(load_model(file, device, "q8_k"))
    compared = 0
    for name, info in file.tensors.items():
        for side in (reference, triton):
            held = side.resident(name)
            if info.type_name == "F32":
                assert held is None
            else:
                np.testing.assert_array_equal(held, file.tensor(name))
                compared += 1
    assert compared == 2 * (2 + 7 * 2)  # embedding, output, and seven matrices a layer, on two sides


def test_production_gives_the_logits_of_the_traced_pass(reference: ReferenceSteps) -> None:
    logits = reference.trace([], TOKENS, Everything())["lm_head", WHOLE_MODEL][-1]
    assert compare("logits", reference.production(TOKENS), logits).equal


def test_an_unknown_backend_is_refused(file: GGUFFile) -> None:
    with pytest.raises(InvalidInput, match="got 'cuda'"):
        load_steps(file, "cuda", "q8_k", "auto")


@pytest.mark.parametrize(
    ("text", "key"), [("q@1", ("q", 1)), ("LM_head", ("lm_head", -1)), ("moe_ffn_out@0", ("moe_ffn_out", 0))]
)
def test_a_stage_is_named_with_its_layer(text: str, key: tuple[str, int]) -> None:
    assert parse_stage(text, 2) == key


@pytest.mark.parametrize("text", ["q", "q@2", "q@", "q@x", "qq@0", "lm_head@0", ""])
def test_a_stage_that_there_is_not_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_stage(text, 2)
