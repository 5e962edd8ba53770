"""A diff of two runs as JUnit XML, which CI systems read: one test case for every stage of every layer."""

import re
from xml.etree import ElementTree as ET

from exactmoe.model.stages import WHOLE_MODEL
from exactmoe.parity.diff.report import measured
from exactmoe.parity.diff.traces import DiffReport
from exactmoe.parity.diff.verdict import StageDiff

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: DiffReport) -> str:
    """The XML document. A report without stages holds one failure, so that nothing compared is never green."""
    failures = len(report.failed) if report.rows else 1
    counts = {"tests": str(max(len(report.rows), 1)), "failures": str(failures), "errors": "0"}
    root = ET.Element("testsuites", counts)
    suite = ET.SubElement(root, "testsuite", {"name": _clean(report.title), **counts})
    properties = ET.SubElement(suite, "properties")
    for name, value in _properties(report):
        ET.SubElement(properties, "property", {"name": _clean(name), "value": _clean(value)})
    for row in report.rows:
        _case(suite, row)
    if not report.rows:
        case = ET.SubElement(suite, "testcase", {"classname": "model", "name": "any stage"})
        ET.SubElement(case, "failure", {"type": "missing", "message": "nothing was compared"})
    ET.indent(root)
    document: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return document.decode() + "\n"


def _properties(report: DiffReport) -> list[tuple[str, str]]:
    named = [("left", report.left), ("right", report.right), ("rule", report.rule), ("verdict", report.verdict)]
    named += [(fact.name, fact.left if fact.agree else f"{fact.left} | {fact.right}") for fact in report.facts]
    return named + [("note", note) for note in report.notes]


def _case(suite: ET.Element, row: StageDiff) -> None:
    place = "model" if row.layer == WHOLE_MODEL else f"layer {row.layer}"
    case = ET.SubElement(suite, "testcase", {"classname": place, "name": _clean(row.stage)})
    if row.passed:
        return
    failure = ET.SubElement(case, "failure", {"type": row.verdict.value, "message": _clean(row.text)})
    lines = [f"first {row.first}"] if row.first else [f"left {row.left}, right {row.right}"]
    lines += [measured(row.metrics)] if row.metrics else []
    failure.text = _clean("\n".join(lines))


def _clean(text: str) -> str:
    """`text` without the characters that XML cannot hold."""
    return _NOT_XML.sub("\ufffd", text)
