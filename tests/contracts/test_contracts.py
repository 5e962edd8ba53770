"""The contracts of this project, all of them: each validates, and each is what `diff` can compare."""

from pathlib import Path

from exactmoe.contracts.diff import compare
from exactmoe.contracts.validate import validate

ROOT = Path(__file__).resolve().parents[2]
CONTRACTS = ROOT / "contracts"


PROMISED = {
    "attention-v1", "batch-invariance-v1", "contract-validation-v1", "gguf-reader-v1", "moe-expert-dispatch-v1",
    "moe-router-v1", "numerics-v1", "performance-v1", "quantised-matmul-v1", "qwen3-moe-forward-gpu-v1",
    "qwen3-moe-forward-v1", "save-tensor-v1", "swiglu-kernel-v1", "trace-moe-gpu-sub-stages-v1",
}  # fmt: skip


def test_no_contract_is_missing() -> None:
    found = {loaded.contract.metadata.id for loaded in validate([CONTRACTS], dialect="house").loaded if loaded.contract}
    assert found >= PROMISED, PROMISED - found


def test_every_contract_validates_with_no_error_and_no_warning() -> None:
    report = validate([CONTRACTS], dialect="house")
    assert len(report.loaded) > 0
    assert [str(finding) for finding in report.findings] == []
    assert 0 < report.obligations_bound == report.obligations
    assert 0 < report.falsifiers_bound == report.falsifiers


def test_no_contract_differs_from_itself() -> None:
    documents = [loaded.document for loaded in validate([CONTRACTS], dialect="house").loaded]
    assert len(documents) > 0
    for document in documents:
        difference = compare(document, document)
        assert (difference.changes, difference.findings) == ([], []), document.path
