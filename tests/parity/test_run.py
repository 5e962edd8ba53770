import io
import json
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest

from exactmoe.kernels.errors import InvalidInput
from exactmoe.model import stages
from exactmoe.parity.bits import compare, digest
from exactmoe.parity.provenance import numerics_version
from exactmoe.parity.report import Setting, as_json, print_report, verdict
from exactmoe.parity.run import CHUNK, Coverage, ParityResult, Schedule, Tally, compare_sides, plan_schedules
from exactmoe.parity.sides import KV_ARRAYS, Trace

N_LAYERS = 2
VOCAB = 11
WIDTH = 3
PROMPT = (*range(2, 11), 1, 5, 7, 3, 9, 10)  # 15 positions: chunks of 7, 7 and 1
STEPS = 3
SETTING = Setting("model.gguf", "ab" * 32, "numerics-v1 1.0.0", "q8_k", "nothing", {"python": "3"})


@dataclass
class FakeCache:
    tokens: list[int] = field(default_factory=list)
    traced: bool = False
    broken: bool = False

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass
class FakeSide:
    """A model whose every value at a position is a function of the tokens up to it; `change` plants differences."""

    name: str
    drop: set[tuple[str, int]] = field(default_factory=set)
    extra: set[tuple[str, int]] = field(default_factory=set)
    rows: int | None = None  # rows a stage is cut to
    calls: list[tuple[str, int, int]] = field(default_factory=list)

    def change(self, what: str, layer: int, start: int, array: np.ndarray) -> np.ndarray:
        return array

    def cache(self, capacity: int) -> FakeCache:
        return FakeCache()

    def _values(self, what: str, layer: int, cache: FakeCache, start: int, width: int) -> np.ndarray:
        rows = []
        for p in range(start, len(cache.tokens)):
            seed = [*what.encode(), layer + 1, *cache.tokens[: p + 1]]
            rows.append(np.random.default_rng(seed).standard_normal(width).astype(np.float32))
        return np.array(rows, np.float32).reshape(len(cache.tokens) - start, width)

    def run(self, cache: FakeCache, tokens, chunk: int, all_positions: bool) -> np.ndarray:
        self.calls.append(("run", len(tokens), chunk))
        start = cache.length
        cache.tokens += tokens
        logits = self.change("run", -1, start, self._values("lm_head", -1, cache, start, VOCAB))
        return logits if all_positions else logits[-1]

    def trace(self, cache: FakeCache, tokens) -> Trace:
        start = cache.length
        cache.tokens += tokens
        cache.traced = True
        named = {}
        for key in {*stages.keys(N_LAYERS), *self.extra} - self.drop:
            values = self._values(*key, cache, start, VOCAB if key[0] == "lm_head" else WIDTH)
            named[key] = SimpleNamespace(value=self.change(*key, start, values)[: self.rows])
        return Trace(self.change("traced", -1, start, self._values("lm_head", -1, cache, start, VOCAB)), named)

    def array(self, value) -> np.ndarray:
        return value.value

    def kv(self, cache: FakeCache, name: str, layer: int) -> np.ndarray:
        what = f"kv {'traced ' if cache.traced else ''}{name}"
        return self.change(what, layer, 0, self._values(f"kv {name}", layer, cache, 0, 2))

    def argmax(self, logits: np.ndarray) -> np.ndarray:
        return self.change("argmax", -1, 0, logits.argmax(1).astype(np.int32))

    def rope(self, n_positions: int) -> tuple[np.ndarray, np.ndarray]:
        table = np.arange(n_positions * 2, dtype=np.float32).reshape(n_positions, 2)
        return table, self.change("rope", -1, 0, -table)


def parity(left: FakeSide | None = None, right: FakeSide | None = None, *, bounded: bool = False) -> ParityResult:
    left, right = left or FakeSide("reference"), right or FakeSide("triton")
    return compare_sides(left, right, N_LAYERS, PROMPT, STEPS, plan_schedules(len(PROMPT), STEPS, bounded=bounded))


def faulty(name: str, what: str, layer: int = -1, *, start: int = 0, at=(), value=None) -> FakeSide:
    """A side on which element `at` of `what` differs in its last bit (or is `value`), when the chunk is at `start`."""

    class Faulty(FakeSide):
        def change(self, w, i, s, array):
            if (w, i, s) == (what, layer, start):
                array = array.copy()
                bits = array.view(np.int32) if array.dtype == np.float32 else array
                if value is None:
                    bits[at] ^= 1
                else:
                    array[at] = value
            return array

    return Faulty(name)


def tally(result: ParityResult, name: str, layer: int = -1):
    groups = (*result.stages, *result.caches, *result.paths, *(s.tally for s in result.schedules))
    (found,) = [t for t in groups if (t.name, t.layer) == (name, layer)]
    return found


def not_equal(result: ParityResult) -> list[str]:
    groups = (*result.stages, *result.caches, *result.paths, *(s.tally for s in result.schedules))
    return [f"{t.name} {t.layer}" for t in groups if not t.equal]


def report(result: ParityResult) -> str:
    out = io.StringIO()
    print_report(result, SETTING, out)
    return out.getvalue()


def test_two_sides_that_agree_are_equal_and_every_element_is_counted():
    result = parity()
    positions = len(PROMPT) + STEPS
    assert result.equal
    assert result.first is None
    assert not_equal(result) == []
    assert {(t.name, t.layer) for t in result.stages} == set(stages.keys(N_LAYERS))
    widths = {t.name: t.compared for t in result.stages}
    assert widths.pop("lm_head") == positions * VOCAB
    assert set(widths.values()) == {positions * WIDTH}
    assert {t.compared for t in result.caches} == {3 * positions * 2}
    assert [t.compared for t in result.paths] == [VOCAB * 4, VOCAB * 4, 3 * 4, 2 * positions * 2]
    caches = N_LAYERS * len(KV_ARRAYS) * 2
    again, chunked, single = (s.tally.compared for s in result.schedules)
    assert again == VOCAB * 4 + positions * caches
    assert chunked == single == len(PROMPT) * (VOCAB + caches)
    assert len(result.chosen) == STEPS + 1
    assert result.coverage[:4] == (45, 45, 45, 45)
    assert result.coverage.complete


def test_the_verdict_names_the_elements_and_the_stages():
    result = parity()
    total = sum(t.compared for t in (*result.stages, *result.caches, *result.paths))
    total += sum(s.tally.compared for s in result.schedules)
    assert verdict(result) == f"PARITY: equal, {total:,} elements in 45 stages, caches and schedules, 0 differ"


@pytest.mark.parametrize("side", ["reference", "triton"])
@pytest.mark.parametrize(("start", "when"), [(0, "prefill"), (15, "step 1"), (17, "step 3")])
def test_one_bit_planted_in_one_stage_is_found_where_it_lies(side, start, when):
    wrong = faulty(side, "moe_router", 1, start=start, at=(-1, 2))
    result = parity(**{"left" if side == "reference" else "right": wrong})
    assert not result.equal
    assert not_equal(result) == ["moe_router 1"]
    found = tally(result, "moe_router", 1)
    assert (found.differing, found.failed) == (1, 1)
    assert result.first is found.first
    assert found.first.when == when
    assert found.first.comparison.first == (14 if start == 0 else 0, 2)
    assert f"moe_router, layer 1, {when}: 1/" in verdict(result)


def test_the_first_difference_is_the_earliest_in_the_run_not_in_the_alphabet_of_stages():
    class Two(FakeSide):
        def change(self, what, layer, start, array):
            if (what, layer, start) in {("embedding", -1, 16), ("lm_head", -1, 15), ("v", 0, 15)}:
                array = array + 1
            return array

    result = parity(right=Two("triton"))
    assert not_equal(result) == ["embedding -1", "v 0", "lm_head -1"]
    assert str(result.first).startswith("v, layer 0, step 1: 3/3 differ; first (0, 0):")


@pytest.mark.parametrize("side", ["reference", "triton"])
@pytest.mark.parametrize("key", [("attn_scores", 1), ("lm_head", -1)])
def test_a_stage_that_one_side_does_not_emit_fails(side, key):
    wrong = FakeSide(side, drop={key})
    result = parity(**{"left" if side == "reference" else "right": wrong})
    assert not result.equal
    assert not result.coverage.complete
    assert result.coverage.missing[0].startswith(f"{side}: {key[0]}")
    assert (result.coverage.emitted_reference, result.coverage.emitted_triton).count(44) == 1
    assert result.coverage.compared == 44
    assert "NOT EQUAL" in verdict(result)
    assert f"not emitted: {side}: {key[0]}" in report(result)


def test_a_stage_that_both_sides_leave_out_fails():
    drop = {("q", 0)}
    result = parity(FakeSide("reference", drop=drop), FakeSide("triton", drop=drop))
    assert not result.equal
    assert result.coverage[:4] == (45, 44, 44, 44)


def test_a_stage_left_out_in_one_decode_step_only_fails():
    class Forgetful(FakeSide):
        def trace(self, cache, tokens):
            traced = super().trace(cache, tokens)
            if cache.length == len(PROMPT) + 2:
                del traced.stages["q", 0]
            return traced

    result = parity(right=Forgetful("triton"))
    assert not result.equal
    assert result.coverage.missing == ("triton: q, layer 0, step 2",)
    assert result.coverage[:4] == (45, 45, 44, 45)


def test_a_stage_nobody_asked_for_fails():
    result = parity(right=FakeSide("triton", extra={("scratch", 0)}))
    assert not result.equal
    assert result.coverage.unexpected == ("triton: scratch, layer 0",)
    assert "emitted but not requested: triton: scratch, layer 0" in report(result)


def test_stages_of_no_elements_are_not_equal():
    result = parity(FakeSide("reference", rows=0), FakeSide("triton", rows=0))
    assert not result.equal
    assert result.coverage[:4] == (45, 45, 45, 0)
    assert not any(t.equal for t in result.stages)
    assert "NOT EQUAL" in verdict(result)
    assert "2 not compared" in report(result)


def test_a_trace_of_fewer_rows_than_tokens_is_not_equal_even_if_both_sides_agree():
    result = parity(FakeSide("reference", rows=1), FakeSide("triton", rows=1))
    assert not result.equal
    assert "15 rows wanted" in str(result.first)


@pytest.mark.parametrize("shape", [(len(PROMPT), 1), (len(PROMPT), WIDTH + 1), (1, WIDTH)])
def test_a_stage_of_another_shape_is_a_difference(shape):
    class Shaped(FakeSide):
        def change(self, what, layer, start, array):
            return np.resize(array, shape) if (what, layer, start) == ("q", 1, 0) else array

    result = parity(right=Shaped("triton"))
    assert not_equal(result) == ["q 1"]
    assert f"float32 [15, 3] != float32 {list(shape)}" in verdict(result)


@pytest.mark.parametrize("side", ["reference", "triton"])
def test_production_logits_that_differ_from_traced_ones_are_found(side):
    wrong = faulty(side, "run", start=16, at=(-1, 4))
    result = parity(**{"left" if side == "reference" else "right": wrong})
    assert not result.equal
    assert tally(result, f"{side}: production = traced").first.comparison.first == (4,)


@pytest.mark.parametrize(
    ("side", "what", "paths"),
    [
        ("reference", "kv traced v_scale", ["reference and reference traced"]),
        ("triton", "kv v_scale", ["reference and triton"]),
        ("triton", "kv traced v_scale", ["reference and triton traced"]),
    ],
)
def test_a_cache_that_differs_on_one_path_is_found(side, what, paths):
    wrong = faulty(side, what, 1, at=(5, 1))
    result = parity(**{"left" if side == "reference" else "right": wrong})
    assert not result.equal
    first = tally(result, "cache v_scale", 1).first
    assert [first.when] == paths
    assert first.comparison.first == (5, 1)


def test_another_choice_from_the_same_logits_is_found():
    result = parity(right=faulty("triton", "argmax"))
    assert not_equal(result) == ["next token of the four paths -1"]
    assert tally(result, "next token of the four paths").differing == 2 * (STEPS + 1)


def test_another_rope_table_is_found():
    result = parity(right=faulty("triton", "rope", at=(3, 0)))
    assert not_equal(result) == ["rope table -1"]
    assert result.rope_digest != parity().rope_digest


class ByChunk(FakeSide):
    """Logits, or the cache, depend on the schedule: what a prompt run in chunks of `chunk` gives is off by a bit."""

    def __init__(self, what: str, chunk: int):
        super().__init__("triton")
        self.what, self.chunk, self.spoiled = what, chunk, []

    def run(self, cache, tokens, chunk, all_positions):
        logits = super().run(cache, tokens, chunk, all_positions)
        if chunk == self.chunk and len(tokens) > 1:
            self.spoiled.append(cache)
            if self.what == "logits":
                logits = logits.copy()
                logits[2] += 1
        return logits

    def kv(self, cache, name, layer):
        array = super().kv(cache, name, layer)
        spoiled = self.what == "cache" and name == "k" and any(cache is c for c in self.spoiled)
        return array + 1 if spoiled else array


@pytest.mark.parametrize("what", ["logits", "cache"])
@pytest.mark.parametrize(("chunk", "name"), [(CHUNK, "chunks of 7"), (1, "token by token")])
@pytest.mark.parametrize("bounded", [False, True])
def test_a_result_that_depends_on_the_schedule_is_found(what, chunk, name, bounded):
    result = parity(right=ByChunk(what, chunk), bounded=bounded)
    assert not result.equal
    assert not_equal(result) == [f"{name} -1"]


@pytest.mark.parametrize(("steps_done", "when"), [(0, "logits: "), (STEPS, f"logits, step {STEPS}: ")])
def test_a_second_run_that_gives_other_bits_is_found_and_has_another_digest(steps_done, when):
    class Unsteady(FakeSide):
        runs = 0

        def run(self, cache, tokens, chunk, all_positions):
            logits = super().run(cache, tokens, chunk, all_positions)
            if cache.length == len(PROMPT) + steps_done and not all_positions:
                self.runs += 1
                return logits + (self.runs - 1)
            return logits

    result = parity(right=Unsteady("triton"))
    assert not_equal(result) == ["the same run again -1"]
    assert result.schedules[0].digest != result.run_digest
    assert f"the same run again, {when}" in str(result.first)
    assert "digest differs" in report(result)


def test_another_digest_alone_is_not_equal():
    result = parity()
    again, *others = result.schedules
    changed = replace(result, schedules=(again._replace(digest="0" * 64), *others))
    assert result.equal
    assert not changed.equal
    assert (
        verdict(changed) == f"PARITY: NOT EQUAL, 0 of {4_752:,} elements differ; the same run again has another digest"
    )


def test_a_tally_of_nothing_is_not_equal_and_its_first_difference_stays():
    tally = Tally("q", 0)
    assert not tally.equal
    tally.add("prefill", compare("q", np.zeros(2), np.zeros(2)))
    assert tally.equal
    tally.add("step 1", compare("q", np.zeros(2), np.ones(2)))
    tally.add("step 2", compare("q", np.zeros(3), np.ones(3)))
    assert (tally.compared, tally.differing, tally.failed) == (7, 5, 2)
    assert tally.first.when == "step 1"


@pytest.mark.parametrize(
    ("coverage", "complete"),
    [
        (Coverage(3, 3, 3, 3, (), ()), True),
        (Coverage(3, 3, 3, 2, (), ()), False),
        (Coverage(0, 0, 0, 0, (), ()), False),
        (Coverage(3, 3, 3, 3, ("triton: q",), ()), False),
        (Coverage(3, 3, 3, 3, (), ("triton: scratch",)), False),
    ],
)
def test_coverage_is_complete_when_all_that_was_requested_was_compared(coverage, complete):
    assert coverage.complete is complete


def test_the_whole_prompt_goes_through_every_schedule_unless_bounded():
    plan = plan_schedules(64, 16, bounded=False)
    assert [(s.chunk, s.positions, s.steps) for s in plan] == [(64, 64, 16), (7, 64, 0), (1, 64, 0)]
    result = parity()
    assert [s.digest for s in result.schedules] == [result.run_digest, None, None]
    assert "the first" not in report(result)


def test_a_bounded_schedule_says_how_much_of_the_prompt_it_covers():
    plan = plan_schedules(64, 16, bounded=True)
    assert all(0 < s.positions < 64 for s in plan)
    assert {s.chunk for s in plan} > {7, 1}
    text = report(
        compare_sides(FakeSide("reference"), FakeSide("triton"), 1, range(9), 1, plan_schedules(9, 1, bounded=True))
    )
    assert "the first 3 of 9 positions, 3 chunks" in text


def test_the_prompt_goes_through_in_one_chunk_and_each_step_feeds_the_reference_choice():
    side = FakeSide("triton")
    result = parity(right=side)
    assert side.calls[: 1 + STEPS] == [("run", 15, 15)] + [("run", 1, 1)] * STEPS
    logits = FakeSide("any")._values("lm_head", -1, FakeCache(list(PROMPT)), len(PROMPT) - 1, VOCAB)
    assert result.chosen[0] == int(logits.argmax())


def test_the_digest_repeats_does_not_depend_on_the_schedules_and_changes_with_any_bit():
    base = parity()
    assert parity().digest == base.digest == parity(bounded=True).digest
    planted = [
        faulty("triton", "embedding", at=(0, 0)),
        faulty("triton", "post_ffn_residual", 1, start=17, at=(0, 2)),
        faulty("triton", "run", start=17, at=(0, 2)),
        faulty("triton", "kv k", 0, at=(1, 1)),
    ]
    assert len({base.digest, *(parity(right=side).digest for side in planted)}) == 1 + len(planted)
    assert len(base.digest) == len(digest([])) == 64


def test_without_a_schedule_the_run_is_not_equal():
    result = compare_sides(FakeSide("reference"), FakeSide("triton"), N_LAYERS, PROMPT, STEPS, [])
    assert not result.equal
    assert "not everything was compared" in verdict(result)


@pytest.mark.parametrize(
    ("tokens", "steps", "text"), [((), 4, "the prompt is empty"), ((1,), 0, "steps must be positive")]
)
def test_a_run_of_nothing_is_refused(tokens, steps, text):
    plan = [Schedule("again", 1, 1)]
    with pytest.raises(InvalidInput, match=text):
        compare_sides(FakeSide("reference"), FakeSide("triton"), N_LAYERS, tokens, steps, plan)


def test_the_report_shows_a_count_for_every_stage_of_every_layer():
    text = report(parity())
    lines = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    for stage in stages.STAGES:
        assert lines[stage.name].count("0/") == (1 + N_LAYERS if stage.per_layer else 1), stage
    assert "0/108 differ" in lines["q"]
    assert "45 stages requested; emitted by reference 45, by triton 45; compared 45" in text
    assert text.rstrip().splitlines()[-1].startswith("PARITY: equal, ")
    assert max(map(len, text.splitlines())) <= 100


def test_many_layers_are_shown_in_several_tables_that_fit_the_width():
    class Deep(FakeSide):
        def trace(self, cache, tokens):
            traced = super().trace(cache, tokens)
            some = traced.stages["q", 0]
            return Trace(traced.logits, {key: traced.stages.get(key, some) for key in stages.keys(20)})

    plan = plan_schedules(3, 1, bounded=False)
    result = compare_sides(Deep("reference"), Deep("triton"), 20, (1, 2, 3), 1, plan)
    text = report(result)
    assert result.equal
    assert all(f"layer {i}" in text for i in range(20))
    assert max(map(len, text.splitlines())) <= 100
    q = [line for line in text.splitlines() if line.startswith("q ")]
    assert sum(line.count("0/12") for line in q) == 20


def test_the_report_shows_where_the_first_difference_lies_with_both_bit_patterns():
    result = parity(right=faulty("triton", "attention", 0, at=(3, 1), value=-0.0))
    text = report(result)
    assert "first difference in attention, layer 0, prefill: 1/45 differ; first (3, 1): " in text
    assert "-0.0 0x80000000" in text
    assert "1/54" in next(line for line in text.splitlines() if line.startswith("attention"))
    assert text.rstrip().splitlines()[-1].startswith("PARITY: NOT EQUAL, 1 of ")


def test_logits_that_are_not_numbers_are_pointed_out():
    class Lost(FakeSide):
        def change(self, what, layer, start, array):
            return array * np.float32(np.nan) if what in ("run", "traced") else array

    result = parity(Lost("reference"), Lost("triton"))
    assert result.equal
    assert result.nan_logits == VOCAB * (len(PROMPT) + STEPS)
    assert "198 logits are NaN" in report(result)


def test_the_json_holds_the_whole_finding():
    good = json.loads(json.dumps(as_json(parity(), SETTING)))
    assert good["verdict"] == "equal"
    assert good["first_difference"] is None
    assert good["tokens"] == list(PROMPT)
    assert len(good["stages"]) == 45
    assert len(good["digest"]) == len(good["rope_digest"]) == 64
    assert set(good["seconds"]) >= {"reference", "reference traced", "triton", "triton traced", "schedules"}
    assert good["coverage"]["complete"] is True
    bad = json.loads(json.dumps(as_json(parity(right=faulty("triton", "k", 1, at=(2, 0))), SETTING)))
    assert bad["verdict"] == "not equal"
    first = bad["first_difference"]
    assert (first["name"], first["layer"], first["when"], first["coordinates"]) == ("k", 1, "prefill", [2, 0])
    assert bad["digest"] != good["digest"]


def test_the_numerics_version_is_the_one_the_contract_states():
    name, version = numerics_version().split()
    assert name == "numerics-v1"
    assert version.count(".") == 2
