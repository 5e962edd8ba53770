"""What the command tests share: the command, run in this process, and a machine with no CUDA."""

from collections.abc import Callable
from typing import NamedTuple

import pytest

from exactmoe.cli.main import main


class Outcome(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str


@pytest.fixture
def exactmoe(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run `exactmoe ARGUMENTS` and return its exit status and output."""

    def run(*arguments: object) -> Outcome:
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as usage:
            status = int(usage.code or 0)
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which torch finds no CUDA device."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
