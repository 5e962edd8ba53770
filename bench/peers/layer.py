"""The MoE layer of plain torch in bf16, and how far a peer's is from it in f64.      x [T, D] -> [T, D]

T tokens, E experts, A active, D width, F expert width. Everything stays on the device: the layer can be captured."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as torch_f
from torch import Tensor

from exactmoe.bench.cases import A, D, E, F
from exactmoe.bench.clock import ROTATED, time_graph
from exactmoe.bench.peers.rows import PeerRow, no_memory

GroupedMM = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # rows [R, K], weights [E, K, N], ends of the groups [E] -> [R, N]
_MORE = 63  # rows drawn beyond those taken


class Layer(NamedTuple):
    """Weights of a layer."""

    router: Tensor  # [E, D] f32
    gate: Tensor  # [E, F, D] bf16
    up: Tensor  # [E, F, D]
    down: Tensor  # [E, D, F]

    @staticmethod
    def random(device: torch.device, e: int = E, d: int = D, f: int = F, seed: int = 0) -> "Layer":
        """One that keeps numbers of about 1."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            made: Tensor = torch.randn(shape, generator=generator, device=device) / shape[-1] ** 0.5
            return made

        experts = (normal(*shape).bfloat16() for shape in ((e, f, d), (e, f, d), (e, d, f)))
        return Layer(normal(e, d), *experts)


def choose(layer: Layer, x: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights [T, A], which sum to one, and experts [T, A]."""
    weight, expert = torch.softmax(x.float() @ layer.router.T, -1).topk(top_k, -1)
    return weight / weight.sum(-1, keepdim=True), expert


def clear_rows(layer: Layer, x: Tensor, n: int, top_k: int) -> Tensor:
    """The `n` rows of x [T, D] whose choice of experts is clearest, the clearest first.

    Software that rounds the router's logits to bf16 takes another expert at a near tie: a fair answer, but no measure
    of how near its sums are."""
    logits = (x.float() @ layer.router.T).sort(-1, descending=True).values
    gap = logits[:, top_k - 1] - logits[:, top_k]
    return x[gap.argsort(descending=True, stable=True)[:n]]


def run_layer(layer: Layer, x: Tensor, top_k: int, grouped_mm: GroupedMM) -> Tensor:
    """The layer of x [T, D] bf16: tokens sorted by expert, three grouped products, the weighted sum."""
    weight, expert = choose(layer, x, top_k)
    ordered, order = expert.flatten().sort(stable=True)
    ids = torch.arange(layer.gate.shape[0], device=x.device, dtype=ordered.dtype)
    ends = torch.searchsorted(ordered, ids, right=True).to(torch.int32)
    token = order // top_k
    rows = x[token]
    g = grouped_mm(rows, layer.gate.transpose(1, 2), ends)
    u = grouped_mm(rows, layer.up.transpose(1, 2), ends)
    y = grouped_mm(torch_f.silu(g) * u, layer.down.transpose(1, 2), ends)
    return torch.zeros_like(x).index_add_(0, token, y * weight.flatten()[order, None].to(y.dtype))


def exact(layer: Layer, x: Tensor, top_k: int) -> Tensor:
    """The same in f64, token by token, with the same choice."""
    weight, expert = choose(layer, x, top_k)
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for t in range(x.shape[0]):
        for w, e in zip(weight[t].double(), expert[t].tolist(), strict=True):
            row = x[t].double()
            h = torch_f.silu(layer.gate[e].double() @ row) * (layer.up[e].double() @ row)
            out[t] += w * (layer.down[e].double() @ h)
    return out


def distance(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what was wanted; inf where something is not finite."""
    far = float((found.double() - wanted).norm() / wanted.norm())
    return far if math.isfinite(far) else math.inf


def rows_of(
    peer: str, version: str, computes: str, device: torch.device,
    prepare: Callable[[Layer], Callable[[Tensor], Tensor]], chunks: Sequence[int],
) -> Iterator[PeerRow]:  # fmt: skip
    """A row for each number of tokens: judged on few tokens, timed on copies of the layer that no cache holds."""
    layers = [Layer.random(device)]
    calls = [prepare(layers[0])]
    expert_bytes = 6 * D * F
    for T in sorted(chunks):
        generator = torch.Generator(device).manual_seed(T)
        drawn = torch.randn(T + _MORE, D, generator=generator, device=device).bfloat16()
        x = clear_rows(layers[0], drawn, T, A)
        error = distance(calls[0](x[:4]), exact(layers[0], x[:4], A))
        row = PeerRow(peer, f"moe-layer-{T}", computes, version=version, error=error)
        if row.wrong:
            yield row
            continue
        size = round(E * (1 - (1 - A / E) ** T)) * expert_bytes
        while len(calls) * size < ROTATED:
            layers.append(Layer.random(device, seed=len(layers)))
            calls.append(prepare(layers[-1]))
        try:
            cold = time_graph([lambda call=call, x=x: call(x) for call in calls])  # type: ignore[misc]
        except torch.OutOfMemoryError as problem:
            yield row.without(no_memory(problem))
            continue
        yield row.timed(cold, size / cold.median / 1000)
