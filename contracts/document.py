"""Strict YAML that remembers where everything stands.

Every value and every key of a file has its line and column. A key that stands twice, an alias, a tag and a second
document are errors. Plain scalars follow the core schema of YAML 1.2 (yaml.org/spec/1.2.2, chapter 10.3): `1e-5` is a
number, `yes` and `2026-11-23` are texts."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from exactmoe.contracts.findings import Finding, Position, Severity, Where, shown

_NULL = re.compile(r"(?:|~|null|Null|NULL)")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_SPECIAL = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}


@dataclass
class Document:
    """One file: its values as plain Python, and where each value and each key stands."""

    path: Path
    text: str
    data: Any = None
    values: dict[Where, Position] = field(default_factory=dict)
    keys: dict[Where, Position] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def stem(self) -> str:
        """The name of the file without its ending: what `depends_on` calls the contract."""
        return self.path.stem

    def finding(
        self, code: str, where: Where, message: str, *, severity: Severity = "error", at_key: bool = False
    ) -> Finding:
        """A finding at the value of `where` (or its key); where there is none, at the nearest part around it."""
        position = None
        while position is None:
            position = (self.keys.get(where) if at_key else None) or self.values.get(where) or self.keys.get(where)
            if not where:
                break
            where, at_key = where[:-1], True  # a missing field is reported at the key of what should hold it
        return Finding(shown(self.path), *(position or Position(1, 1)), code, message, severity)


def read(path: Path) -> Document:
    """The document of a file. Raises OSError where it cannot be read; everything else is a finding in it."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        document = Document(path, "")
        line = raw.count(b"\n", 0, error.start) + 1
        document.findings.append(Finding(shown(path), line, 1, "YAML-001", f"not UTF-8: {error.reason}"))
        return document
    return parse(text, path)


def parse(text: str, path: Path) -> Document:
    """The document of a text; `path` is what the findings name."""
    document = Document(path, text)
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                document.findings.append(_at(document, "YAML-003", event.start_mark, "an alias: write the value out"))
            elif tag := getattr(event, "tag", None):
                said = f"the tag {tag}: write a plain value"
                document.findings.append(_at(document, "YAML-003", event.start_mark, said))
        if not document.findings:
            node = yaml.compose(text, yaml.SafeLoader)
            if node is not None:
                document.data = _build(document, node, ())
            if not isinstance(document.data, dict):
                document.findings.append(Finding(shown(path), 1, 1, "YAML-004", "a contract is a mapping of sections"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = " ".join(part for part in (error.context, error.problem) if part)
        document.findings.append(_at(document, "YAML-001", mark, said))
    except yaml.YAMLError as error:
        document.findings.append(Finding(shown(path), 1, 1, "YAML-001", " ".join(str(error).split())))
    return document


def _at(document: Document, code: str, mark: Any, message: str) -> Finding:
    position = Position(mark.line + 1, mark.column + 1) if mark else Position(1, 1)
    return Finding(shown(document.path), *position, code, message)


def _build(document: Document, node: yaml.Node, where: Where) -> Any:
    """The value of a node; notes its position and those of everything below it."""
    document.values[where] = Position(node.start_mark.line + 1, node.start_mark.column + 1)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if isinstance(node, yaml.SequenceNode):
        return [_build(document, item, (*where, position)) for position, item in enumerate(node.value)]
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else str(key_node.start_mark)
        here = (*where, key)
        if key in mapping:
            first = document.keys[here]
            document.findings.append(
                _at(
                    document,
                    "YAML-002",
                    key_node.start_mark,
                    f"the key {key!r} stands twice, first on line {first.line}",
                )
            )
            continue
        document.keys[here] = Position(key_node.start_mark.line + 1, key_node.start_mark.column + 1)
        mapping[key] = _build(document, value_node, here)
    return mapping


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    text = str(node.value)
    if node.style is not None:  # quoted or a block: always a text
        return text
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if text.lower() in _SPECIAL:
        return float(_SPECIAL[text.lower()])
    return float(text) if _FLOAT.fullmatch(text) else text
