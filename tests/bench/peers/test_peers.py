"""Peers: their layer is judged before it is timed, and what is not here is said to be absent. The clock needs a GPU."""

import json
import math
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from exactmoe.bench.clock import Times
from exactmoe.bench.peers import hf_transformers, layer, llama_cpp, torch_grouped_mm
from exactmoe.bench.peers.layer import Layer, clear_rows, distance, exact, rows_of, run_layer
from exactmoe.bench.peers.rows import NEAR, Absent, Asked, PeerRow, collect, parse
from exactmoe.bench.peers.run import chunks_of, require_some
from exactmoe.cli.main import main
from exactmoe.kernels.errors import InvalidInput, MissingEnvironment

CPU = torch.device("cpu")
TOP = 3


def loop(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """A grouped product, group by group."""
    starts = [0, *ends.tolist()[:-1]]
    parts = [rows[a:b] @ weights[e] for e, (a, b) in enumerate(zip(starts, ends.tolist(), strict=True))]
    assert sum(len(part) for part in parts) == len(rows)
    return torch.cat(parts)


@pytest.fixture
def small() -> Layer:
    return Layer.random(CPU, 7, 64, 32)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(3)).bfloat16()


@pytest.mark.parametrize("grouped_mm", [loop, torch_grouped_mm.grouped_mm()], ids=["loop", "torch"])
def test_the_layer_in_bf16_is_close_to_the_layer_in_f64(small: Layer, x: Tensor, grouped_mm: layer.GroupedMM) -> None:
    far = distance(run_layer(small, x, TOP, grouped_mm), exact(small, x, TOP))
    assert 0 < far < NEAR


def swapped(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return loop(rows, weights.flip(0), ends)


def not_renormalised(weights: Layer, x: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    found = torch.softmax(x.float() @ weights.router.T, -1).topk(top_k, -1)
    return found.values, found.indices


def test_a_layer_with_a_mistake_is_far(small: Layer, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = exact(small, x, TOP)
    assert distance(run_layer(small, x, TOP, swapped), wanted) > NEAR
    monkeypatch.setattr(layer, "choose", not_renormalised)
    assert distance(run_layer(small, x, TOP, loop), wanted) > NEAR


def test_the_rows_taken_are_those_whose_choice_rounding_changes_last(small: Layer) -> None:
    x = torch.randn(40, small.gate.shape[2], generator=torch.Generator().manual_seed(3)).bfloat16()
    taken = clear_rows(small, x, 5, 2)

    def gap(row: Tensor) -> float:
        logits = sorted((row.float() @ small.router.T).tolist())
        return logits[-2] - logits[-3]

    # One product of 40 rows and 40 of one may differ in the last bit, and no two gaps here are as close as that.
    wanted = sorted(range(40), key=lambda i: gap(x[i]), reverse=True)[:5]
    assert torch.equal(taken, x[wanted])
    assert not torch.equal(taken, x[:5])


def test_a_number_that_is_none_is_infinitely_far() -> None:
    assert distance(torch.tensor([math.nan]), torch.tensor([1.0], dtype=torch.float64)) == math.inf


@pytest.fixture
def tiny_rows(monkeypatch: pytest.MonkeyPatch, small: Layer) -> list[int]:
    """Layers of a few weights, a clock without a GPU that says 2 us, and the number of calls each timing was given."""
    timed: list[int] = []

    def time_graph(calls):
        for call in calls:
            call()
        timed.append(len(calls))
        return Times(2.0, 1.0, 3.0)

    for name, value in {"A": TOP, "D": 64, "E": 7, "F": 32, "ROTATED": 2**16}.items():
        monkeypatch.setattr(layer, name, value)
    monkeypatch.setattr(layer, "time_graph", time_graph)
    monkeypatch.setattr(Layer, "random", staticmethod(lambda _device, seed=0: small))
    return timed


def test_a_right_peer_is_timed_on_enough_copies(tiny_rows: list[int]) -> None:
    found = list(rows_of("p", "p 1", "bf16", CPU, lambda w: lambda x: run_layer(w, x, TOP, loop), (8, 1)))
    assert [row.name for row in found] == ["moe-layer-1", "moe-layer-8"]
    assert not any(row.wrong for row in found)
    one = TOP * 6 * 64 * 32
    assert tiny_rows[0] == -(-(2**16) // one) == 2
    assert found[0].gb_s == pytest.approx(one / 2.0 / 1000)
    assert "% away" in str(found[0])


def test_a_wrong_peer_gets_no_time(tiny_rows: list[int]) -> None:
    found = list(rows_of("p", "p 1", "bf16", CPU, lambda w: lambda x: run_layer(w, x, TOP, swapped), (1, 8)))
    assert [(row.wrong, row.cold) for row in found] == [(True, None)] * 2
    assert tiny_rows == []
    assert "WRONG" in str(found[0])


def test_a_number_of_tokens_that_does_not_fit_is_absent_and_the_others_are_not(tiny_rows: list[int]) -> None:
    def run(w: Layer, x: Tensor) -> Tensor:
        if len(x) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 192.00 GiB. GPU 0 has other advice.")
        return run_layer(w, x, TOP, loop)

    first, second, third = rows_of("p", "p 1", "bf16", CPU, lambda w: lambda x: run(w, x), (1, 8, 9))
    assert (first.absent, third.absent) == ("", "")
    assert first.cold == third.cold == Times(2.0, 1.0, 3.0)
    assert second == layer.PeerRow(
        "p", "moe-layer-8", version="p 1", absent="CUDA out of memory. Tried to allocate 192.00 GiB"
    )


def test_a_torch_without_the_product_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.functional, "grouped_mm", raising=False)
    monkeypatch.delattr(torch, "_grouped_mm", raising=False)
    (row,) = collect("torch-grouped-mm", lambda: torch_grouped_mm.rows(CPU, [1]))
    assert row.absent.endswith("has no grouped_mm")
    assert "absent" in str(row)


class Block(torch.nn.Module):
    """As transformers 5 puts its layer together."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        e, f, d = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.top = config.num_experts_per_tok
        self.gate = torch.nn.Linear(d, e, bias=False)
        self.experts = torch.nn.Module()
        self.experts.gate_up_proj = torch.nn.Parameter(torch.empty(e, 2 * f, d))
        self.experts.down_proj = torch.nn.Parameter(torch.empty(e, d, f))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.experts.gate_up_proj.chunk(2, 1)
        weights = Layer(self.gate.weight.float(), gate, up, self.experts.down_proj)
        return run_layer(weights, x[0], self.top, loop)[None]


class Other(torch.nn.Module):
    """A layer in another form."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(config.hidden_size, config.num_experts)


def test_the_block_of_transformers_runs_on_our_weights(
    transformers: Callable[..., None], small: Layer, x: Tensor
) -> None:
    transformers(Qwen3MoeSparseMoeBlock=Block)
    weights = small._replace(router=small.router.bfloat16().float())
    call = hf_transformers.block(weights, TOP, "grouped_mm")
    assert 0 < distance(call(x), exact(weights, x, TOP)) < NEAR


def test_a_block_in_another_form_and_no_transformers_are_absent(
    transformers: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tiny_rows: list[int]
) -> None:
    transformers(Qwen3MoeSparseMoeBlock=Other)
    (row,) = collect("transformers", lambda: hf_transformers.layer_rows(CPU, [1]))
    assert "another form" in row.absent

    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(hf_transformers, "version", version)
    (row,) = collect("transformers", lambda: hf_transformers.layer_rows(CPU, [1]))
    assert row.absent == "transformers is not installed"


ANSWER = [
    {
        "n_prompt": 0,
        "n_gen": 128,
        "n_depth": 64,
        "samples_ts": [200.0, 250.0],
        "build_number": 7,
        "build_commit": "0c1e570",
        "more": 1,
    },
    {"n_prompt": 512, "n_gen": 0, "n_depth": 64, "samples_ts": [9000.0], "build_number": 7, "build_commit": "0c1e570"},
]


def bench(tmp_path: Path, says: str, status: int = 0) -> Path:
    """A program that prints `says`, puts its arguments beside itself and ends with `status`."""
    program = tmp_path / "llama-bench"
    program.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\ncat {tmp_path}/says\necho some trouble >&2\nexit {status}\n'
    )
    (tmp_path / "says").write_text(says)
    program.chmod(0o755)
    return program


def test_llama_bench_is_asked_and_its_answer_read(tmp_path: Path) -> None:
    (row,) = llama_cpp.rows(bench(tmp_path, json.dumps(ANSWER)), Path("m.gguf"), 64)
    assert row.cold == Times(4500.0, 4000.0, 5000.0)
    assert (row.name, row.version) == ("decode-64", "b7 0c1e570")
    said = (tmp_path / "arguments").read_text().split()
    assert said[said.index("-d") + 1] == "64"
    assert said[said.index("-m") + 1] == "m.gguf"


@pytest.mark.parametrize(
    ("says", "status", "why"),
    [("", 3, "ended with 3: some trouble"), ("no json", 0, "printed no JSON"), ("[]", 0, "no list of tests"),
     (json.dumps([{"n_prompt": 0}]), 0, "gives no n_gen, n_depth, samples_ts, build_number, build_commit"),
     (json.dumps(ANSWER[1:]), 0, "ran no test of 128 tokens after 64")],
)  # fmt: skip
def test_a_llama_bench_that_fails_or_answers_otherwise_is_absent(
    tmp_path: Path, says: str, status: int, why: str
) -> None:
    program = bench(tmp_path, says, status)
    (row,) = collect("llama.cpp", lambda: llama_cpp.rows(program, Path("m.gguf"), 64))
    assert why in row.absent


@pytest.mark.parametrize(
    ("asked", "whole", "why"),
    [([["vllm"]], False, "no peer is named vllm; there are torch-grouped-mm"),
     ([["llama.cpp"]], True, "takes the path"), ([["llama.cpp", "/nowhere"]], True, "is no program"),
     ([["llama.cpp", "/nowhere"]], False, "peer of a --model"), ([["transformers", "x"]], False, "takes nothing more"),
     ([["torch-grouped-mm"]], True, "no peer of a --model")],
)  # fmt: skip
def test_a_peer_that_cannot_be_asked_is_refused(asked: list[list[str]], whole: bool, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        parse(asked, whole)


def test_peers_are_parsed(tmp_path: Path) -> None:
    program = bench(tmp_path, "")
    assert parse([["transformers"]], False) == [Asked("transformers")]
    assert parse([["llama.cpp", str(program)]], True) == [Asked("llama.cpp", program)]


def test_rows_are_given_as_they_come() -> None:
    def rows() -> Iterator[PeerRow]:
        yield PeerRow("a", "x")
        raise Absent("gone")

    found = collect("a", rows)
    assert next(found).name == "x"
    assert [row.absent for row in found] == ["gone"]


def test_the_layers_of_peers_are_those_that_were_chosen() -> None:
    assert chunks_of(["qkv", "moe-layer-1", "norm-8", "moe-layer-512"]) == [1, 512]
    with pytest.raises(InvalidInput, match="none of qkv, norm-8 is a moe-layer-N"):
        chunks_of(["qkv", "norm-8"])


def test_where_every_peer_is_absent_nothing_was_compared() -> None:
    here, gone = PeerRow("a", "x", cold=Times(1.0, 1.0, 1.0), error=0.0), PeerRow("b", "", absent="not here")
    require_some([here, gone])
    with pytest.raises(MissingEnvironment, match="nothing was compared"):
        require_some([gone])


def test_the_command_refuses_a_peer_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "qkv", "--peer", "vllm"]) == 2
    assert "there are torch-grouped-mm, transformers, llama.cpp" in capsys.readouterr().err
    assert main(["bench", "qkv", "--peer", "transformers", "--compare", "HEAD"]) == 2
    capsys.readouterr()
    assert main(["bench", "qkv", "--peer", "torch-grouped-mm"]) == 2
    assert "none of qkv is a moe-layer-N" in capsys.readouterr().err
