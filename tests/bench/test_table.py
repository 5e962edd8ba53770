"""The README's tables of speed: what they say is what the history holds, and no less."""

import json
from pathlib import Path
from typing import Any

import pytest

from exactmoe.bench import history
from exactmoe.bench.history import FOLDER
from exactmoe.bench.table import by_device, differences, tables
from exactmoe.cli.main import main

README = Path(__file__).parents[2] / "README.md"
QKV = {"name": "qkv", "equal": True, "digest": "a", "cold": [8.0, 7.5, 9.25], "gb_s": 1234.5, "roof": 0.5, "gib": None}
LM = QKV | {"name": "lm-head", "cold": [177.3, 170.0, 180.0]}
MEMORY = QKV | {"name": "memory-most", "cold": None, "gb_s": None, "roof": None, "gib": 22.1}


def a_run(*rows: dict[str, Any], commit: str = "a" * 40, date: str = "2026-01-02T03:04:05", device: str = "GPU") -> Any:
    return {"date": date, "commit": commit, "device": device, "activations": "q8_k", "model": "", "rows": list(rows)}


LOAD = QKV | {"name": "load", "cold": [5032848.17, 4454511.0, 10512368.0], "gb_s": 3.7}
NEARLY = QKV | {"name": "nearly", "cold": [9999.0, 9000.0, 10001.0]}
RUNS = [
    a_run(QKV, LM, MEMORY, LOAD, NEARLY),
    a_run(QKV | {"cold": [4, 4, 4]}, commit="b" * 40 + "+", date="2026-02-03T00:00:00"),
]
TABLE = """\
| on GPU | median | p10 to p90 | GB/s | of the roof | commit | date |
|---|--:|--:|--:|--:|---|---|
| qkv | 4 us |  | 1,234 | 50.0% | `bbbbbbbbbbbb+` | 2026-02-03 |
| lm-head | 177.3 us | 170 to 180 | 1,234 | 50.0% | `aaaaaaaaaaaa` | 2026-01-02 |
| memory-most | 22.1 GiB |  |  |  | `aaaaaaaaaaaa` | 2026-01-02 |
| load | 5,033 ms | 4,455 to 10,512 | 4 | 50.0% | `aaaaaaaaaaaa` | 2026-01-02 |
| nearly | 9,999 us | 9,000 to 10,001 | 1,234 | 50.0% | `aaaaaaaaaaaa` | 2026-01-02 |"""


def test_the_readme_says_what_the_history_holds() -> None:
    assert differences(README.read_text(encoding="utf-8"), tables(FOLDER)) == []


def test_the_table_has_the_latest_number_of_each_benchmark_with_its_commit_and_date() -> None:
    assert by_device(RUNS) == [TABLE]


LLAMA = {"peer": "llama.cpp", "name": "qkv", "computes": "its types", "cold": [20.0, 19, 21], "version": "b7"}
BESIDE = """\
| beside us on GPU | theirs | ours | theirs to ours | computes in | version | commit | date |
|---|--:|--:|--:|---|---|---|---|
| qkv, llama.cpp | 20 us | 4 us | 5.00 | its types | b7 | `aaaaaaaaaaaa` | 2026-02-03 |"""


def test_other_software_has_a_table_with_our_number_of_the_same_run_beside_it() -> None:
    gone, wrong = {"peer": "a", "name": "qkv", "absent": "not here"}, {"peer": "b", "name": "qkv", "error": 0.5}
    runs = [
        a_run(QKV) | {"peers": [LLAMA | {"cold": [99.0, 98, 100]}]},
        a_run(QKV | {"cold": [4.0, 4, 4]}, date="2026-02-03T00:00:00") | {"peers": [LLAMA, gone, wrong]},
        a_run(QKV | {"cold": [5.0, 5, 5]}),
        a_run(LM) | {"peers": [LLAMA | {"cold": [1.0, 1, 1]}]},  # ours was not run with it
    ]
    speeds, beside = by_device(runs)
    assert speeds.startswith("| on GPU |")
    assert beside == BESIDE
    text = f"Words.\n\n{speeds}\n\nMore.\n\n{beside}\n"
    assert differences(text, [speeds, beside]) == []
    assert differences(text.replace("5.00", "6.00"), [speeds, beside])
    assert differences(text, [speeds])


def test_work_beside_us_is_ordered_by_its_numbers_and_then_as_it_ran() -> None:
    names = ["moe-layer-1", "moe-layer-8", "moe-layer-64", "moe-layer-4096"]
    peers = [LLAMA | {"name": name, "peer": peer} for peer in ("b", "a") for name in names]
    _, beside = by_device([a_run(*(QKV | {"name": name} for name in names)) | {"peers": peers}])
    shown = [line.split(" | ")[0] for line in beside.splitlines()[2:]]
    assert shown == [f"| {name}, {peer}" for name in names for peer in ("b", "a")]


def test_a_benchmark_that_has_become_wrong_has_no_number() -> None:
    (table,) = by_device([*RUNS, a_run(QKV | {"equal": False, "cold": None, "gb_s": None, "roof": None})])
    assert "| qkv | wrong, so it has no number |" in table


def test_each_device_has_a_table_of_its_own() -> None:
    first, second = by_device([a_run(QKV, device="Z"), a_run(LM, device="B")])
    assert first.startswith("| on B |") and "qkv" not in first
    assert second.startswith("| on Z |") and "lm-head" not in second


@pytest.mark.parametrize(
    "text",
    ["# x\n\nWords.\n\n" + TABLE + "\n\nMore | words |.\n", TABLE, "| a | b |\n|---|---|\n| 1 | 2 |\n\n" + TABLE],
)
def test_a_text_that_holds_the_table_is_as_it_should_be(text: str) -> None:
    assert differences(text, [TABLE]) == []


@pytest.mark.parametrize(
    ("text", "wanted", "said"),
    [("Words.", [TABLE], "+| qkv | 4 us |"), (TABLE, [], "-| qkv | 4 us |"),
     (TABLE.replace("177.3", "17.73"), [TABLE], "-| lm-head | 17.73 us |"),
     (TABLE + "\n| faster | 1 us |  |  |  |  |  |", [TABLE], "-| faster | 1 us |"),
     (TABLE.rpartition("\n")[0], [TABLE], "+| nearly |"),
     (TABLE + "\n\n" + TABLE, [TABLE], "-| qkv |"), (TABLE.replace("GPU", "another"), [TABLE], "-| on another |")],
)  # fmt: skip
def test_every_way_to_differ_is_named(text: str, wanted: list[str], said: str) -> None:
    assert any(line.startswith(said) for line in differences(text, wanted))


def test_no_history_and_no_table_agree() -> None:
    assert differences("# A readme\n\n| a | b |\n|---|---|\n| 1 | 2 |\n", []) == []


def test_the_command_prints_the_table_and_compares_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, readme, folder = tmp_path / "gpu.jsonl", tmp_path / "README.md", tmp_path / "results"
    file.write_text("".join(json.dumps(run) + "\n" for run in RUNS))
    assert main(["bench", "--history", str(file), "--markdown"]) == 0
    assert capsys.readouterr().out == TABLE + "\n"
    readme.write_text("Nothing.")
    assert main(["bench", "--history", str(file), "--readme", str(readme)]) == 1
    assert "+| qkv | 4 us |" in capsys.readouterr().err
    monkeypatch.setattr(history, "FOLDER", folder)
    assert main(["bench", "--readme", str(readme)]) == 0
    folder.mkdir()
    file.rename(folder / "gpu.jsonl")
    assert main(["bench", "--readme", str(readme)]) == 1
    readme.write_text(TABLE)
    assert main(["bench", "--readme", str(readme)]) == 0
    assert main(["bench", "--markdown"]) == main(["bench", "--markdown", "--readme", str(readme)]) == 2
