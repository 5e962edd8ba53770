"""What every test shares: where kernels run, random numbers, and what happens to tests that need a GPU."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exactmoe.kernels.launch import resolve_device

# Triton reads TRITON_INTERPRET when a kernel module is imported; this runs before any test module is.
_DEVICE = resolve_device("auto")

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

_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Targets are measured where they were set, and when asked: they write 18.6 GB, and a target may be ahead of the code.
_H100 = _DEVICE.type == "cuda" and "H100" in torch.cuda.get_device_name(_DEVICE) and "EXACTMOE_TARGETS" in os.environ

# Markers whose tests this machine cannot run, with what the last lines of the run say of them.
_LACKING = {
    **({} if _DEVICE.type == "cuda" else {"gpu": "need a CUDA device; kernels ran in the interpreter"}),
    **({} if _H100 else {"h100": "measure against targets on an NVIDIA H100, where EXACTMOE_TARGETS=1 asks for it"}),
    **({} if _CHROMIUM else {"browser": "need Chromium; none is installed"}),
}
_DESELECTED = pytest.StashKey[dict[str, int]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "h100: measures against a target on an H100, with EXACTMOE_TARGETS=1; else deselected, and counted"
    )
    config.addinivalue_line("markers", "browser: needs Chromium; deselected, and counted, where there is none")
    if config.pluginmanager.hasplugin("hypothesispytest"):
        from hypothesis import settings

        # The same examples in every run, and no verdict from how busy the machine is.
        settings.register_profile("exactmoe", derandomize=True, deadline=None)
        settings.load_profile("exactmoe")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    counts = config.stash.setdefault(_DESELECTED, {})
    for marker in _LACKING:
        left_out = [item for item in items if item.get_closest_marker(marker)]
        counts[marker] = len(left_out)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for marker, count in config.stash.get(_DESELECTED, {}).items():
        if count:
            terminalreporter.write_line(f"not run: {count} tests that {_LACKING[marker]}")


# Under pytest-xdist the workers collect, and the process that began the run has the last lines.


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["deselected"] = session.config.stash.get(_DESELECTED, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash.setdefault(_DESELECTED, {}).update(getattr(node, "workeroutput", {}).get("deselected", {}))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """None on a GPU, whose memory all would share; else as many as pytest-xdist finds cores."""
    return 0 if _DEVICE.type == "cuda" else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """A worker has one core, so one thread: this process has its own already."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid GGUF of random weights, small enough for the interpreter."""
    path = tmp_path_factory.mktemp("models") / "small.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LIKES, "small", Like("small", "4x1M", 512, SMALL))
        synthesise(path, "small", seed=3)
    return path


@pytest.fixture
def device() -> torch.device:
    """Where kernels run in this process: CUDA where there is one, else the CPU, in Triton's interpreter."""
    return _DEVICE


@pytest.fixture
def chromium() -> str:
    """The path of a Chromium; for tests marked `browser`, which run only where there is one."""
    assert _CHROMIUM
    return _CHROMIUM


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator seeded by the test's own name, parameters included."""
    return np.random.default_rng(list(hashlib.sha256(request.node.nodeid.encode()).digest()))
