"""Run a model traced and save what a plan selects.

The traced pass keeps the stages asked for, and those a selection needs: the router's logits for the margin beside
moe_router, its ids where experts are selected. Positions and experts are cut out afterwards, on the host."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from exactmoe.kernels.errors import require
from exactmoe.model.plan import EXPERT_STAGES, SaveTensorPlan
from exactmoe.model.stages import Key
from exactmoe.parity.bits import Array
from exactmoe.parity.provenance import device_name, numerics_version, versions
from exactmoe.parity.steps import load_steps
from exactmoe.parity.trace.folder import Saved, Trace, prepare_folder, write_trace
from exactmoe.parity.trace.manifest import Manifest

if TYPE_CHECKING:
    from exactmoe.model.gguf.reader import GGUFFile

Progress = Callable[[str], None]


class Captured(NamedTuple):
    """A saved trace, and what taking it cost."""

    trace: Trace
    production_seconds: float  # of the same prompt without tracing
    traced_seconds: float
    bytes: int  # of all tensors


@dataclass(frozen=True)
class _Needs:
    """A plan and what its selections need besides."""

    plan: SaveTensorPlan

    def wants(self, stage: str, layer: int) -> bool:
        """Whether the traced pass must keep the stage."""
        return (
            self.plan.wants(stage, layer)
            or (stage == "moe_router_logits" and self.plan.wants("moe_router", layer))
            or (
                stage == "moe_router_indices"
                and self.plan.experts is not None
                and any(self.plan.wants(name, layer) for name in EXPERT_STAGES)
            )
        )


def capture(
    file: "GGUFFile",
    tokens: Sequence[int],
    plan: SaveTensorPlan,
    backend: str = "triton",
    profile: str = "q8_k",
    device: str = "auto",
    file_format: str = "safetensors",
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Captured:
    """Run `tokens` through `file` in production and traced, and save what `plan` selects to its output_dir.

    Raises InvalidInput for a plan without a folder, a folder in use, and a stage that the traced pass did not keep."""
    require(plan.output_dir is not None, "the plan has no output_dir to save to")
    folder = Path(plan.output_dir or "")
    prepare_folder(folder, overwrite=overwrite)
    tell = progress or (lambda _: None)
    tell("loading")
    steps = load_steps(file, backend, profile, device)
    if backend == "triton":
        tell("production")
        steps.production(tokens)  # compiles what the next run is timed with
    tell("production")
    began = time.perf_counter()
    steps.production(tokens)
    production = time.perf_counter() - began
    tell("traced")
    began = time.perf_counter()
    stages = steps.trace((), tokens, _Needs(plan))
    traced = time.perf_counter() - began
    tell("writing")
    positions = tuple(range(len(tokens))) if plan.positions is None else plan.positions
    manifest = Manifest(
        complete=True,
        model=Path(file.path).name,
        model_sha256=file.sha256(),
        numerics=numerics_version(),
        activations=profile,
        backend=backend,
        device="numpy on the CPU" if backend == "reference" else device_name(device),
        versions=versions(),
        tokens=tuple(int(t) for t in tokens),
        n_layers=steps.n_layers,
        positions=positions,
        plan=plan.to_dict(),
        seconds=traced,
    )
    trace = write_trace(folder, manifest, select(stages, plan, steps.n_active), file_format, overwrite=True)
    return Captured(trace, production, traced, sum(record.nbytes for record in trace.manifest.tensors))


def select(stages: Mapping[Key, Array], plan: SaveTensorPlan, n_active: int) -> Iterator[Saved]:
    """What `plan` selects of the stages of a pass, in canonical order; raises InvalidInput where one is not there."""
    for stage, layer in plan.selected():
        key = stage, layer
        require(key in stages, f"stage {stage} of layer {layer} was asked for, and the traced pass did not keep it")
        values = stages[key]
        kept = list(range(len(values))) if plan.positions is None else list(plan.positions)
        require(max(kept) < len(values), f"position {max(kept)} was asked for, the run has {len(values)}")
        if stage in EXPERT_STAGES and plan.experts is not None:
            ids = stages["moe_router_indices", layer]
            where = np.isin(ids, plan.experts)
            where[np.setdiff1d(np.arange(len(values)), kept)] = False
            at = np.argwhere(where)
            rows = np.concatenate([at, ids[where][:, None]], axis=1).astype(np.int32)
            yield Saved(key, values[where], rows)
            continue
        margin = None
        if stage == "moe_router":
            margin = margin_ulp(stages["moe_router_logits", layer][kept], n_active)
        yield Saved(key, values[kept], None, margin)


def margin_ulp(logits: Array, n_active: int) -> Array:
    """ULP between the `n_active`-th and the next best of each row of logits f32 [T, E], i64 [T]; -1 where NaN is met.

    Where every expert is chosen there is no next one: 2^32."""
    if logits.shape[1] <= n_active:
        return np.full(len(logits), 2**32, np.int64)
    bits = np.ascontiguousarray(logits).view(np.int32).astype(np.int64)
    line = np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)  # along the number line, -0 and +0 at one point
    best = -np.sort(-line, axis=1)
    margin: Array = best[:, n_active - 1] - best[:, n_active]
    return np.where(np.isnan(logits).any(axis=1), -1, margin)
