"""The evidence file of a bisection: what was run on what, what was found, and what to run next."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exactmoe.model.stages import WHOLE_MODEL
from exactmoe.parity.bisect.search import HIDDEN, INHERITED, Evidence
from exactmoe.parity.graph import TRACED, Graph
from exactmoe.parity.provenance import numerics_version, versions

if TYPE_CHECKING:
    import torch

    from exactmoe.model.gguf.reader import GGUFFile


def evidence_of(
    found: Evidence,
    file: "GGUFFile",
    past: Sequence[int],
    tokens: Sequence[int],
    profile: str,
    device: "torch.device | None",
    graph: Graph = TRACED,
) -> dict[str, Any]:
    """Everything as JSON has it; `device` is where kernels ran, None where none did."""
    return {
        "verdict": found.sentence,
        "next": _next(found, file, past, tokens, profile, graph),
        "model": Path(file.path).name,
        "model_sha256": file.sha256(),
        "numerics": numerics_version(),
        "activations": profile,
        "device": "none: numpy" if device is None else str(device),
        "versions": versions(),
        "past": list(past),
        "tokens": list(tokens),
        "found": found.to_dict(),
    }


def _next(
    found: Evidence, file: "GGUFFile", past: Sequence[int], tokens: Sequence[int], profile: str, graph: Graph
) -> str:
    """The command that takes the question further."""
    prompt = f"--tokens {','.join(map(str, [*past, *tokens]))}"
    common = f"{file.path} {prompt} --activations {profile}"
    again = f"exactmoe bisect {common} --suspect {found.suspect}" + (f" --past {len(past)}" if past else "")
    if found.stage is None or found.layer is None or found.origin is None:
        other = "q16_k" if profile == "q8_k" else "q8_k"
        return again.replace(f"--activations {profile}", f"--activations {other}")
    if found.origin.verdict == HIDDEN:
        return f"compute-sanitizer --tool racecheck {again}"
    at = "" if found.layer == WHOLE_MODEL else f"@{found.layer}"
    if found.origin.verdict == INHERITED:
        reads = graph.inputs(found.stage, found.layer, found.layer + 1)
        stage, layer = reads[0]
        return f"{again} --stage {stage}" + ("" if layer == WHOLE_MODEL else f"@{layer}")
    return f"{again} --stage {found.stage}{at}"
