"""trace-moe-gpu-sub-stages-v1: the names, what capturing them leaves alone, and NaN planted in each of them."""

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from exactmoe.cli.main import main
from exactmoe.kernels.launch import resolve_device
from exactmoe.model.cache import KVCache
from exactmoe.model.gguf.reader import GGUFFile, open_gguf
from exactmoe.model.plan import SaveTensorPlan, parse_stages
from exactmoe.model.stages import STAGES, keys
from exactmoe.model.traced import forward_traced
from exactmoe.model.weights import Model, load_model
from exactmoe.parity.bisect.search import MADE_HERE, bisect
from exactmoe.parity.bits import compare
from exactmoe.parity.faults.catalogue_model import LAST, MIDDLE, ModelFault, _matrix, _not_a_number, prepared
from exactmoe.parity.faults.plant import Fault
from exactmoe.parity.load import reference_weights
from exactmoe.parity.reference.kv_cache import KVCache as ReferenceCache
from exactmoe.parity.reference.traced import forward_traced as reference_traced
from exactmoe.parity.steps import ReferenceSteps, TritonSteps

ROOT = Path(__file__).resolve().parents[2]
TOKENS = [3, 141, 59]
EARLIER = [
    "embedding", "attn_norm", "q", "k", "v", "q_post_rope", "k_post_rope", "attn_scores", "attn_softmax", "attention",
    "attn_out", "post_attn_residual", "ffn_norm", "post_ffn_residual", "final_norm", "lm_head",
]  # fmt: skip
SUB_STAGES = [
    "moe_router_logits", "moe_router", "moe_router_indices", "moe_expert_gate", "moe_expert_up", "moe_expert_swigl",
    "moe_expert_out", "moe_ffn_out",
]  # fmt: skip


@pytest.fixture(scope="module")
def file(model_file: Path) -> GGUFFile:
    return open_gguf(model_file)


@pytest.fixture(scope="module")
def model(file: GGUFFile) -> Model:
    return load_model(file, resolve_device("auto"))


@pytest.mark.parametrize("name", SUB_STAGES)
def test_the_name_of_a_sub_stage_parses_and_selects_it_alone(name: str) -> None:
    assert parse_stages(f" {name.upper()} ") == (name,)
    plan = SaveTensorPlan.parse(name, "1", n_layers=3, n_positions=4, n_experts=4)
    assert [key for key in keys(3) if plan.wants(*key)] == [(name, 1)]


def test_there_are_no_other_stages_and_sub_stages_stand_between_ffn_norm_and_the_residual() -> None:
    names = [stage.name for stage in STAGES]
    assert names == [*EARLIER[:13], *SUB_STAGES, *EARLIER[13:]]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_earlier_stages_are_byte_identical_with_and_without_the_sub_stages(
    backend: str, file: GGUFFile, model: Model
) -> None:
    plans = [
        SaveTensorPlan.parse(stages, n_layers=2, n_positions=len(TOKENS), n_experts=4)
        for stages in (",".join(EARLIER), "all")
    ]
    runs: list[dict[tuple[str, int], np.ndarray]] = []
    for plan in plans:
        if backend == "reference":
            weights = reference_weights(file)
            found = reference_traced(weights, ReferenceCache.allocate(weights.dims, len(TOKENS)), TOKENS, "q8_k", plan)
            runs.append(dict(found.stages))
        else:
            stages = forward_traced(model, KVCache.allocate(model, len(TOKENS)), TOKENS, plan).stages
            runs.append({key: value.cpu().numpy() for key, value in stages.items()})
    without, beside = runs
    assert list(without) == [key for key in keys(2) if key[0] in EARLIER]
    assert list(beside) == keys(2)
    for key, value in without.items():
        verdict = compare(str(key), value, beside[key])
        assert verdict.equal, f"{key}: {verdict}"


def _line(stage: str, file: str, right: str, wrong: str) -> ModelFault:
    return ModelFault(f"nan-{stage}", stage, MIDDLE, Fault(f"nan-{stage}", stage, file, right, wrong, "planted"))


NAN = [
    _line("moe_router_logits", "router", "np.where(np.broadcast_to(bad, (len(x), E)), NAN, logits)",
          "np.where(np.arange(E) == 1, NAN, logits)"),
    _line("moe_router", "router", "np.where(bad, NAN, weight)", "np.where(np.arange(top_k) == 1, NAN, weight)"),
    ModelFault("nan-gate", "moe_expert_gate", MIDDLE, _matrix("gate", _not_a_number), expert=True, block="spot"),
    ModelFault("nan-up", "moe_expert_up", MIDDLE, _matrix("up", _not_a_number), expert=True, block="spot"),
    _line("moe_expert_swigl", "swiglu", "return silu * up",
          "return np.where(np.arange(up.shape[1]) == 7, np.float32(np.nan), silu * up)"),
    ModelFault("nan-down", "moe_expert_out", LAST, _matrix("down", _not_a_number), expert=True, block="spot"),
    _line("moe_ffn_out", "combine", "return total", "return np.where(np.arange(D) == 5, np.float32(np.nan), total)"),
]  # fmt: skip


class Everything:
    """A plan that keeps every stage."""

    def wants(self, stage: str, layer: int) -> bool:
        return True


@pytest.mark.parametrize("fault", NAN, ids=str)
def test_bisection_names_the_first_stage_that_holds_a_planted_nan(fault: ModelFault, file: GGUFFile) -> None:
    with prepared(fault, file, TOKENS, "q8_k") as pair:
        whole = pair.suspect.trace((), TOKENS, Everything())
        found = bisect(pair.reference, pair.suspect, file, TOKENS)
    bad = [key for key in keys(2) if key[0] != "attn_scores" and np.isnan(whole[key]).any()]
    assert bad[0] == (found.stage, found.layer) == (fault.stage, fault.layer(2))
    assert len(bad) > 1, "the planted NaN reached no other stage, so the first was no question"
    assert found.origin is not None and found.origin.verdict == MADE_HERE
    assert found.place is not None and found.place.suspect.startswith("nan")


def test_bisection_names_the_stage_of_a_nan_in_the_weights_of_the_kernels(file: GGUFFile) -> None:
    reference = ReferenceSteps(reference_weights(file), "q8_k")
    expert = int(reference.trace((), TOKENS, Everything())["moe_router_indices", 1][0, 0])
    model = load_model(file, resolve_device("auto"))
    moe = model.layers[1].moe
    assert moe.up.format.name == "Q4_K" and moe.up.heads is not None
    heads = moe.up.heads.clone()
    heads[expert, 37, :2] = torch.tensor([0, 0x7E], dtype=torch.uint8)  # d of a Q4_K block is NaN
    layers = (model.layers[0], model.layers[1]._replace(moe=moe._replace(up=moe.up._replace(heads=heads))))
    object.__setattr__(model, "layers", layers)
    found = bisect(reference, TritonSteps(model), file, TOKENS[:2])
    assert (found.stage, found.layer) == ("moe_expert_up", 1)
    assert found.place is not None and found.place.suspect.startswith("nan")
    assert (found.place.experts, found.place.row, found.place.block) == ((expert,), 37, 0)


def test_every_form_of_the_report_cites_the_stage_that_bisection_named(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = {name: tmp_path / f"evidence.{name}" for name in ("json", "html", "xml")}
    arguments = ["--tokens", "3,141,59,26,5", "-o", out["json"], "--html", out["html"], "--junit", out["xml"]]
    status = main(["bisect", str(model_file), "--suspect", "fault:nan-in-one-expert@1", *map(str, arguments)])
    assert status == 1
    evidence = json.loads(out["json"].read_text())
    stage, layer = evidence["found"]["stage"], evidence["found"]["layer"]
    assert (stage, layer) == ("moe_expert_gate", 1)
    cited = f"{stage}, layer {layer}"
    assert cited in evidence["verdict"] and f"{stage}@{layer}" in evidence["next"]
    assert f"first wrong stage {cited}, made here" in capsys.readouterr().out
    assert cited in out["html"].read_text()
    failed = re.findall(r'<testcase[^>]*name="([^"]*)"[^>]*>\s*<failure', out["xml"].read_text())
    assert failed[0] == stage, failed


WORDS = re.compile(r"trac|stage|dump|hook|probe|debug|observ|intermediate|environ|getenv", re.IGNORECASE)


def reached(start: str, read: dict[str, str]) -> list[str]:
    """Modules that `start` imports, directly or not, among `read`, itself first."""
    found, waiting = [], [start]
    while waiting:
        name = waiting.pop()
        if name not in read or name in found:
            continue
        found.append(name)
        for node in ast.walk(ast.parse(read[name])):
            if isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
    return found


def branches(text: str) -> list[str]:
    """Conditions that speak of tracing, or of the environment."""
    tests = [node.test for node in ast.walk(ast.parse(text)) if isinstance(node, ast.If | ast.IfExp | ast.While)]
    tests += [node.subject for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Match)]
    return [ast.unparse(test) for test in tests if WORDS.search(ast.unparse(test))]


def test_production_has_no_branch_for_tracing() -> None:
    read = {
        f"exactmoe.{path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')}": path.read_text()
        for folder in ("kernels", "model")
        for path in (ROOT / folder).rglob("*.py")
    }
    modules = reached("exactmoe.model.forward", read)
    assert {"exactmoe.model.decode", "exactmoe.kernels.matmul", "exactmoe.kernels.router"} <= set(modules)
    assert "exactmoe.model.traced" not in modules
    assert {name: found for name in modules if (found := branches(read[name]))} == {}


@pytest.mark.parametrize(
    "planted",
    ["if TRACE: f(x)", "y = g(x) if plan.stages else x", "while tracer.on: pass", "if os.environ.get('X'): f(x)",
     "match hooks:\n    case []: pass"],
)  # fmt: skip
def test_a_planted_branch_is_reported(planted: str) -> None:
    assert branches(planted)
