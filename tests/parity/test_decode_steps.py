"""The decode step that is served, under bisection: clean as it is, and a wrong fused kernel is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exactmoe.cli.main import main
from exactmoe.kernels.decode_attention import Attended
from exactmoe.kernels.errors import InvalidInput
from exactmoe.model.gguf.reader import GGUFFile, open_gguf
from exactmoe.model.stages import WHOLE_MODEL
from exactmoe.parity.bisect.search import MADE_HERE, Evidence, bisect
from exactmoe.parity.bits import compare
from exactmoe.parity.decode_steps import GRAPH, OPS, DecodeReference, DecodeSteps, decode_sides

PAST, TOKEN = (3, 141, 59), (26,)


@pytest.fixture(scope="module")
def file(model_file: Path) -> GGUFFile:
    return open_gguf(model_file)


class _All:
    def wants(self, stage: str, layer: int) -> bool:
        return True


def found(file: GGUFFile, device: torch.device, op: tuple[str, Any] | None, profile: str = "q8_k") -> Evidence:
    with decode_sides(file, profile, device, op) as (reference, suspect):
        return bisect(reference, suspect, file, TOKEN, past=PAST, name="decode", graph=GRAPH)


@pytest.mark.parametrize("profile", ["q8_k", "q16_k"])
def test_the_step_that_is_served_is_clean_in_every_stage_it_gives(
    file: GGUFFile, device: torch.device, profile: str
) -> None:
    evidence = found(file, device, None, profile)
    assert evidence.clean
    assert evidence.compared == evidence.stages == 2 * 8 + 2


def test_each_fused_kernel_and_its_twin_make_their_stage_from_what_it_reads(
    file: GGUFFile, device: torch.device
) -> None:
    with decode_sides(file, "q8_k", device, None) as (reference, suspect):
        truth = reference.trace(PAST, TOKEN, _All())
        for key in GRAPH.order(reference.n_layers):
            for side in (reference, suspect):
                made = side.step(key, truth, PAST, TOKEN)
                assert compare(f"{key} {type(side).__name__}", truth[key], made).equal


def _wrong(op: str, spoil: Callable[[Any], Any]) -> Any:
    """The op of that name, whose every output comes out spoilt."""
    from exactmoe.model import decode

    right = getattr(decode, op)
    return lambda *args, **kwargs: spoil(right(*args, **kwargs))


def _turned(out: Any) -> Any:
    """Heads in the wrong order, which nobody has quantised."""
    return Attended(out.heads.flip(0).contiguous(), None)


PLANTS = {
    "embed": ("embedding", WHOLE_MODEL, lambda out: out * 1.5),
    "decode_attention": ("attention", 0, _turned),
    "decode_router": ("moe_router_logits", 0, lambda out: out._replace(logits=out.logits.roll(1))),
    "experts_up": ("moe_expert_swigl", 0, lambda out: out._replace(h=out.h.roll(1, 0).contiguous())),
    "experts_down": ("post_ffn_residual", 0, lambda out: -out),
    "matvec": ("q", 0, lambda out: out + 1),
}


@pytest.mark.parametrize("op", PLANTS)
def test_a_wrong_fused_kernel_is_named_by_its_stage_and_made_there(
    file: GGUFFile, device: torch.device, op: str
) -> None:
    stage, layer, spoil = PLANTS[op]
    evidence = found(file, device, (op, _wrong(op, spoil)))
    assert (evidence.stage, evidence.layer) == (stage, layer)
    assert evidence.origin is not None
    assert evidence.origin.verdict == MADE_HERE


def test_every_op_of_the_step_is_planted() -> None:
    assert PLANTS.keys() == set(OPS)


def test_a_step_of_several_tokens_is_refused(file: GGUFFile, device: torch.device) -> None:
    with decode_sides(file, "q8_k", device, None) as (_, suspect), pytest.raises(InvalidInput, match="of one token"):
        suspect.trace((), (1, 2), _All())


def test_a_step_whose_chain_is_another_is_refused(
    file: GGUFFile, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exactmoe.model.decode import Decoder

    monkeypatch.setattr(Decoder, "_layer", lambda _self, _i, x, guess, _most: (x, guess))
    with decode_sides(file, "q8_k", device, None) as (_, suspect), pytest.raises(InvalidInput, match="another one"):
        suspect.trace((), (1,), _All())


def test_a_step_without_a_past_is_one_too(file: GGUFFile, device: torch.device) -> None:
    with decode_sides(file, "q8_k", device, None) as (reference, suspect):
        assert isinstance(reference, DecodeReference)
        assert isinstance(suspect, DecodeSteps)
        truth, served = (side.trace((), TOKEN, _All()) for side in (reference, suspect))
        assert np.array_equal(truth["lm_head", WHOLE_MODEL], served["lm_head", WHOLE_MODEL])


def test_the_command_takes_the_last_token_as_the_step(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bisect", str(model_file), "--suspect", "decode", "--tokens", "3,141,59,26"]
    assert main(arguments) == 0
    assert "BISECT: decode: clean, 18 of 18" in capsys.readouterr().out
    assert main([*arguments, "--past", "1"]) == 2
    assert main([*arguments, "--stage", "moe_ffn_out@0"]) == 2
    assert "gives no stage moe_ffn_out, but embedding, q, k, v" in capsys.readouterr().err


def test_the_command_judges_a_fused_kernel_of_ones_own(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from exactmoe.kernels.decode_experts import experts_down as ours\n"
        "def mine(activated, down, x, profile):\n"
        "    return ours(activated._replace(h=activated.h.flip(0).contiguous()), down, x, profile)\n"
    )
    arguments = ["bisect", str(model_file), "--tokens", "3,141,59,26", "--suspect", f"experts_down={path}:mine"]
    assert main([*arguments, "--html", str(tmp_path / "report.html")]) == 1
    out = capsys.readouterr().out
    assert "first wrong stage post_ffn_residual, layer 0, made here" in out
    assert (tmp_path / "report.html").stat().st_size > 1000
