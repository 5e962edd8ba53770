"""The rows of a whole model: judged by another way through production, refused by name, and recorded with what they
are."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from exactmoe.bench import whole as wholly
from exactmoe.bench.clock import Times
from exactmoe.bench.run import Roofs
from exactmoe.bench.step import prepare
from exactmoe.bench.whole import (
    Whole,
    as_in_file,
    decode_bytes,
    holds_what_it_should,
    judge_decode,
    judge_load,
    judge_prefill,
    prefill_bytes,
    prefill_flops,
    refusal,
    run_wholes,
    wholes,
)
from exactmoe.cli.main import main
from exactmoe.kernels.decode_experts import Activated
from exactmoe.kernels.errors import InvalidInput, MissingEnvironment
from exactmoe.model import decode, forward
from exactmoe.model.cache import KVCache
from exactmoe.model.capacity import WORKSPACE, kv_bytes, needed
from exactmoe.model.config import Config
from exactmoe.model.gguf.reader import GGUFFile, open_gguf
from exactmoe.model.weights import Model, from_file, load_model

GIB = 2**30


@pytest.fixture(scope="module")
def file(model_file: Path) -> GGUFFile:
    return open_gguf(model_file)


@pytest.fixture
def config(file: GGUFFile) -> Config:
    return Config.from_gguf(file)


@pytest.fixture
def model(model_file: Path, device: torch.device) -> Model:
    return load_model(model_file, device)


def test_the_table_has_the_contexts_the_prompts_loading_and_memory() -> None:
    assert list(wholes()) == [
        "load", "memory-loaded", "decode-0", "decode-4096", "decode-32768",
        "prefill-512", "prefill-1024", "prefill-2048", "prefill-4096", "memory-most",
    ]  # fmt: skip


@pytest.mark.parametrize("context", [0, 17])
def test_steps_choose_what_one_chunk_of_their_tokens_chooses(model: Model, context: int) -> None:
    right, digest = judge_decode(model, prepare(model, context, 3))
    assert right
    assert len(digest) == 64


def test_a_prompt_leaves_what_its_other_way_leaves(model: Model) -> None:
    right, digest = judge_prefill(model, 7, chunk=3, single=2)
    assert right
    assert digest != judge_prefill(model, 4, chunk=3, single=1)[1]


def one_key_less(real: Callable[..., Any]) -> Callable[..., Any]:
    """Attention that does not see position 0."""

    def op(*args: Any) -> Any:
        kv = next(arg for arg in args if hasattr(arg, "k_scale"))
        kept = kv.k[0].clone()
        kv.k[0] = 0
        out = real(*args)
        kv.k[0] = kept
        return out

    return op


def negated(real: Callable[..., Any]) -> Callable[..., Any]:
    """The op with its result's sign turned: of a tuple of results, the first's."""

    def op(*args: Any, **kwargs: Any) -> Any:
        out = real(*args, **kwargs)
        return out._replace(h=-out.h) if isinstance(out, Activated) else -out

    return op


@pytest.mark.parametrize(
    ("module", "op", "wrong"),
    [(decode, "decode_attention", one_key_less), (decode, "experts_up", negated), (forward, "attend", one_key_less),
     (forward, "moe_ffn", negated)],
)  # fmt: skip
def test_a_mistake_in_either_way_is_seen_by_both_judgements(
    model: Model, module: Any, op: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, op, wrong(getattr(module, op)))
    assert not judge_decode(model, prepare(model, 5, 3))[0]
    assert not judge_prefill(model, 5, chunk=3, single=2)[0]


def test_a_step_that_chooses_another_token_than_its_largest_logit_is_seen(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "choose", lambda logits, token, position: (token.fill_(3), position.add_(1)))
    assert not judge_decode(model, prepare(model, 0, 3))[0]


def test_two_ways_that_agree_on_nan_are_not_right() -> None:
    numbers, nan = {"x": torch.ones(2)}, {"x": torch.full((2,), float("nan"))}
    assert wholly._same(numbers, numbers)
    assert not wholly._same(nan, nan)


def test_what_is_held_as_in_the_file_is_all_but_the_routers(model: Model, file: GGUFFile) -> None:
    left = file.tensors.keys() - dict(as_in_file(model)).keys()
    assert left == {f"blk.{i}.ffn_gate_inp.weight" for i in range(model.config.n_layers)}
    assert judge_load(model, file)[0]


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.attn_k_norm.weight", "blk.0.ffn_down_exps.weight"])
def test_one_byte_that_is_not_the_files_is_seen(
    model: Model, file: GGUFFile, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(file: GGUFFile, asked: str) -> torch.Tensor:
        tensor = from_file(file, asked).clone()
        tensor.view(torch.uint8).flatten()[7] ^= asked == name
        return tensor

    monkeypatch.setattr(wholly, "from_file", other)
    assert not judge_load(model, file)[0]


def test_a_tensor_that_no_field_holds_is_seen(model: Model, file: GGUFFile, monkeypatch: pytest.MonkeyPatch) -> None:
    held = dict(as_in_file(model))
    del held["blk.1.attn_output.weight"]
    monkeypatch.setattr(wholly, "as_in_file", lambda _: held.items())
    assert not judge_load(model, file)[0]


def test_planes_that_do_not_fit_the_file_are_seen(model: Model, file: GGUFFile) -> None:
    model.packed.output.words.bitwise_not_()
    assert not judge_load(model, file)[0]


def test_a_model_holds_what_the_rule_says_and_no_second_copy(file: GGUFFile, config: Config) -> None:
    rule = needed(file, config).total - WORKSPACE
    assert [holds_what_it_should(n, file) for n in (rule - 1, rule, rule + rule // 200, 2 * rule)] == [
        False, True, True, False,
    ]  # fmt: skip


def test_the_bytes_of_a_step_grow_by_the_keys_and_values_of_its_context(file: GGUFFile, config: Config) -> None:
    row = 2 * config.n_layers * config.n_kv_heads * (2 * config.head_dim + 4)
    assert kv_bytes(config) == row
    assert decode_bytes(Whole("decode", 9), file) - decode_bytes(Whole("decode", 2), file) == 7 * row


def test_a_prompt_reads_each_weight_once_and_multiplies_by_those_on_its_way(file: GGUFFile, config: Config) -> None:
    c, T = config, 10
    attention = c.hidden * c.head_dim * (2 * c.n_heads + 2 * c.n_kv_heads)
    layer = attention + c.hidden * c.n_experts + 3 * c.n_active * c.expert_width * c.hidden
    norms = c.n_layers * (2 * c.hidden + 2 * c.head_dim) + c.hidden
    pairs = sum(t + 1 for t in range(T)) * c.n_layers * c.n_heads * 2 * c.head_dim  # of queries and keys, and of values
    by_hand = 2 * (T * (c.n_layers * layer + norms) + c.vocab * c.hidden + pairs)
    assert prefill_flops(Whole("prefill", T), file) == by_hand
    table = file.tensors["token_embd.weight"].nbytes
    rest = sum(info.nbytes for info in file.tensors.values()) - table
    assert prefill_bytes(Whole("prefill", T), file) == rest + table * T // c.vocab


def test_a_row_beyond_the_model_or_the_device_is_refused_by_name(
    file: GGUFFile, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (GIB, 2 * GIB))
    assert refusal(Whole("prefill", 64), file, config, cuda) is None
    long = refusal(Whole("prefill", 65), file, config, cuda)
    assert isinstance(long, InvalidInput)
    assert str(long) == "prefill-65 takes 65 positions, the model's context has 64"
    assert "decode-0 takes 128 positions" in str(refusal(Whole("decode", 0), file, config, cuda))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (GIB // 2, 2 * GIB))
    large = refusal(Whole("load"), file, config, cuda)
    assert isinstance(large, MissingEnvironment)
    assert "load of" in str(large) and "GiB" in str(large)


@pytest.fixture
def device_of_numbers(monkeypatch: pytest.MonkeyPatch, file: GGUFFile) -> None:
    """What the rows ask of a GPU, answered without one: 3 us a step, 50 a prompt, 2 GiB in use and then 5."""
    held = needed(file, Config.from_gguf(file)).total - WORKSPACE
    allocated, free = iter((0, held)), iter((7 * GIB, 8 * GIB, *[5 * GIB] * 20))
    monkeypatch.setattr(wholly, "TOKENS", 3)
    monkeypatch.setattr(wholly, "require_cuda", lambda _: None)
    monkeypatch.setattr(Roofs, "of", staticmethod(lambda _: Roofs(2.0, 1.0)))
    monkeypatch.setattr(wholly, "time_steps", lambda sequence, sampler: [3.0] * 5)
    monkeypatch.setattr(wholly, "time_prefill", lambda model, tokens, sampler: [50.0] * 5)
    monkeypatch.setattr("exactmoe.bench.clock.elapsed", lambda load: load() or 8.0)
    monkeypatch.setattr(wholly, "host_bandwidth", lambda _: 4.0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: next(allocated))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (next(free), 10 * GIB))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a device")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="12-ab"))
    monkeypatch.setattr("exactmoe.bench.run.keep_busy", lambda _: None)


def test_prompts_begin_with_an_empty_cache_behind_one_that_compiles(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wholly, "require_cuda", lambda _: None)
    lengths: list[int] = []

    def prefill(_model: Model, cache: KVCache, ids: list[int]) -> list[int]:
        lengths.append(cache.length)
        cache.length += len(ids)
        return ids

    monkeypatch.setattr(wholly, "prefill", prefill)

    def sampler(
        prepare: Callable[[], None], work: Callable[[], Any], rounds: int, warmup: int = 0, calls: int = 1
    ) -> list[float]:
        assert (warmup, calls) == (1, 1)
        for _ in range(2):
            prepare()
            assert work() == wholly.prompt_of(model, 5)
        return [7.0] * rounds

    assert wholly.time_prefill(model, 5, 3, sampler) == [7.0] * 3
    assert lengths == [0, 0]


ROWS = [Whole("load"), Whole("memory-loaded"), Whole("decode", 4), Whole("prefill", 5), Whole("memory-most")]


def test_a_run_has_every_row_and_says_which_model_it_was(
    device_of_numbers: None, file: GGUFFile, device: torch.device
) -> None:
    found, model = run_wholes(ROWS, file, device, "q8_k")
    rows = {row.name: row for row in found.rows}
    assert [rows[name].case for name in ("decode-4", "prefill-5")] == ["3 steps", "chunks of 512"]
    assert list(rows) == ["load", "memory-loaded", "decode-4", "prefill-5", "memory-most"]
    assert all(row.equal for row in found.rows)
    assert (rows["decode-4"].cold, rows["prefill-5"].cold) == (Times(3.0, 3.0, 3.0), Times(50.0, 50.0, 50.0))
    assert rows["decode-4"].gb_s == pytest.approx(decode_bytes(Whole("decode", 4), file) / 3000)
    assert rows["load"].cold == Times(8.0, 8.0, 8.0)
    assert rows["load"].roof == pytest.approx((rows["load"].gb_s or 0) / 4)
    assert (rows["memory-loaded"].gib, rows["memory-most"].gib) == (2.0, 5.0)
    assert found.model.endswith(f"random weights), {file.nbytes:,} bytes")
    assert model.device == device


def test_a_model_that_is_wrong_gets_no_number(
    device_of_numbers: None, file: GGUFFile, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "experts_up", negated(decode.experts_up))
    monkeypatch.setattr(wholly, "holds_what_it_should", lambda *_: False)
    found, _ = run_wholes(ROWS, file, device, "q8_k")
    nothing = (False, None, None, None, None)
    assert [(row.equal, row.cold, row.gib, row.gb_s, row.roof) for row in found.rows] == [nothing] * len(ROWS)


def test_the_command_lists_what_runs_and_refuses_what_was_asked_for_and_cannot(
    model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--model", str(model_file), "--list"]) == 0
    said = capsys.readouterr().out
    assert "decode-32768         not run: decode-32768 takes 32896 positions, the model's context has 64\n" in said
    assert said.endswith("\nload\nmemory-loaded\nmemory-most\n")
    refused = [["decode-4096"], ["load", "decode-4096"], ["no-such"], ["load", "--context", "0"]]
    for names in [*refused, ["--context", "7"], ["--context", "-1"], ["--compare", "HEAD"]]:
        assert main(["bench", "--model", str(model_file), *names]) == 2, names
        assert capsys.readouterr().err.count("error") == 1
