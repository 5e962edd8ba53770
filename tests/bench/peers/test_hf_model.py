"""The peer that decodes the same file: its weights, by what it is judged, and when it gets no time. Its library and the
clock are stand-ins here."""

import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from exactmoe.bench import whole
from exactmoe.bench.clock import Times
from exactmoe.bench.peers import hf_model
from exactmoe.bench.peers import run as peers_run
from exactmoe.bench.peers.hf_model import Logits, load, rows, time_steps
from exactmoe.bench.peers.rows import Asked, PeerRow, collect
from exactmoe.bench.run import Run
from exactmoe.cli.main import main
from exactmoe.model.cache import KVCache
from exactmoe.model.config import Config
from exactmoe.model.forward import forward
from exactmoe.model.gguf.reader import GGUFFile, open_gguf
from exactmoe.model.weights import load_model


class Causal(torch.nn.Module):
    """The model of transformers 5 by its weights; what it answers is set from outside."""

    answer: Tensor
    asked: list[int]

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        d, v, e, f = config.hidden_size, config.vocab_size, config.num_experts, config.moe_intermediate_size
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        assert config.norm_topk_prob
        assert not config.tie_word_embeddings
        self.asked = []
        self.hold("model.embed_tokens.weight", v, d)
        for i in range(config.num_hidden_layers):
            layer = f"model.layers.{i}."
            shapes = {
                "input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,),
                "self_attn.q_proj.weight": (q, d), "self_attn.k_proj.weight": (kv, d),
                "self_attn.v_proj.weight": (kv, d), "self_attn.o_proj.weight": (d, q),
                "self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,),
                "mlp.gate.weight": (e, d), "mlp.experts.gate_up_proj": (e, 2 * f, d),
                "mlp.experts.down_proj": (e, d, f),
            }  # fmt: skip
            for name, shape in shapes.items():
                self.hold(layer + name, *shape)
        self.hold("model.norm.weight", d)
        self.hold("lm_head.weight", v, d)

    def hold(self, name: str, *shape: int) -> None:
        at: torch.nn.Module = self
        *path, last = name.split(".")
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        at.register_parameter(last, torch.nn.Parameter(torch.empty(shape)))

    def forward(self, tokens: Tensor) -> SimpleNamespace:
        assert tokens.shape == (1, len(self.answer))
        return SimpleNamespace(logits=self.answer[None])

    def generate(self, prompt: Tensor, max_new_tokens: int, min_new_tokens: int, do_sample: bool) -> None:
        assert (min_new_tokens, do_sample) == (max_new_tokens, False)
        self.asked.append(prompt.shape[1] + 1000 * max_new_tokens)


class Rotary(torch.nn.Module):
    """It has no weights."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        assert config.rope_theta > 1


@pytest.fixture
def file(model_file: Path) -> GGUFFile:
    return open_gguf(model_file)


@pytest.fixture
def config(file: GGUFFile) -> Config:
    return Config.from_gguf(file)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, transformers: Callable[..., None]) -> Callable[..., None]:
    """Puts a library there with a `causal` model, and a device with so many bytes `free`."""

    def put(causal: type = Causal, free: int = 2**40) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
        transformers(Qwen3MoeForCausalLM=causal, Qwen3MoeRotaryEmbedding=Rotary)

    put()
    return put


def test_every_weight_is_the_files_as_another_library_expands_it(
    library: Callable[..., None], file: GGUFFile, config: Config, model_file: Path, device: torch.device
) -> None:
    wanted = {}
    for tensor in gguf.GGUFReader(model_file).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        wanted[tensor.name] = torch.from_numpy(values.copy()).bfloat16()
    found = {name: value.cpu() for name, value in load(file, config, device).state_dict().items()}
    assert len(found) == 3 + 11 * config.n_layers
    for i in range(config.n_layers):
        ours, its = f"blk.{i}.", f"model.layers.{i}."
        gate_up = torch.cat([wanted[f"{ours}ffn_gate_exps.weight"], wanted[f"{ours}ffn_up_exps.weight"]], 1)
        assert torch.equal(found[f"{its}mlp.experts.gate_up_proj"], gate_up)
        assert torch.equal(found[f"{its}mlp.experts.down_proj"], wanted[f"{ours}ffn_down_exps.weight"])
        assert torch.equal(found[f"{its}mlp.gate.weight"], wanted[f"{ours}ffn_gate_inp.weight"])
        assert torch.equal(found[f"{its}input_layernorm.weight"], wanted[f"{ours}attn_norm.weight"])
        assert torch.equal(found[f"{its}post_attention_layernorm.weight"], wanted[f"{ours}ffn_norm.weight"])
        for part in ("q", "k", "v"):
            assert torch.equal(found[f"{its}self_attn.{part}_proj.weight"], wanted[f"{ours}attn_{part}.weight"])
        for part in ("q", "k"):
            assert torch.equal(found[f"{its}self_attn.{part}_norm.weight"], wanted[f"{ours}attn_{part}_norm.weight"])
        assert torch.equal(found[f"{its}self_attn.o_proj.weight"], wanted[f"{ours}attn_output.weight"])
    for its, ours in {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}.items():
        assert torch.equal(found[f"{its}.weight"], wanted[f"{ours}.weight"])


class Renamed(Causal):
    def hold(self, name: str, *shape: int) -> None:
        super().hold(name.replace("gate_up_proj", "up_gate_proj"), *shape)


class Transposed(Causal):
    def hold(self, name: str, *shape: int) -> None:
        super().hold(name, *(reversed(shape) if "down_proj" in name else shape))


class Bigger(Causal):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__(config)
        self.hold("model.layers.0.mlp.shared_expert", 3)


class Broken(Causal):
    def forward(self, tokens: Tensor) -> SimpleNamespace:
        raise RuntimeError("no such kernel\nfor this device")


def ours_of(config: Config) -> Logits:
    logits = torch.randn(3, config.vocab, generator=torch.Generator().manual_seed(0))
    return Logits([1, 2, 3], logits)


@pytest.mark.parametrize(
    ("causal", "why"),
    [(Renamed, "another form: model.layers.0.mlp.experts.gate_up_proj"), (Transposed, "another form: "),
     (Bigger, "weights that the file has not: model.layers.0.mlp.shared_expert"),
     (Broken, "RuntimeError: no such kernel")],
)  # fmt: skip
def test_a_library_that_is_put_together_otherwise_is_absent(
    causal: type, why: str, library: Callable[..., None], file: GGUFFile, config: Config, device: torch.device
) -> None:
    library(causal)
    (row,) = collect("transformers", lambda: rows(file, config, device, [0], ours_of(config)))
    assert why in row.absent
    assert "\n" not in row.absent


def test_a_model_that_does_not_fit_in_bf16_is_absent_before_anything_is_allocated(
    library: Callable[..., None], file: GGUFFile, config: Config, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = config
    attention = 2 * c.hidden * (c.n_heads + c.n_kv_heads) * c.head_dim
    moe = c.n_experts * (3 * c.hidden * c.expert_width + c.hidden)
    norms = 2 * c.hidden + 2 * c.head_dim
    need = 2 * (c.n_layers * (attention + moe + norms) + 2 * c.vocab * c.hidden + c.hidden)
    tried: list[str] = []
    monkeypatch.setattr(hf_model, "load", lambda *_: tried.append("loaded"))
    for free, loaded in ((need - 1, []), (need, ["loaded"])):
        library(free=free)
        (row,) = collect("transformers", lambda: rows(file, config, device, [0], ours_of(config)))
        assert tried == loaded
        assert ("GiB are free" in row.absent) == (not loaded)


@pytest.mark.parametrize(("spoil", "wrong"), [(0.0, False), (0.11, False), (0.13, True), (1.4, True)])
def test_a_row_is_judged_by_our_logits_and_timed_only_where_it_is_near(
    spoil: float, wrong: bool, library: Callable[..., None], file: GGUFFile, config: Config, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ours, timed = ours_of(config), []
    Causal.answer = ours.logits * (1 + spoil)
    Causal.answer[0] = -ours.logits[0]  # one token may route otherwise
    monkeypatch.setattr(hf_model, "time_steps", lambda *args: timed.append(args[-1]) or [3.0, 1.0, 2.0])
    found = list(rows(file, config, device, [0, 7], ours))
    assert [row.name for row in found] == ["decode-0", "decode-7"]
    assert [row.wrong for row in found] == [wrong] * 2
    assert [row.cold for row in found] == [None if wrong else Times(2.0, 1.0, 3.0)] * 2
    assert timed == ([] if wrong else [0, 7])
    assert ("WRONG" if wrong else f"{spoil:.1%} away") in str(found[0])


def test_a_context_that_does_not_fit_is_absent_and_the_others_are_not(
    library: Callable[..., None], file: GGUFFile, config: Config, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def time_steps(_model: Any, _config: Config, _device: torch.device, context: int) -> list[float]:
        if context:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried a lot. See the manual.")
        return [1.0]

    ours = ours_of(config)
    Causal.answer = ours.logits
    monkeypatch.setattr(hf_model, "time_steps", time_steps)
    first, second = rows(file, config, device, [0, 7], ours)
    assert first.cold == Times(1.0, 1.0, 1.0)
    assert (second.name, second.absent) == ("decode-7", "CUDA out of memory. Tried a lot")


def test_what_the_prompt_takes_is_not_in_a_step(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(asked=[])
    model.generate = lambda prompt, **more: Causal.generate(model, prompt, **more)  # type: ignore[arg-type]

    def elapsed(call: Any) -> float:
        call()
        prompt, tokens = model.asked[-1] % 1000, model.asked[-1] // 1000
        return 50.0 * prompt + 7.0 * tokens

    monkeypatch.setattr(hf_model, "elapsed", elapsed)
    assert time_steps(model, config, torch.device("cpu"), 9) == pytest.approx([7.0] * hf_model.RUNS)
    assert {asked % 1000 for asked in model.asked} == {9}
    assert model.asked[0] // 1000 == hf_model.TOKENS, "the first may compile, and does not count"


def test_our_logits_are_those_of_a_prompt(file: GGUFFile, config: Config, device: torch.device) -> None:
    model = load_model(file, device)
    ours = Logits.of(model, 2)
    assert ours.logits.shape == (2, config.vocab)
    assert ours.logits.device.type == "cpu"
    assert len(ours.tokens) == 2
    cache = KVCache.allocate(model, 2)
    for token, logits in zip(ours.tokens, ours.logits, strict=True):
        assert torch.equal(logits, forward(model, cache, [token]).cpu())


def test_our_logits_are_made_only_for_a_peer_that_is_judged_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Logits, "of", staticmethod(lambda model: f"of {model}"))
    llama, library = Asked("llama.cpp", Path("llama-bench")), Asked("transformers")
    assert peers_run.judge_of([llama], "ours") is None  # type: ignore[arg-type]
    assert peers_run.judge_of([llama, library], "ours") == "of ours"  # type: ignore[arg-type, comparison-overlap]


def test_our_model_is_gone_before_a_peer_takes_the_memory(
    model_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Held:
        """A model."""

    held: list[weakref.ref[Held]] = []

    def run_wholes(*_: Any) -> tuple[Any, Held]:
        model = Held()
        held.append(weakref.ref(model))
        return Run("d", "c", "a device", "1/2", {}, "n", "q8_k", "m", 1.0, 1.0, ()), model

    def peers(_asked: Any, file: GGUFFile, _config: Any, _device: Any, contexts: list[int], ours: str) -> Iterator[Any]:
        assert (held[0](), contexts, ours) == (None, [0], "logits")
        yield PeerRow("transformers", f"decode-0 of {Path(file.path).name}", cold=Times(1.0, 1.0, 1.0))

    monkeypatch.setattr(whole, "run_wholes", run_wholes)
    monkeypatch.setattr(whole, "refusal", lambda *_: None)
    monkeypatch.setattr(Logits, "of", staticmethod(lambda model: "logits" if type(model) is Held else "no model"))
    monkeypatch.setattr(peers_run, "model_peers", peers)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert main(["bench", "--model", str(model_file), "decode-0", "--peer", "transformers", "--json", "-"]) == 0
    said = capsys.readouterr()
    assert "transformers decode-0 of small.gguf" in said.err
    assert [row["name"] for row in json.loads(said.out)["peers"]] == ["decode-0 of small.gguf"]
