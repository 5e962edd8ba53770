"""A new contract that validates, and promises nothing yet but that."""

import re
from pathlib import Path

_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*-v[1-9]\d*")

_TEXT = """\
metadata:
  id: {id}
  version: 1.0.0
  created: {created}
  author: exactmoe maintainers
  kind: pattern
  description: What is promised, in a sentence or two.
  references:
    - where the formula or the format comes from
  depends_on: []
  amendment_history: []
  covers:
    - {covers}
  devices: [cpu]

equations:
  subject:
    formula: y = f(x)
    domain: where it holds
    invariants:
      - what is always true of it

proof_obligations:
  - type: completeness
    property: this file validates with 0 errors and 0 warnings
    applies_to: all
    falsified_by: [{falsifier}-001]

falsification_tests:
  - id: {falsifier}-001
    rule: a contract is read strictly
    prediction: the validator reports no error and no warning in any contract
    test: {test}
    if_fails: a key is unknown, a field is empty, or a cited test does not exist

implementation_stages:
  - id: {stage}-1
    description: The first step.
    expected_acceptance: [{falsifier}-001]
    evidence: []
    blockers: []

qa_gate:
  id: GATE-{upper}
  name: {id}
  checks: [{falsifier}-001]
  pass_criteria: every falsifier passes
"""
TEST = "tests/contracts/test_contracts.py::test_every_contract_validates_with_no_error_and_no_warning"
"""What a new contract cites: the test that every contract of the folder validates, which would fail without it."""


def skeleton(name: str, folder: Path, root: Path, created: str) -> str:
    """The text of the contract `name` for `folder`, which lies below `root`; `created` is a date YYYY-MM-DD.

    Raises ValueError for a name that is not words-with-dashes-vN."""
    if not _ID.fullmatch(name):
        raise ValueError(f"{name!r} is no id of a contract: lower-case words with dashes and a version, moe-router-v1")
    upper = name.upper()
    covers = (folder.resolve() / f"{name}.yaml").relative_to(root.resolve()).as_posix()
    return _TEXT.format(
        id=name,
        created=created,
        covers=covers,
        falsifier=f"FALSIFY-{upper}",
        stage=f"M-{upper}",
        upper=upper,
        test=TEST,
    )
