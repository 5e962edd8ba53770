"""What the command tests share: a small file of random weights, and the command run in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from exactmoe.cli.main import main
from exactmoe.kernels.launch import resolve_device

resolve_device("auto")  # before any kernel module is imported: it settles whether the interpreter runs

from exactmoe.model.config import Config  # noqa: E402
from exactmoe.model.synth import LIKES, Like, synthesise  # noqa: E402

SMALL = Config(
    hidden=256,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    head_dim=128,
    n_experts=4,
    n_active=2,
    expert_width=256,
    vocab=512,
    context_length=64,
    eps=np.float32(1e-6),
    rope_base=1e6,
)


class Outcome(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid GGUF of random weights, small enough for the interpreter."""
    path = tmp_path_factory.mktemp("models") / "small.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LIKES, "small", Like("small", "4x1M", 512, SMALL))
        synthesise(path, "small", seed=3)
    return path


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
