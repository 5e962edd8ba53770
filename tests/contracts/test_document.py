"""Strict YAML: scalars are those of YAML 1.2, everything has its place, and what is ambiguous is refused."""

import math
from pathlib import Path
from typing import Any

import pytest

from exactmoe.contracts.document import Document, parse, read

HERE = Path("here.yaml")


def document(text: str) -> Document:
    return parse(text, HERE)


SCALARS = [
    ("1e-5", 1e-5),
    ("1.0e-6", 1e-6),
    (".5", 0.5),
    ("5.", 5.0),
    ("-1E3", -1000.0),
    ("12", 12),
    ("+0012", 12),
    ("0x1F", 31),
    ("0o17", 15),
    (".inf", math.inf),
    ("-.inf", -math.inf),
    ("true", True),
    ("False", False),
    ("yes", "yes"),
    ("on", "on"),
    ("2026-11-23", "2026-11-23"),
    ("1.0.0", "1.0.0"),
    ("1_000", "1_000"),
    ("12:30", "12:30"),
    ("'1e-5'", "1e-5"),
    ('"true"', "true"),
    ("", None),
    ("~", None),
    ("null", None),
]


@pytest.mark.parametrize(("text", "value"), SCALARS, ids=[text or "nothing" for text, _ in SCALARS])
def test_a_plain_scalar_is_what_yaml_1_2_says(text: str, value: Any) -> None:
    read_back = document(f"key: {text}\n").data["key"]
    assert (type(read_back), read_back) == (type(value), value)


def test_every_key_and_value_has_its_line_and_column() -> None:
    found = document("a:\n  b: [1, 22]\n  c:\n    - x\n")
    assert found.values == {
        (): (1, 1),
        ("a",): (2, 3),
        ("a", "b"): (2, 6),
        ("a", "b", 0): (2, 7),
        ("a", "b", 1): (2, 10),
        ("a", "c"): (4, 5),
        ("a", "c", 0): (4, 7),
    }
    assert found.keys == {("a",): (1, 1), ("a", "b"): (2, 3), ("a", "c"): (3, 3)}


REFUSED = {
    "a key twice": ("a: 1\nb: 2\na: 3\n", "here.yaml:3:1: YAML-002 the key 'a' stands twice, first on line 1"),
    "a key twice below": ("a:\n  - {b: 1, b: 2}\n", "here.yaml:2:12: YAML-002 the key 'b' stands twice"),
    "an alias": ("a: &x 1\nb: *x\n", "here.yaml:2:4: YAML-003 an alias"),
    "a tag": ("a: !!str 1\n", "here.yaml:1:4: YAML-003 the tag tag:yaml.org,2002:str"),
    "a tab": ("a:\n\t- b\n", "here.yaml:2:1: YAML-001 while scanning"),
    "two documents": ("a: 1\n---\nb: 2\n", "here.yaml:2:1: YAML-001 expected a single document"),
    "a list": ("- a\n", "here.yaml:1:1: YAML-004 "),
    "nothing": ("", "here.yaml:1:1: YAML-004 "),
    "a control character": ("a: \x00\n", "here.yaml:1:1: YAML-001 "),
}


@pytest.mark.parametrize(("text", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_ambiguous_or_broken_is_refused_with_its_place(text: str, said: str) -> None:
    assert [str(finding)[: len(said)] for finding in document(text).findings] == [said]


def test_a_file_that_is_not_utf_8_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("a: 1\nb: é\n".encode("latin-1"))
    assert str(read(path).findings[0]).startswith(f"{path}:2:1: YAML-001 not UTF-8")
