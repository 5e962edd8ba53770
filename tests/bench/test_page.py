"""The history as a page: every run that has a time is on it, and a change of the numbers is marked."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from exactmoe.bench.page import render_history
from exactmoe.cli.main import main

ROW = {"equal": True, "roof": 0.5, "gib": None, "gb_s": 1.0, "digest": "a" * 64}


def a_run(commit: str, **times: float) -> dict[str, object]:
    rows = [{**ROW, "name": name, "cold": [us, us * 0.9, us * 1.1]} for name, us in times.items()]
    return {
        "date": "2026-01-02T03:04:05",
        "commit": commit,
        "device": "GPU",
        "activations": "q8_k",
        "model": "",
        "rows": rows,
    }


@pytest.fixture
def runs() -> list[dict[str, object]]:
    last = a_run("cccccccccccc<script>", qkv=4.0)
    last["rows"][0]["digest"] = "b" * 64  # type: ignore[index]
    wrong = a_run("dddddddddddd", qkv=1.0)
    wrong["rows"][0].update(equal=False, cold=None, roof=None)  # type: ignore[index]
    return [a_run("aaaaaaaaaaaa", qkv=8.0, lm=90.0), a_run("bbbbbbbbbbbb", qkv=6.0), last, wrong]


def test_every_time_is_a_point_with_its_commit_and_wrong_runs_have_none(runs: list[dict[str, object]]) -> None:
    page = render_history(runs, "a GPU")
    qkv, lm = page.split("<h2>")[1:]
    assert re.findall(r"<title>(\w{12})", qkv) == ["a" * 12, "b" * 12, "c" * 12]
    assert len(re.findall("<circle", lm)) == 1
    assert "dddddd" not in page


def test_a_point_whose_numbers_changed_says_so(runs: list[dict[str, object]]) -> None:
    titles = re.findall(r"<title>([^<]*us[^<]*)</title>", render_history(runs, "a GPU"))
    assert [title for title in titles if "numbers changed" in title] == ["cccccccccccc: 4.00 us, numbers changed"]


def test_a_point_whose_numbers_changed_has_another_colour_and_one_that_is_timed_otherwise_has_not(
    runs: list[dict[str, object]],
) -> None:
    runs[1]["method"] = 2
    qkv = render_history([*runs[:2], runs[2] | {"method": 2}], "a GPU").split("<h2>")[1]
    points = re.findall(r'r="4" fill="var\(--(\w+)\)"><title>([^<]*)', qkv)
    assert points == [
        ("good", "aaaaaaaaaaaa: 8.00 us"),
        ("good", "bbbbbbbbbbbb: 6.00 us, timed otherwise"),
        ("bar", "cccccccccccc: 4.00 us, numbers changed"),
    ]


def test_a_longer_time_stands_higher(runs: list[dict[str, object]]) -> None:
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', render_history(runs, "a GPU").split("<h2>")[1])]
    assert heights == sorted(heights)  # 8, 6, 4 us: y grows downwards


def test_the_page_is_one_file_without_scripts_or_addresses_and_text_is_escaped(runs: list[dict[str, object]]) -> None:
    class Tags(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[str] = set()

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.seen.add(tag)

    page = render_history(runs, "a <b>GPU")
    tags = Tags()
    tags.feed(page)
    assert "svg" in tags.seen
    assert not tags.seen & {"script", "link", "img", "b"}
    assert "://" not in page


def test_the_command_writes_it(tmp_path: Path, runs: list[dict[str, object]]) -> None:
    import json

    file, out = tmp_path / "nvidia-h100.jsonl", tmp_path / "history.html"
    file.write_text("".join(json.dumps(run) + "\n" for run in runs))
    assert main(["bench", "--history", str(file), "--html", str(out)]) == 0
    assert "Benchmarks on nvidia-h100" in out.read_text()
    assert main(["bench", "--html", str(out)]) == 2
