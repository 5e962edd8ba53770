import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from exactmoe.parity.diff.diff import diff_arrays
from exactmoe.parity.diff.metrics import Tolerance
from exactmoe.parity.diff.router import diff_router
from exactmoe.parity.diff.traces import DiffReport, Fact
from exactmoe.parity.diff.verdict import StageDiff, Verdict
from exactmoe.parity.html.heatmap import shade
from exactmoe.parity.html.page import render_report, tree

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """The tags of a page, its text, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)
        self.close()
        self.wrong += self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data):
        if self.stack and self.stack[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def changed(x, at, value):
    y = x.copy()
    y[at] = value
    return y


@pytest.fixture
def report():
    """Every verdict once, over two layers."""
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    ids = np.array([[0, 1], [2, 3], [1, 0]], np.int32)
    logits = np.array([[4, 3, 2.5, 0], [0, 1, 4, 3], [3, 4, 1, 0]], np.float32)
    flipped = np.array([[0, 2], [0, 1], [0, 1]], np.int32)
    nan = changed(x, (0, 0), np.nan)
    rows = [
        diff_arrays("embedding", x, x),
        diff_arrays("attn_norm", x, x, layer=0),
        diff_arrays("q", x, changed(x, (1, 2), x[1, 2] * np.float32(1.001)), layer=0),
        diff_arrays("k", x, nan, layer=0),
        diff_arrays("v", nan, x, layer=0),
        diff_arrays("attention", nan, nan, layer=0),
        diff_arrays("attn_out", x, None, layer=0),
        diff_arrays("ffn_norm", x, x[:2], layer=0),
        diff_arrays("moe_router_indices", ids, flipped, layer=0),
        diff_arrays("moe_router_indices", ids, ids[:, ::-1].copy(), layer=1),
        diff_arrays("moe_ffn_out", x, changed(x, (0, 1), np.inf), layer=1),
        diff_arrays("post_ffn_residual", x, x + np.float32(1e-6), layer=1, tolerance=Tolerance(1e-3)),
    ]
    moved = logits + np.array([[0, 0, 0.75, 0], [0, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    routers = (
        diff_router(0, ids, flipped, left_logits=logits, right_logits=moved),
        diff_router(1, ids, ids, left_logits=logits, right_logits=logits),
    )
    facts = (Fact("device", "cpu", "an <H100>"), Fact("numerics version", "numerics-v1 1.0.0", "numerics-v1 1.0.0"))
    return DiffReport(
        "diff of two traces",
        "left/dir",
        "right/<dir>",
        "bit for bit",
        tuple(rows),
        routers,
        facts,
        (7, 8, 9),
        ("a note",),
    )


EVIDENCE = {
    "verdict": "made here",
    "block": {"tensor": "blk.0.attn_q.weight", "bytes": [144, 288]},
    "runs": [{"run": "suspect on the reference's input", "equal": False}, {"run": "reference", "equal": True}],
    "next": "exactmoe bisect model.gguf --suspect <mine>",
}


@pytest.mark.parametrize("evidence", [None, EVIDENCE])
def test_the_page_is_well_formed(report, evidence):
    page = Page(render_report(report, evidence))
    assert page.wrong == []
    assert len(page.tags) > 100
    assert [tag for tag, _ in page.tags].count("section") == (7 if evidence else 6)


def test_the_page_is_one_file_without_scripts_and_without_addresses(report):
    text = render_report(report, EVIDENCE)
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text)
    assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "form", "base"} == set()
    names = {name for _, attrs in page.tags for name in attrs}
    assert not [name for name in names if name.startswith("on")]
    assert names & {"src", "srcset", "action"} == set()
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    targets = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert links
    assert {link[1:] for link in links} == targets
    assert len(targets) == len(report.rows)


def test_text_from_the_traces_is_escaped(report):
    foreign = StageDiff("<their>", 0, Verdict.SHAPE, "<form>", "<left>", "<right>")
    report = replace(report, rows=(*report.rows, foreign))
    page = Page(render_report(report, EVIDENCE))
    assert {tag for tag, _ in page.tags} & {"h100", "dir", "mine", "their", "form", "left", "right"} == set()
    assert "an <H100>" in page.text
    assert "right/<dir>" in page.text


def test_the_verdict_the_first_difference_and_the_runs_are_readable_as_text(report):
    text = Page(render_report(report)).text
    assert "Not equal" in text
    assert "First difference: q, layer 0" in text
    first = report.first.first
    for value in (first.left, first.left_bits, first.right, first.right_bits):
        assert value in text
    assert "numerics-v1 1.0.0" in text
    assert "a note" in text
    assert report.first.text in text


def test_an_equal_report_says_equal_and_nothing_of_differences(report):
    fine = replace(report, rows=report.rows[:2], router=())
    text = Page(render_report(fine)).text
    assert text.count("Not equal") == 0
    assert "equal (bit for bit): 2 of 2 stages compared, 24 elements, 0 differ in bits" in text
    assert "First difference" not in text


def test_a_report_of_nothing_says_so():
    page = Page(render_report(DiffReport("diff", "a", "b", "bit for bit", ())))
    assert page.wrong == []
    assert "Not equal" in page.text
    assert "nothing was compared" in page.text


def cells(page_text):
    table = re.search(r'<table class="heat.*?</table>', page_text, re.DOTALL)[0]
    rows = re.findall(r'<tr><th scope="row">(\w+)</th>(.*?)</tr>', table)
    strip = lambda cell: re.sub(r"<sup>(\d+)</sup>", r"^\1", cell)  # noqa: E731
    return {
        stage: [
            (style, re.sub("<.*?>", "", strip(inner)))
            for style, inner in re.findall(r'<td(?: class="([\w ]+)" title="[^"]*")?>(.*?)</td>', row)
        ]
        for stage, row in rows
    }


def test_the_heat_map_has_a_cell_with_its_own_text_for_every_stage_and_layer(report):
    found = cells(render_report(report))
    assert found["embedding"] == [("u0", "="), ("", ""), ("", "")]
    assert found["attn_norm"] == [("", ""), ("u0", "="), ("", "")]
    (_, (style, text), _) = found["q"]
    assert style == "u5 first"
    assert text.startswith("2^1")
    assert found["k"][1] == ("nan", "NaN-R")
    assert found["v"][1] == ("nan", "NaN-L")
    assert found["attention"][1] == ("nan", "NaN")
    assert found["attn_out"][1] == ("none", "none")
    assert found["ffn_norm"][1] == ("none", "shape")
    assert found["moe_router_indices"][1:] == [("ids", "set"), ("ids", "order")]
    assert found["moe_ffn_out"][2] == ("u7", "inf")
    assert found["post_ffn_residual"][2] == ("tol", "~")
    assert len(found) == len({row.stage for row in report.rows})


@pytest.mark.parametrize(
    ("apart", "style"),
    [
        (1, "u1"),
        (2, "u2"),
        (15, "u2"),
        (16, "u3"),
        (255, "u3"),
        (256, "u4"),
        (4096, "u5"),
        (2**18, "u6"),
        (2**23, "u7"),
    ],
)
def test_the_shade_grows_with_the_logarithm_of_the_distance(apart, style):
    x = np.ones(2, np.float32)
    y = (x.view(np.int32) + np.array([0, apart], np.int32)).view(np.float32)
    assert shade(diff_arrays("q", x, y)) == style


def test_a_difference_of_unknown_size_is_not_shown_as_small():
    assert shade(StageDiff("q", 0, Verdict.DIFFER, "differs", "", "", count=3, differing=1)) == "u7"


def test_every_verdict_of_a_router_is_shown_with_ids_of_both_sides_and_its_margin(report):
    text = render_report(report)
    page = Page(text)
    assert "1 explained flip, 1 unexplained flip" in page.text
    assert re.search(r"0 7 explained flip 0 -1 0 \+2 0\.5 2,097,152 0\.75", page.text)
    assert re.search(r"2 9 reordered 1 0 0 1 2 ", page.text)
    marks = [attrs["class"] for _, attrs in page.tags if attrs.get("class") in ("dot", "ring", "tri", "box")]
    assert sorted(marks[:6]) == ["box", "dot", "dot", "dot", "ring", "tri"]
    titles = re.findall(r"<title>layer \d+, position \d+: [\w ]+</title>", text)
    assert len(titles) == 6


def test_many_tokens_are_cut_and_the_cut_is_said():
    ids = np.tile(np.array([[0, 1]], np.int32), (500, 1))
    report = DiffReport("d", "a", "b", "bit for bit", (), (diff_router(0, ids, ids[:, ::-1].copy()),))
    assert "and 300 tokens more" in Page(render_report(report)).text


def test_the_bits_that_differ_are_marked(report):
    text = render_report(report)
    strips = re.findall(r'<td class="mono bits">(.*?)</td>', text)
    assert [len(re.findall("<i", strip)) for strip in strips] == [32, 32]
    first = report.first.first
    apart = int(first.left_bits, 16) ^ int(first.right_bits, 16)
    for strip in strips:
        marked = [n for n, style in enumerate(re.findall(r'<i(?: class="([\w ]+)")?>', strip)) if "x" in style.split()]
        assert marked == [n for n in range(32) if apart >> (31 - n) & 1]


def test_any_evidence_is_shown_as_it_is():
    found = Page(
        tree({"a_b": None, "yes": True, "n": 1.5, "list": [1, 2], "rows": [{"x": 1}, {"y": "<z>"}], "deep": [[1], [2]]})
    )
    assert found.wrong == []
    assert found.text == "a b none yes yes n 1.5 list 1 , 2 rows x y 1 <z> deep 1 2"


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_in_chromium_and_shows_its_text(report, tmp_path, chromium, scheme):
    path = tmp_path / "report.html"
    path.write_text(render_report(report, EVIDENCE), encoding="utf-8")
    base = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    base.append(f"--blink-settings=preferredColorScheme={1 if scheme == 'light' else 0}")
    picture = tmp_path / "report.png"
    options = ["--hide-scrollbars", "--window-size=1000,1600", f"--screenshot={picture}"]
    shot = subprocess.run([*base, *options, path.as_uri()], capture_output=True, text=True, timeout=120)
    assert shot.returncode == 0, shot.stderr
    head = picture.read_bytes()
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(head) > 30_000, "a picture this small is of an empty page"
    assert (int.from_bytes(head[16:20]), int.from_bytes(head[20:24])) == (1000, 1600)
    dumped = subprocess.run([*base, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120)
    assert dumped.returncode == 0, dumped.stderr
    assert Page(dumped.stdout).text == Page(path.read_text(encoding="utf-8")).text
    shutil.rmtree(tmp_path / "profile", ignore_errors=True)
