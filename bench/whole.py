"""The benchmarks of a whole model, and what each of them is judged by before it is timed.

    decode-N       TOKENS greedy steps after N positions         every step's logits and choice are those of the same
                                                                 tokens as one chunk, which takes the way of prompts
    prefill-N      a prompt of N tokens                          last logits and cache are those of chunks of 100 tokens
                                                                 with the last four as decode steps
    load           from a file in the page cache to a model      every tensor on the device has the file's bytes, and
                                                                 a few steps pass the judgement of decode-N
    memory-loaded  GiB in use on the device once it is loaded    what the model holds is what model.capacity says
    memory-most    GiB in use at most, over the rows run         as memory-loaded

Both ways are production's own: `exactmoe parity` compares them with the reference, which a model of 30 B is too large
for. The memory in use is all of the device's, the driver's context and other processes included."""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from exactmoe.bench.clock import Sampler, Times, host_bandwidth, sample
from exactmoe.bench.run import Judged, Roofs, Row, Run, describe
from exactmoe.bench.step import RUNS, TOKENS, Sequence, follow, poison, poisoned, prepare, require_cuda, time_steps
from exactmoe.kernels.argmax import argmax
from exactmoe.kernels.errors import InvalidInput, MissingEnvironment, require
from exactmoe.model.cache import KVCache
from exactmoe.model.capacity import kv_bytes, needed, require_capacity
from exactmoe.model.config import Config
from exactmoe.model.forward import forward, prefill
from exactmoe.model.gguf.reader import GGUFFile
from exactmoe.model.inspect import active_parameters, bytes_per_token
from exactmoe.model.weights import Model, from_file, load_model
from exactmoe.parity.bits import compare, digest

CONTEXTS = (0, 4096, 32768)
PROMPTS = (512, 1024, 2048, 4096)
LOADS = 3
_CHUNK, _SINGLE = 100, 4  # a prompt's other way: chunks, then single tokens
_GIB = 2**30
_FIELDS = {  # of a layer, by the names in the file; its router is held in fixed point
    "attn_norm": "attn_norm", "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm", "attn_output": "attn_output", "ffn_norm": "ffn_norm",
}  # fmt: skip


class Whole(NamedTuple):
    """One row: its kind, and the tokens of its context or prompt."""

    kind: str
    tokens: int = 0

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"{self.kind}-{self.tokens}" if self.kind in ("decode", "prefill") else self.kind

    @property
    def positions(self) -> int:
        """That its sequence reaches."""
        return self.tokens + {"decode": TOKENS, "load": _SINGLE}.get(self.kind, 0)


def wholes() -> dict[str, Whole]:
    """The table, by name; the row that has the say on memory comes last."""
    rows = [Whole("load"), Whole("memory-loaded"), *(Whole("decode", n) for n in CONTEXTS),
            *(Whole("prefill", n) for n in PROMPTS), Whole("memory-most")]  # fmt: skip
    return {row.name: row for row in rows}


def decode_rows() -> dict[str, Whole]:
    """Those of the decode step."""
    return {name: row for name, row in wholes().items() if row.kind == "decode"}


def refusal(row: Whole, file: GGUFFile, config: Config, device: torch.device) -> Exception | None:
    """Why a row cannot run on this model and device, before anything is loaded; None where it can."""
    try:
        longest = f"{row.name} takes {row.positions} positions, the model's context has {config.context_length}"
        require(row.positions <= config.context_length, longest)
        require_capacity(needed(file, config, row.positions), device, f"{row.name} of {file.path}")
    except (InvalidInput, MissingEnvironment) as error:
        return error
    return None


def run_wholes(
    chosen: Iterable[Whole],
    file: GGUFFile,
    device: torch.device,
    profile: str,
    progress: Callable[[Row], None] | None = None,
    loading: Callable[[int, int], None] | None = None,
) -> tuple[Run, Model]:
    """Judge and time rows of the model in `file`; the model beside them. Raises MissingEnvironment without CUDA."""
    bench = ModelBench(file, device, profile, loading)
    rows = []
    for whole in chosen:
        rows.append(bench.row(whole))
        if progress:
            progress(rows[-1])
    return bench.describe(rows), bench.model


class ModelBench:
    """A model under measurement, and the most memory that was seen in use. Raises MissingEnvironment without CUDA."""

    def __init__(
        self, file: GGUFFile, device: torch.device, profile: str,
        loading: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        require_cuda(device)
        self.file, self.device, self.profile, self.roofs = file, device, profile, Roofs.of(device)
        self.config = Config.from_gguf(file)
        release()
        before = torch.cuda.memory_allocated(device)
        self.model = self._load(loading)
        self._held = torch.cuda.memory_allocated(device) - before
        self._most = self._in_use()  # the allocator keeps what was taken, until it is told to release
        release()
        self._loaded = self._in_use()

    def row(self, whole: Whole, sampler: Sampler = sample) -> Row:
        """Judge one row, and time it where it is right."""
        kinds = {"decode": self._decode, "prefill": self._prefill, "load": self._reload}
        row = kinds.get(whole.kind, self._memory)(whole, sampler)
        release()
        return row

    def describe(self, rows: list[Row]) -> Run:
        """Rows of this model with the circumstances of now."""
        name = f"{self.file.metadata.get('general.name', 'unnamed')}, {self.file.nbytes:,} bytes"
        return describe(self.device, self.profile, self.roofs, rows, name)

    def _decode(self, whole: Whole, sampler: Sampler) -> Row:
        sequence = prepare(self.model, whole.tokens, TOKENS)
        judged = judge_decode(self.model, sequence)
        times = self._production(lambda: time_steps(sequence, sampler=sampler), judged)
        return Row.of(whole.name, f"{TOKENS} steps", 1, judged, times, self.roofs, decode_bytes(whole, self.file))

    def _prefill(self, whole: Whole, sampler: Sampler) -> Row:
        judged = judge_prefill(self.model, whole.tokens)
        times = self._production(lambda: time_prefill(self.model, whole.tokens, sampler=sampler), judged)
        size, flops = prefill_bytes(whole, self.file), prefill_flops(whole, self.file)
        return Row.of(whole.name, "chunks of 512", whole.tokens, judged, times, self.roofs, size, flops)

    def _reload(self, whole: Whole, sampler: Sampler) -> Row:
        judged = judge_load(self.model, self.file)
        times = Times.of(sampler(self._drop, self._take, LOADS)) if judged[0] else None
        roofs = Roofs(host_bandwidth(self.device), self.roofs.matmul_tflop_s)
        return Row.of(whole.name, f"{self.file.nbytes:,} bytes", 0, judged, times, roofs, self.file.nbytes)

    def _memory(self, whole: Whole, _: Sampler) -> Row:
        right = holds_what_it_should(self._held, self.file)
        row = Row.of(whole.name, "in use", 0, (right, ""), None, self.roofs, 0)
        gib = (self._loaded if whole.kind == "memory-loaded" else self._most) / _GIB
        return replace(row, gib=gib) if right else row

    def _production(self, timed: Callable[[], list[float]], judged: Judged) -> Times | None:
        """The times of what production does, and the memory it takes without that of the judgement."""
        if not judged[0]:
            return None
        release()
        times = Times.of(timed())
        self._most = max(self._most, self._in_use())
        return times

    def _drop(self) -> None:
        del self.model
        release()

    def _take(self) -> None:
        self.model = self._load(None)

    def _load(self, loading: Callable[[int, int], None] | None) -> Model:
        model = load_model(self.file.path, self.device, self.profile, progress=loading)
        torch.cuda.synchronize(self.device)
        return model

    def _in_use(self) -> int:
        free, whole = torch.cuda.mem_get_info(self.device)
        return whole - free


def judge_decode(model: Model, sequence: Sequence) -> Judged:
    """Whether the steps of `sequence` choose what the same tokens as one chunk choose; leaves it as it was."""
    context, cache = sequence.context, sequence.cache
    require(sequence.steps > 1, f"a chunk has at least 2 tokens, got {sequence.steps}: one is a decode step itself")
    tokens, logits = follow(sequence)
    poison(cache, context)
    every = forward(model, cache, tokens[:-1], all_positions=True)  # [steps, V]
    same = _same({"logits": logits, "tokens": tokens[1:]}, {"logits": every, "tokens": argmax(every)})
    poison(cache, context)
    return same, _digest({"tokens": tokens[1:]})


def judge_prefill(model: Model, tokens: int, chunk: int = _CHUNK, single: int = _SINGLE) -> Judged:
    """Whether a prompt of `tokens`, more than `single`, leaves the logits and the cache that its other way leaves."""
    ids, cache = prompt_of(model, tokens), poisoned(model, tokens)
    logits = prefill(model, cache, ids).cpu()
    left = {name: part.cpu() for name, part in _parts(cache).items()}
    poison(cache, 0)
    prefill(model, cache, ids[:-single], chunk)
    for token in ids[-single:]:
        last = forward(model, cache, [token])
    same = _same({"logits": logits, **left}, {"logits": last, **_parts(cache)})
    return same, _digest({"logits": logits})


def judge_load(model: Model, file: GGUFFile) -> Judged:
    """Whether all that `model` holds as the file has it is the file's, and its decode step agrees with its prompts."""
    held = dict(as_in_file(model))
    routers = {f"blk.{i}.ffn_gate_inp.weight" for i in range(model.config.n_layers)}
    same = held.keys() | routers == file.tensors.keys() and all(
        torch.equal(_bytes(tensor), _bytes(from_file(file, name).to(tensor.device))) for name, tensor in held.items()
    )
    return judge_decode(model, prepare(model, 0, _SINGLE)) if same else (False, "")


def as_in_file(model: Model) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a model holds byte for byte, by their names in the file."""
    yield from (("token_embd.weight", model.embedding.as_in_file()), ("output.weight", model.output.as_in_file()),
                ("output_norm.weight", model.output_norm))  # fmt: skip
    for i, layer in enumerate(model.layers):
        for name, field in _FIELDS.items():
            part = getattr(layer, field)
            yield f"blk.{i}.{name}.weight", part if isinstance(part, Tensor) else part.as_in_file()
        for name in ("gate", "up", "down"):
            yield f"blk.{i}.ffn_{name}_exps.weight", getattr(layer.moe, name).as_in_file()


def holds_what_it_should(held: int, file: GGUFFile) -> bool:
    """Whether a model's bytes are what the capacity's arithmetic says, and at most a hundredth more by rounding up."""
    rule = needed(file, Config.from_gguf(file))
    expected = rule.total - rule.workspace
    return expected <= held <= 1.01 * expected


def time_prefill(model: Model, tokens: int, runs: int = RUNS, sampler: Sampler = sample) -> list[float]:
    """Microseconds of `runs` prompts of `tokens`, behind one that compiles."""
    require_cuda(model.device)
    cache, ids = KVCache.allocate(model, tokens), prompt_of(model, tokens)

    def rewind() -> None:
        cache.length = 0

    return sampler(rewind, lambda: prefill(model, cache, ids), runs, warmup=1)


def prompt_of(model: Model, tokens: int) -> list[int]:
    """A prompt that visits the vocabulary."""
    return [(37 * i + 11) % model.config.vocab for i in range(tokens)]


def decode_bytes(whole: Whole, file: GGUFFile) -> float:
    """Weights, and the keys and values that the middle step of a run reads."""
    config = Config.from_gguf(file)
    return bytes_per_token(file, config) + kv_bytes(config) * (whole.tokens + (TOKENS + 1) / 2)


def prefill_bytes(whole: Whole, file: GGUFFile) -> int:
    """Every weight once, of the embedding the rows of the prompt."""
    table = file.tensors["token_embd.weight"]
    return sum(i.nbytes for i in file.tensors.values()) - table.nbytes + table.nbytes // table.shape[0] * whole.tokens


def prefill_flops(whole: Whole, file: GGUFFile) -> int:
    """Two for each product: with the weights on a token's way, the output matrix once, and attention's half square."""
    config = Config.from_gguf(file)
    T, output = whole.tokens, config.vocab * config.hidden
    inside = active_parameters(file, config) - 2 * output  # without the embedding, which is looked up
    attention = config.n_layers * 2 * config.n_heads * config.head_dim * T * (T + 1)
    return 2 * (T * inside + output) + attention


def _parts(cache: KVCache) -> dict[str, Tensor]:
    return {"k": cache.k, "k_scale": cache.k_scale, "v": cache.v, "v_scale": cache.v_scale}


def _same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Equal bits and no NaN: a NaN equals every other, and a model full of them would agree with itself."""
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in left.values())
    return finite and all(compare(n, left[n].cpu().numpy(), right[n].cpu().numpy()).equal for n in left)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8).flatten()


def _digest(parts: dict[str, Tensor]) -> str:
    return digest([(name, tensor.cpu().numpy()) for name, tensor in parts.items()])


def release() -> None:
    """Give the device back what nothing holds."""
    gc.collect()
    torch.cuda.empty_cache()
