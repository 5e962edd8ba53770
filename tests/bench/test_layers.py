"""The MoE layer as a benchmark: production's own functions, judged by the reference's."""

from pathlib import Path
from typing import Any

import pytest
import torch

from exactmoe.bench.layers import MoeChunk, MoeLayer, MoeStep
from exactmoe.bench.run import judge
from exactmoe.model import decode, forward, moe
from exactmoe.model.cache import KVCache
from exactmoe.model.weights import load_model
from exactmoe.parity.cases import kernel

SMALL = [
    kind(tokens, 7, 3, 256, 512, "Q4_K", down, profile)
    for kind, tokens in ((MoeStep, 1), (MoeChunk, 1), (MoeChunk, 5))
    for down, profile in (("Q6_K", "q8_k"), ("Q4_K", "q16_k"))
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op}-{case}")
def test_the_layer_has_the_bits_of_the_chained_reference(case: MoeLayer, device: torch.device) -> None:
    equal, digest = judge(case, device)
    assert equal
    assert len(digest) == 64


@pytest.mark.parametrize(
    ("case", "module", "op"),
    [(SMALL[0], decode, "decode_router"), (SMALL[0], decode, "experts_up"), (SMALL[0], decode, "experts_down"),
     (SMALL[4], moe, "router_logits"), (SMALL[4], moe, "swiglu_quantize"), (SMALL[4], moe, "combine")],
)  # fmt: skip
def test_one_kernel_of_the_chain_gone_wrong_is_seen(
    case: MoeLayer, module: Any, op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(module, op)

    def wrong(*args: Any) -> Any:
        found = real(*args)
        first = found if isinstance(found, torch.Tensor) else found[0]
        first.neg_()
        return found

    monkeypatch.setattr(module, op, wrong)
    assert not judge(case, device)[0]


@pytest.mark.parametrize(("case", "user", "tokens"), [(SMALL[0], decode, [1]), (SMALL[4], forward, [1, 2, 3])])
def test_what_is_timed_is_what_a_layer_of_production_calls(
    case: MoeLayer,
    user: Any,
    tokens: list[int],
    model_file: Path,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed, calls = kernel(case), []
    assert getattr(user, case.op) is timed
    model = load_model(model_file, device)
    monkeypatch.setattr(user, case.op, lambda *args: calls.append(args) or timed(*args))
    monkeypatch.setattr(decode.Decoder, "_capture", lambda self: None)  # a graph would call nothing
    forward.forward(model, KVCache.allocate(model, 8), tokens)
    assert len(calls) == model.config.n_layers
