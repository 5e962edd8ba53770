"""The tiny Qwen3-MoE in plain torch, to train it and to measure its loss. Not the inference path of this project.

`Network(dims)(tokens [N, S] i64) -> Pass(logits, balance, load, ranked)`. The names in its `state_dict` are the tensor
names of a Qwen3-MoE GGUF file, and every matrix has the file's logical shape.
Architecture: Qwen3MoeForCausalLM of transformers (norm_topk_prob, no shared expert, every layer sparse, no biases)."""

from dataclasses import asdict, dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from exactmoe.kernels.errors import require


@dataclass(frozen=True)
class Dims:
    """Widths of the model; the defaults are those of the file that ships."""

    hidden: int = 512
    n_layers: int = 4
    n_heads: int = 8
    n_kv_heads: int = 2
    head_dim: int = 128
    n_experts: int = 12
    n_active: int = 4
    expert_width: int = 256
    vocab: int = 2048
    context_length: int = 4096
    eps: float = 1e-6
    rope_base: float = 1e6

    def to_dict(self) -> dict[str, int | float]:
        """Give the widths by name, as train.json records them."""
        return asdict(self)


class Pass(NamedTuple):
    """What a forward pass gives."""

    logits: Tensor  # [N, S, V] f32
    balance: Tensor  # scalar, the load-balancing loss
    load: Tensor  # [L, E], each expert's share of the routed rows
    ranked: Tensor  # [L, T, A+1], weights of the experts a token goes to, best first, and what the next would have had


class Network(nn.Module):
    """A Qwen3-MoE with trainable weights.

    `compute` is the dtype of the matrix products; router, norms and residual stream keep that of the parameters.
    `experts` is how the experts are run: "grouped" (sorted rows, one grouped product) or "dense" (all, masked).
    `noise`, if given, is a scalar that may change while training: the width of uniform noise on the inputs of the
    quantised products, in steps of their 8-bit rounding."""

    def __init__(
        self, dims: Dims, compute: torch.dtype = torch.float32, experts: str = "dense", noise: Tensor | None = None
    ) -> None:
        super().__init__()
        require(experts in ("grouped", "dense"), f"experts must be 'grouped' or 'dense', got {experts!r}")
        self.dims, self.compute, self.noise = dims, compute, noise
        self.token_embd = _Weight(dims.vocab, dims.hidden)
        self.blk = nn.ModuleList(_Block(dims, compute, experts, noise) for _ in range(dims.n_layers))
        self.output_norm = _Norm(dims.hidden, dims.eps)
        self.output = _Weight(dims.vocab, dims.hidden)
        cos, sin = _rope_tables(dims)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def initialise(self, seed: int) -> None:
        """Draw normal weights of deviation 0.02, times 1/sqrt(2L) where a projection writes to the residual stream."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
                continue
            writes = "attn_output" in name or "ffn_down_exps" in name
            std = 0.02 / (2 * self.dims.n_layers) ** 0.5 if writes else 0.02
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def set_experts(self, experts: str) -> None:
        """Change how the experts are run."""
        for block in self.blk:
            cast(_Block, block).experts = experts

    def forward(self, tokens: Tensor) -> Pass:
        """Run windows of tokens [N, S], each on its own."""
        span = tokens.shape[1]
        require(span <= self.dims.context_length, f"{span} positions exceed the context of {self.dims.context_length}")
        cos, sin = cast(Tensor, self.cos)[:span], cast(Tensor, self.sin)[:span]
        x = functional.embedding(tokens, self.token_embd.weight)  # [N, S, D]
        balance, load, ranked = [], [], []
        for block in self.blk:
            x, block_balance, block_load, block_ranked = block(x, cos, sin)
            balance.append(block_balance)
            load.append(block_load)
            ranked.append(block_ranked)
        logits = _linear(_noisy(self.output_norm(x), self.noise), self.output.weight, self.compute)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return Pass(logits, torch.stack(balance).mean(), torch.stack(load), torch.stack(ranked))


def next_token_loss(network: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats of tokens [N, S] after the first of each row."""
    logits = network(tokens)[0][:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class _Weight(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))


class _Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class _Block(nn.Module):
    def __init__(self, dims: Dims, compute: torch.dtype, experts: str, noise: Tensor | None) -> None:
        super().__init__()
        D, F, E = dims.hidden, dims.expert_width, dims.n_experts
        self.dims, self.compute, self.experts, self.noise = dims, compute, experts, noise
        self.attn_norm = _Norm(D, dims.eps)
        self.attn_q = _Weight(dims.n_heads * dims.head_dim, D)
        self.attn_k = _Weight(dims.n_kv_heads * dims.head_dim, D)
        self.attn_v = _Weight(dims.n_kv_heads * dims.head_dim, D)
        self.attn_output = _Weight(D, dims.n_heads * dims.head_dim)
        self.attn_q_norm = _Norm(dims.head_dim, dims.eps)
        self.attn_k_norm = _Norm(dims.head_dim, dims.eps)
        self.ffn_norm = _Norm(D, dims.eps)
        self.ffn_gate_inp = _Weight(E, D)
        self.ffn_gate_exps = _Weight(E, F, D)
        self.ffn_up_exps = _Weight(E, F, D)
        self.ffn_down_exps = _Weight(E, D, F)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = x + self._attention(self.attn_norm(x), cos, sin)
        y, balance, load, ranked = self._moe(self.ffn_norm(x).flatten(0, 1))
        return x + y.view_as(x), balance, load, ranked

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        N, S, _ = x.shape
        x = _noisy(x, self.noise)
        q = _linear(x, self.attn_q.weight, self.compute).view(N, S, -1, self.dims.head_dim).transpose(1, 2)
        k = _linear(x, self.attn_k.weight, self.compute).view(N, S, -1, self.dims.head_dim).transpose(1, 2)
        v = _linear(x, self.attn_v.weight, self.compute).view(N, S, -1, self.dims.head_dim).transpose(1, 2)
        q = _rotate(self.attn_q_norm(q.to(x.dtype)), cos, sin).to(self.compute)
        k = _rotate(self.attn_k_norm(k.to(x.dtype)), cos, sin).to(self.compute)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # [N, H, S, C]
        return _linear(_noisy(y.transpose(1, 2).flatten(2), self.noise), self.attn_output.weight, self.compute).to(
            x.dtype
        )

    def _moe(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        E, A = self.dims.n_experts, self.dims.n_active
        probability = functional.linear(x, self.ffn_gate_inp.weight).softmax(-1)  # [T, E]
        best, order = probability.topk(min(A + 1, E), dim=-1)
        ranked = best / best[:, :A].sum(-1, keepdim=True)  # [T, A+1]
        weight, expert = ranked[:, :A], order[:, :A]
        load = functional.one_hot(expert, E).to(x.dtype).mean((0, 1))  # [E], sums to one
        # Switch Transformers (arXiv 2101.03961), eq. 4: one when the load is even.
        balance = E * (load.detach() * probability.mean(0)).sum()
        run = self._grouped if self.experts == "grouped" else self._dense
        return run(_noisy(x, self.noise), weight, expert).to(x.dtype), balance, load, ranked

    def _grouped(self, x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
        A = self.dims.n_active
        order = expert.flatten().argsort(stable=True)  # [R]
        inverse = order.argsort()
        count = functional.one_hot(expert.flatten(), self.dims.n_experts).sum(0)
        end = count.cumsum(0).to(torch.int32)
        rows = x.to(self.compute)[:, None].expand(-1, A, -1).flatten(0, 1)  # [R, D]
        rows = _permute(rows, order, inverse)
        gate_up = torch.cat((self.ffn_gate_exps.weight, self.ffn_up_exps.weight), 1).to(self.compute)
        gate, up = functional.grouped_mm(rows, gate_up.transpose(1, 2), offs=end).chunk(2, -1)
        y = functional.grouped_mm(
            _noisy(functional.silu(gate) * up, self.noise),
            self.ffn_down_exps.weight.to(self.compute).transpose(1, 2),
            offs=end,
        )
        y = _permute(y, inverse, order).view(*weight.shape, -1)  # [T, A, D]
        return (y * weight[..., None]).sum(1)

    def _dense(self, x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
        mixture = torch.zeros(x.shape[0], self.dims.n_experts, dtype=x.dtype, device=x.device).scatter(
            1, expert, weight
        )
        rows = x.to(self.compute)
        gate = torch.einsum("td,efd->etf", rows, self.ffn_gate_exps.weight.to(self.compute))
        up = torch.einsum("td,efd->etf", rows, self.ffn_up_exps.weight.to(self.compute))
        hidden = _noisy(functional.silu(gate) * up, self.noise) * mixture.t()[..., None].to(self.compute)
        return torch.einsum("etf,edf->td", hidden, self.ffn_down_exps.weight.to(self.compute))


class _Permute(torch.autograd.Function):
    """Reorder rows; the gradient is the inverse gather, where plain indexing would scatter with atomics."""

    @staticmethod
    def forward(ctx: object, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)  # type: ignore[attr-defined]
        return rows[order]

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad[inverse], None, None


def _permute(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return cast(Tensor, _Permute.apply(rows, order, inverse))  # type: ignore[no-untyped-call]


def _linear(x: Tensor, weight: Tensor, compute: torch.dtype) -> Tensor:
    return functional.linear(x.to(compute), weight.to(compute))


def _noisy(x: Tensor, noise: Tensor | None) -> Tensor:
    """x with uniform noise `noise` rounding steps wide; a step is 1/127 of the largest magnitude of 256 elements."""
    if noise is None:
        return x
    blocks = x.reshape(*x.shape[:-1], -1, 256)
    step = blocks.detach().abs().amax(-1, keepdim=True) / 127
    return (blocks + (torch.rand_like(blocks) - 0.5) * (noise.to(x.dtype) * step)).view(x.shape)


def _rope_tables(dims: Dims) -> tuple[Tensor, Tensor]:
    exponent = torch.arange(0, dims.head_dim, 2, dtype=torch.float64) / dims.head_dim
    angle = torch.outer(torch.arange(dims.context_length, dtype=torch.float64), dims.rope_base**-exponent)
    return angle.cos().float(), angle.sin().float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)  # NEOX pairs: (i, i + C/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
