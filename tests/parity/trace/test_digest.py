"""The tree of hashes: the same on both sides, small, and different wherever a stage is."""

import json
from pathlib import Path

import numpy as np
import pytest

from exactmoe.cli.main import main
from exactmoe.kernels.errors import InvalidInput
from exactmoe.model.gguf.reader import open_gguf
from exactmoe.model.plan import SaveTensorPlan
from exactmoe.model.stages import keys
from exactmoe.parity.load import reference_weights
from exactmoe.parity.steps import ReferenceSteps
from exactmoe.parity.trace.digest import DigestTree, Leaf, compare, digest_run, read_digest, tree_of

TOKENS = [3, 141, 59, 26, 5]
ALL = SaveTensorPlan.parse("all", n_layers=2, n_positions=5, n_experts=4)
HEADER = {"model_sha256": "ab", "numerics": "n", "activations": "q8_k", "tokens": TOKENS}


@pytest.fixture(scope="module")
def stages(model_file: Path):
    return ReferenceSteps(reference_weights(open_gguf(model_file)), "q8_k").trace((), TOKENS, ALL)


def tree(stages) -> DigestTree:
    return tree_of(HEADER, ((key, stages[key]) for key in keys(2)))


@pytest.mark.parametrize("profile", ["q8_k", "q16_k"])
def test_the_kernels_and_the_reference_have_one_root(model_file: Path, profile: str) -> None:
    file = open_gguf(model_file)
    left, right = (digest_run(file, TOKENS, ALL, backend, profile) for backend in ("reference", "triton"))
    assert left.root == right.root
    found = compare(left, right)
    assert found.equal
    assert (found.looked_at, found.stages) == (1, 45)


def test_a_run_hashes_what_a_trace_saves(model_file: Path, stages) -> None:
    assert digest_run(open_gguf(model_file), TOKENS, ALL, "reference").nodes == tree(stages).nodes


@pytest.mark.parametrize("key", [("q", 1), ("moe_router_indices", 0), ("lm_head", -1), ("attn_softmax", 1)])
def test_one_changed_row_changes_the_root_and_is_found(stages, key: tuple[str, int]) -> None:
    changed = dict(stages)
    changed[key] = stages[key].copy()
    changed[key].view(np.int32)[3].reshape(-1)[1] ^= 1
    left, right = tree(stages), tree(changed)
    assert left.root != right.root
    found = compare(left, right)
    assert found.leaves == (Leaf(*key, 3),)
    assert found.looked_at < 1 + 3 + 22 + 5 + 1  # the layers, one layer's stages, one stage's tokens


@pytest.mark.parametrize("what", ["rows", "signs", "pair", "layers"])
def test_exchanged_rows_flipped_signs_and_paired_changes_change_the_root(stages, what: str) -> None:
    changed = {key: value.copy() for key, value in stages.items()}
    x = changed["attn_out", 0].view(np.int32)
    match what:
        case "rows":
            x[[0, 1]] = x[[1, 0]]
        case "signs":
            x ^= -(2**31)
        case "pair":
            x[2, 7] += 1
            x[2, 9] -= 1
        case "layers":
            changed["attn_out", 0], changed["attn_out", 1] = changed["attn_out", 1], changed["attn_out", 0]
    assert tree(changed).root != tree(stages).root
    assert not compare(tree(stages), tree(changed)).equal


def test_a_stage_on_one_side_only_is_a_difference(stages) -> None:
    short = DigestTree(HEADER, tree(stages).nodes[:-1])
    assert compare(tree(stages), short).leaves == (Leaf("lm_head", -1, None),)


def test_trees_with_nothing_in_common_are_not_equal() -> None:
    empty = DigestTree(HEADER, ())
    assert not compare(empty, empty).equal


@pytest.mark.parametrize("field", ["model_sha256", "numerics", "activations", "tokens"])
def test_runs_that_cannot_be_compared_are_refused(stages, field: str) -> None:
    other = DigestTree({**HEADER, field: "other"}, tree(stages).nodes)
    with pytest.raises(InvalidInput, match=field.partition("_")[0]):
        compare(tree(stages), other)


def test_a_file_holds_kilobytes_and_reads_back(model_file: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "d.json"
    arguments = [
        "trace",
        str(model_file),
        "--tokens",
        "3,141,59,26,5",
        "--backend",
        "reference",
        "--digest",
        "-o",
        str(path),
    ]
    assert main(arguments) == 0
    found = read_digest(path)
    assert found.root in capsys.readouterr().out
    assert path.stat().st_size < 40_000
    assert len(found.nodes) == 45


@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda d: d["stages"][4]["tokens_hashes"].__setitem__(0, "0" * 16), "hash of"),
     (lambda d: d["layers"].clear(), "layer is"),
     (lambda d: d.__setitem__("root", "0"), "root is"), (lambda d: d.__setitem__("tokens", [1]), "root is"),
     (lambda d: d.__setitem__("format", 9), "format 9"), (lambda d: d.pop("stages"), "no digest file")],
)  # fmt: skip
def test_a_file_that_was_altered_is_refused(stages, change, said: str) -> None:
    held = json.loads(tree(stages).to_json())
    change(held)
    with pytest.raises(InvalidInput, match=said):
        DigestTree.from_json(json.dumps(held), "some.json")


def test_what_is_no_digest_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "x", tmp_path / "none", tmp_path):
        with pytest.raises(InvalidInput):
            read_digest(path)
    with pytest.raises(InvalidInput, match="no digest file"):
        DigestTree.from_json("[1]", "x")
