"""A step repeated: one digest where it is the same, more where one bit of one repeat is another."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from exactmoe.bench.repeats import repeats
from exactmoe.cli.main import main
from exactmoe.kernels.errors import InvalidInput
from exactmoe.model.decode import Decoder
from exactmoe.model.weights import Model, load_model


def pretended(decoder: Decoder) -> None:
    """What a step leaves, without a kernel."""
    cache = decoder._cache
    for part in (decoder.logits, *(p[:, cache.length] for p in (cache.k, cache.k_scale, cache.v, cache.v_scale))):
        part.fill_(5)
    decoder.token.fill_(7)
    cache.length += 1


@pytest.fixture
def model(model_file: Path, device: torch.device) -> Model:
    return load_model(model_file, device)


def test_a_step_leaves_the_same_bits_every_time(model: Model) -> None:
    three, four = repeats(model, 3, 2), repeats(model, 4, 2)
    assert (*three.values(), *four.values()) == (2, 2)
    assert three.keys().isdisjoint(four.keys())


@pytest.mark.parametrize("what", ["logits", "token", "k", "k_scale", "v", "v_scale"])
def test_one_bit_of_one_repeat_shows(model: Model, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def step(self: Decoder) -> None:
        nonlocal steps
        pretended(self)
        steps += 1
        if steps == 2:
            part = getattr(self, what) if hasattr(self, what) else getattr(self._cache, what)[-1, 3]
            bits = part.view({2: torch.int16, 4: torch.int32}[part.element_size()])
            bits.view(-1)[-1] ^= 1

    monkeypatch.setattr(Decoder, "step", step)
    assert sorted(repeats(model, 3, 3).values()) == [1, 2]


def test_what_a_step_would_read_behind_the_context_is_poison(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def step(self: Decoder) -> None:
        seen.append(bool(self._cache.k_scale[:, 3:].isnan().all()) and not self._cache.k_scale[:, :3].isnan().any())
        pretended(self)

    monkeypatch.setattr(Decoder, "step", step)
    repeats(model, 3, 2)
    assert seen == [True, True]


@pytest.mark.parametrize(("context", "times", "why"), [(0, 1, "one step is no repeat"), (-1, 2, "a context has 0")])
def test_what_is_no_repeat_is_refused(model: Model, context: int, times: int, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        repeats(model, context, times)


def test_the_command(model_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["bench", "--model", str(model_file), "--repeat", "2", "--context", "1", "--json", "-"]) == 0
    said = capsys.readouterr()
    assert "2 steps after 1 positions, q8_k: all the same\n" in said.err
    found = json.loads(said.out)
    assert (found["context"], found["repeats"], list(found["digests"].values())) == (1, 2, [2])
    monkeypatch.setattr("exactmoe.bench.repeats.repeats", lambda *_: Counter(a=1, b=2))
    assert main(["bench", "--model", str(model_file), "--repeat", "3"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "     2 times b", "     1 times a", "3 steps after 0 positions, q8_k: 2 different",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "why"),
    [(["--repeat", "1"], "one step is no repeat"), (["--repeat", "2", "--context", "-1"], "got -1"),
     (["--repeat", "2", "--context", "64"], "none is behind 64"), (["decode-0", "--repeat", "2"], "no names"),
     (["--list", "--repeat", "2"], "--list"),
     (["--repeat", "2", "--record"], "--record"), (["--repeat", "2", "--trace", "x.json"], "--trace")],
)  # fmt: skip
def test_the_command_refuses_before_it_loads(
    model_file: Path, more: list[str], why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exactmoe.model.weights.load_model", None)
    assert main(["bench", "--model", str(model_file), *more]) == 2
    assert why in capsys.readouterr().err


def test_the_command_refuses_a_repeat_of_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--repeat", "2"]) == 2
    assert "of a --model" in capsys.readouterr().err
