"""Tuning: every candidate is judged, what is wrong or does not run gets no time. The clock itself needs a GPU."""

import pytest
import torch

from exactmoe.bench import tune as tuning
from exactmoe.bench.cases import Bench, benches
from exactmoe.bench.clock import Times
from exactmoe.bench.tune import CANDIDATES, Tried, answering, main, table, tune
from exactmoe.kernels import matvec, tiles
from exactmoe.kernels.errors import InvalidInput, require
from exactmoe.kernels.tiles import MatvecTile
from exactmoe.parity.cases import Matvec

SMALL = Bench("small", Matvec(40, 512, "Q4_K", "q8_k"), 1, 40 * 288)
TILES = [MatvecTile(16, 1, 4, 1), MatvecTile(64, 1, 4, 2), MatvecTile(8, 2, 4, 1, 2)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock without a GPU: a call takes as many us as its tile has rows."""

    def time_graph(calls, samples=30):
        for call in calls:
            call()
        rows = float(tiles.matvec(40, 2).rows)
        return Times(rows, rows, rows)

    monkeypatch.setattr(tuning, "time_graph", time_graph)
    monkeypatch.setattr("exactmoe.bench.run._COPIES", 2)


def test_every_candidate_is_of_a_benchmark_and_of_a_function_that_is_asked() -> None:
    for name, (function, candidates) in CANDIDATES.items():
        assert name in benches()
        assert callable(getattr(tiles, function))
        assert len(candidates) == len(set(candidates)) > 1


def test_a_candidate_is_what_the_op_gets_and_only_meanwhile() -> None:
    before = tiles.matvec(40, 2)
    with answering("matvec", TILES[2]):
        assert tiles.matvec(40, 2) == TILES[2]
    assert tiles.matvec(40, 2) == before


def test_candidates_are_timed_and_the_fastest_leads_the_table(clock: None, device: torch.device) -> None:
    tried = list(tune(SMALL, device, "matvec", TILES))
    assert [(t.tile, t.equal, t.cold.median if t.cold else None) for t in tried] == [
        (TILES[0], True, 16.0), (TILES[1], True, 64.0), (TILES[2], True, 8.0),
    ]  # fmt: skip
    lines = list(table(SMALL, tried, 1000.0))
    assert lines[0] == "small: 3 of 3 timed"
    assert [line.partition("%  ")[2] for line in lines[1:]] == [str(TILES[i]) for i in (2, 0, 1)]
    assert lines[1].split()[0] == "8.00"


def test_a_wrong_candidate_and_one_that_does_not_run_get_no_time(
    clock: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = matvec.matvec

    def op(*args, **kwargs):
        rows = tiles.matvec(40, 2).rows
        require(rows != 64, "too many rows")
        return right(*args, **kwargs) + (rows == 8)

    monkeypatch.setattr(matvec, "matvec", op)
    tried = list(tune(SMALL, device, "matvec", TILES))
    assert [(t.equal, t.cold is None) for t in tried] == [(True, False), (True, True), (False, True)]
    lines = list(table(SMALL, tried, 1000.0))
    assert lines[0] == "small: 1 of 3 timed"
    assert "InvalidInput: too many rows" in lines[2]
    assert "WRONG" in lines[3]


def test_the_table_of_no_candidate_that_runs_says_so() -> None:
    assert next(table(SMALL, [Tried(TILES[0], equal=True, why="x")], 1.0)) == "small: 0 of 1 timed"


def test_the_command_refuses_what_cannot_be_tuned_and_needs_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["no-such"]) == 2
    assert "experts-up" in capsys.readouterr().err

    def none(_: str) -> torch.device:
        raise InvalidInput("no CUDA device")

    monkeypatch.setattr(tuning, "resolve_device", none)
    assert main(["qkv"]) == 2
