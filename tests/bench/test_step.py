"""A decode step after a context: what lies in the cache, and what follows. Its clock needs a GPU."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from exactmoe.bench import step
from exactmoe.bench.step import FIRST, follow, prepare, time_run, time_steps
from exactmoe.kernels.errors import MissingEnvironment
from exactmoe.model.weights import Model, load_model


@pytest.fixture
def model(model_file: Path, device: torch.device) -> Model:
    return load_model(model_file, device)


def test_a_context_is_made_of_numbers_and_poison_lies_behind_it(model: Model) -> None:
    cache = prepare(model, 9, 3).cache
    assert (cache.length, cache.capacity) == (9, 12)
    for part, bound in ((cache.k, 16256), (cache.v, 8192)):
        written = part[:, :9].int()
        assert written.unique().numel() > 0.8 * written.numel()
        assert int(written.abs().max()) <= bound
        assert bool((part[:, 9:] == -1).all())
    for scale in (cache.k_scale, cache.v_scale):
        assert bool(torch.isfinite(scale[:, :9]).all()) and bool((scale[:, :9] > 0).all())
        assert bool(torch.isnan(scale[:, 9:]).all())


def test_each_run_of_a_sequence_chooses_the_same_tokens(model: Model) -> None:
    sequence = prepare(model, 5, 3)
    (tokens, logits), (again, _) = follow(sequence), follow(sequence)
    assert tokens.tolist() == again.tolist()
    assert tokens[0] == FIRST
    assert tokens[1:].tolist() == logits.argmax(1).tolist()
    assert sequence.cache.length == 8


def test_each_round_goes_back_to_the_context_and_takes_all_steps(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "require_cuda", lambda _: None)
    sequence = prepare(model, 5, 3)
    asked: list[tuple[int, int, int]] = []

    def sampler(
        prepare: Callable[[], None], work: Callable[[], object], rounds: int, warmup: int = 0, calls: int = 1
    ) -> list[float]:
        for _ in range(2):
            prepare()
            assert (sequence.cache.length, sequence.decoder.token.tolist()) == (5, [FIRST])
            work()
            assert sequence.cache.length == 8
        asked.append((rounds, warmup, calls))
        return [2.0] * rounds

    assert time_steps(sequence, 4, sampler) == [2.0] * 4
    monkeypatch.setattr(step, "sample", sampler)
    assert time_run(sequence) == 2.0
    assert asked == [(4, 1, 3), (1, 0, 3)]


def test_there_is_no_time_without_a_gpu() -> None:
    on_the_cpu = SimpleNamespace(device=torch.device("cpu"), cache=SimpleNamespace(k=torch.empty(0)))
    with pytest.raises(MissingEnvironment, match="CUDA device"):
        time_steps(on_the_cpu)
