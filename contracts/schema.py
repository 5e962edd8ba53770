"""The shape of a contract: the vocabulary of aprender's provable-contracts, and the keys that this project adds.

Added here: `covers` and `devices` of the metadata, `id` and `falsified_by` of an obligation, `devices` of a falsifier,
and a list where `test` cites more than one. A contract of that project is read as well: the sections that only its
tools use are accepted by name."""

import difflib
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from exactmoe.contracts.document import Document
from exactmoe.contracts.findings import Finding, Where, spelled

Dialect = Literal["house", "pv"]
"""`house`: a contract of this project, held to everything. `pv`: one of provable-contracts, held to what `pv` asks."""

STATUSES = ("DRAFT", "PROPOSED", "ACTIVE_ALGORITHM_LEVEL", "ACTIVE_RUNTIME", "DISCHARGED")
DEVICES = ("cpu", "gpu")
KINDS = ("kernel", "numerics", "format", "model", "pattern", "performance", "schema", "registry")
EXEMPT_KINDS = ("schema", "registry")
"""Kinds that describe and promise nothing: no equations, obligations or falsifiers are asked of them."""
OBLIGATION_TYPES = [
    "invariant",
    "equivalence",
    "bound",
    "monotonicity",
    "idempotency",
    "linearity",
    "symmetry",
    "associativity",
    "conservation",
    "ordering",
    "completeness",
    "soundness",
    "involution",
    "determinism",
    "roundtrip",
    "state_machine",
    "classification",
    "independence",
    "termination",
    "precondition",
    "postcondition",
    "frame",
    "loop_invariant",
    "loop_variant",
    "old_state",
    "subcontract",
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Amendment(_Section):
    """One version of a contract, and what it changed."""

    version: str = ""
    date: str = ""
    kind: str | None = None
    title: str | None = None
    description: str = ""


class Metadata(_Section):
    """What the contract is, which files it covers, and on which devices its evidence must be gathered."""

    id: str = ""
    version: str = ""
    created: str = ""
    author: str = ""
    kind: str = ""
    status: str | None = None
    description: str = ""
    references: list[str] = []
    depends_on: list[str] = []
    amendment_history: list[Amendment] = []
    covers: list[str] = []
    devices: list[str] = []
    registry: bool = False
    enforcement_level: str | None = None
    locked_level: str | None = None


class Equation(_Section):
    """One formula, where it holds, and what is always true of it."""

    formula: str = ""
    domain: str | None = None
    codomain: str | None = None
    invariants: list[str] = []
    preconditions: list[str] = []
    postconditions: list[str] = []
    lean_theorem: str | None = None


class Obligation(_Section):
    """One property that must be shown; `falsified_by` lists the falsifiers that would fail if it were false."""

    id: str | None = None
    type: str = ""
    property: str = ""
    formal: str | None = None
    tolerance: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    applies_to: str | None = None
    falsified_by: list[str] = []
    requires: str | None = None
    applies_to_phase: str | None = None
    parent_contract: str | None = None
    lean: Any = None


class Falsifier(_Section):
    """One prediction, the tests that fail where it is wrong, and what that would mean."""

    id: str = ""
    rule: str = ""
    prediction: str = ""
    test: Annotated[list[str], BeforeValidator(_listed)] = []
    if_fails: str = ""
    devices: list[str] | None = None


class Stage(_Section):
    """One step of the implementation: what accepts it, what shows it, what stands in the way."""

    id: str = ""
    description: str = ""
    expected_acceptance: list[str] = []
    evidence: list[str] = []
    blockers: list[str] = []


class QaGate(_Section):
    """The checks that must pass before a change of the contract is accepted."""

    id: str = ""
    name: str = ""
    description: str | None = None
    checks: list[str] = []
    pass_criteria: str | None = None
    falsification: str | None = None


class KaniHarness(BaseModel):
    """A bounded model check of provable-contracts; this project has none, and reads what `pv` has rules for."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)
    id: str = ""
    obligation: str = ""
    bound: int | None = None


class Contract(_Section):
    """A whole contract."""

    metadata: Metadata = Metadata()
    version: str | None = None
    equations: dict[str, Equation] = {}
    proof_obligations: list[Obligation] = []
    falsification_tests: list[Falsifier] = []
    implementation_stages: list[Stage] = []
    qa_gate: QaGate | None = None
    kani_harnesses: list[KaniHarness] = []
    kernel_structure: Any = None
    simd_dispatch: Any = None
    enforcement: Any = None
    verification_summary: Any = None
    type_invariants: Any = None
    coq_spec: Any = None

    @property
    def provable(self) -> bool:
        """Whether it promises something, so that obligations and falsifiers are asked of it."""
        return not self.metadata.registry and self.metadata.kind not in EXEMPT_KINDS

    def devices(self, falsifier: Falsifier) -> list[str]:
        """The devices on which a falsifier must pass: its own list, else the contract's, else the cpu."""
        return falsifier.devices or self.metadata.devices or ["cpu"]


_FREE = ("amendment_history", "implementation_stages")
"""Keys that provable-contracts does not read, so that its files write them in any shape."""


def shape(document: Document, dialect: Dialect) -> tuple[Contract | None, list[Finding]]:
    """The contract of a document, and where its shape is wrong. None where a value has the wrong type."""
    data: Any = document.data
    if dialect == "pv":
        data = {key: value for key, value in data.items() if key not in _FREE}
        if isinstance(data.get("metadata"), dict):
            data["metadata"] = {key: value for key, value in data["metadata"].items() if key not in _FREE}
    try:
        return Contract.model_validate(data), []
    except ValidationError as error:
        problems = error.errors(include_url=False)
    findings: list[Finding] = []
    broken = False
    for problem in problems:
        where: Where = tuple(problem["loc"])
        if problem["type"] == "extra_forbidden":
            hint = _slip(where) or (_meant(where) if dialect == "house" else "")
            if dialect == "pv" and not hint:  # `pv` reads past keys that it does not know, and its files use that
                continue
            severity: Literal["error", "warning"] = "warning" if dialect == "pv" else "error"
            message = f"{spelled(where)}: unknown key{hint}"
            findings.append(document.finding("KEY-001", where, message, severity=severity, at_key=True))
        else:
            broken = True
            findings.append(document.finding("TYPE-001", where, _type_message(where, problem)))
    if broken:
        return None, findings
    unknown = {tuple(problem["loc"]) for problem in problems}
    return Contract.model_validate(_without(data, unknown, ())), findings


def _type_message(where: Where, problem: Any) -> str:
    value = problem["input"]
    found = {dict: "a mapping", list: "a list", type(None): "nothing"}.get(type(value), repr(value))
    hint = ": write it in quotes" if problem["type"] == "string_type" and isinstance(value, int | float) else ""
    return f"{spelled(where)}: {problem['msg'][:1].lower()}{problem['msg'][1:]}, found {found}{hint}"


def _without(value: Any, unknown: set[Where], where: Where) -> Any:
    if isinstance(value, dict):
        return {
            key: _without(item, unknown, (*where, key)) for key, item in value.items() if (*where, key) not in unknown
        }
    if isinstance(value, list):
        return [_without(item, unknown, (*where, position)) for position, item in enumerate(value)]
    return value


def _slip(where: Where) -> str:
    """A hint for a key that a known one differs from by case, separators or a plural, or that stands too high."""
    if where == ("kind",):
        return "; it belongs under metadata as metadata.kind"
    forms = _forms(str(where[-1]))
    near = next((name for name in _model_at(where[:-1]).model_fields if forms & _forms(name)), None)
    return f"; did you mean {near}?" if near else ""


def _forms(key: str) -> set[str]:
    plain = key.lower().replace("_", "").replace("-", "")
    return {plain, plain.removesuffix("s"), plain.removesuffix("es")}


def _meant(where: Where) -> str:
    """A hint for a key that is spelt nearly as a known one of its section, or that belongs into another."""
    key = str(where[-1])
    near = difflib.get_close_matches(key.lower(), list(_model_at(where[:-1]).model_fields), 1, 0.75)
    if near:
        return f"; did you mean {near[0]}?"
    if len(where) == 1 and key in Metadata.model_fields:
        return f"; it belongs under metadata as metadata.{key}"
    return ""


def _model_at(where: Where) -> type[BaseModel]:
    """The model whose fields are known at `where`."""
    model: type[BaseModel] = Contract
    for part in where:
        if isinstance(part, str) and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            for found in (annotation, *get_args(annotation)):
                if isinstance(found, type) and issubclass(found, BaseModel):
                    model = found
    return model
