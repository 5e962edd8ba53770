"""A bisection as the report that `exactmoe diff` draws: every stage of one more pass of both sides."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from exactmoe.model.stages import Key
from exactmoe.parity.bits import Array
from exactmoe.parity.diff.traces import DiffReport, diff_traces
from exactmoe.parity.graph import TRACED, Graph
from exactmoe.parity.steps import Steps
from exactmoe.parity.trace.capture import margin_ulp
from exactmoe.parity.trace.manifest import Manifest


class _Held:
    """The stages of a pass in memory, as a trace."""

    def __init__(self, stages: Mapping[Key, Array], manifest: Manifest, n_active: int) -> None:
        self._stages, self.manifest, self._active = stages, manifest, n_active

    @property
    def positions(self) -> Array:
        return np.array(self.manifest.positions, np.int64)

    def keys(self) -> list[Key]:
        return list(self._stages)

    def read(self, stage: str, layer: int) -> Array:
        return self._stages[stage, layer]

    def rows(self, stage: str, layer: int) -> Array | None:  # noqa: ARG002 - a trace's face
        return None

    def margin_ulp(self, layer: int) -> Array | None:
        return margin_ulp(self._stages["moe_router_logits", layer], self._active)


class _All:
    """A plan that keeps every stage."""

    def wants(self, stage: str, layer: int) -> bool:  # noqa: ARG002 - the plan's face
        return True


def report_of(
    reference: Steps,
    suspect: Steps,
    evidence: Mapping[str, Any],
    past: Sequence[int],
    tokens: Sequence[int],
    graph: Graph = TRACED,
) -> DiffReport:
    """Both sides once more over `tokens`, compared stage by stage, those of `graph`."""
    first = len(past)
    common = {name: evidence[name] for name in ("model", "model_sha256", "numerics", "activations", "versions")}
    sides = []
    for name, steps in (("reference", reference), (evidence["found"]["suspect"], suspect)):
        manifest = Manifest(
            **common,
            complete=True,
            backend=name,
            device=evidence["device"],
            tokens=(*past, *tokens),
            n_layers=reference.n_layers,
            positions=tuple(range(first, first + len(tokens))),
            plan={},
        )
        stages = steps.trace(past, tokens, _All())
        sides.append(
            _Held(
                {key: stages[key] for key in graph.order(reference.n_layers) if key in stages}, manifest, steps.n_active
            )
        )
    suspect_name = evidence["found"]["suspect"]
    report = diff_traces(sides[0], sides[1], names=("reference", suspect_name))
    return replace(report, title=f"bisection of {suspect_name}")
