"""exactmoe contracts new: what it writes validates, and it overwrites nothing."""

from pathlib import Path

import pytest

from exactmoe.cli.main import main
from exactmoe.contracts.skeleton import TEST, skeleton
from exactmoe.contracts.validate import validate

ROOT = Path(__file__).resolve().parents[2]


def test_a_new_contract_validates_with_every_obligation_bound(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cited = project / TEST.split("::")[0]
    cited.parent.mkdir(parents=True)
    cited.write_text((ROOT / TEST.split("::")[0]).read_text())  # the real file: the citation must stay true
    assert main(["contracts", "new", "sampling-v1", "--folder", str(project / "contracts")]) == 0
    path = project / "contracts" / "sampling-v1.yaml"
    assert capsys.readouterr().out == f"{path}\n"
    report = validate([path], dialect="house")
    assert report.findings == []
    assert (report.obligations_bound, report.obligations, report.falsifiers_bound, report.falsifiers) == (1, 1, 1, 1)


def test_a_contract_that_exists_is_not_overwritten(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = project / "contracts" / "good-v1.yaml"
    before = path.read_text()
    assert main(["contracts", "new", "good-v1", "--folder", str(project / "contracts")]) == 2
    assert f"{path}: File exists" in capsys.readouterr().err
    assert path.read_text() == before


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["contracts", "new", "a-v1", "--folder", str(tmp_path / "absent")]) == 2
    assert "absent is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sampling", "Sampling-v1", "sampling-v0", "../sampling-v1", "a--b-v1", ""])
def test_a_name_that_is_no_id_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is no id of a contract"):
        skeleton(name, tmp_path, tmp_path, "2026-01-01")
