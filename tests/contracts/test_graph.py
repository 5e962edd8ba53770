"""exactmoe contracts graph: dependencies first, as text and as Mermaid."""

from pathlib import Path

import pytest

from exactmoe.cli.main import main
from exactmoe.contracts.graph import ordered


def test_the_graph_is_printed_as_text_and_as_mermaid(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["contracts", "graph", str(project / "contracts")]) == 0
    assert capsys.readouterr().out == "base-v1\ngood-v1  -> base-v1\n"
    assert main(["contracts", "graph", "--mermaid", str(project / "contracts")]) == 0
    assert capsys.readouterr().out == "flowchart TD\n    base-v1\n    good-v1\n    good-v1 --> base-v1\n"


def test_dependencies_come_first_and_cycles_last() -> None:
    graph = {"a": ["b", "c"], "b": ["c"], "c": [], "d": ["elsewhere"], "x": ["y"], "y": ["x"]}
    assert ordered(graph) == ["c", "d", "b", "a", "x", "y"]


def test_a_folder_without_contracts_has_no_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["contracts", "graph", str(tmp_path)]) == 2
    assert "no contract" in capsys.readouterr().err
