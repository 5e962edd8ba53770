"""A decode step, counted without a GPU: as locked, and every kind of change is seen."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from exactmoe.bench import proxies
from exactmoe.bench.proxies import PATH, differences, main, read_lock
from exactmoe.kernels.errors import InvalidInput


def _counted(*options: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "exactmoe.bench.proxies", *options]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_a_decode_step_launches_and_reads_what_is_locked() -> None:
    """After a change that was meant: python -m exactmoe.bench.proxies --update"""
    done = _counted("--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("0 counts not as locked\n")


def test_the_lock_is_of_a_whole_step_and_reads_little_more_than_the_weights() -> None:
    lock = read_lock()
    assert sum(lock["launches"].values()) > 48
    assert lock["launches_a_layer"] == 8
    assert lock["launches"].keys() == lock["bytes_read"].keys()
    assert (
        1.0 < sum(lock["bytes_read"].values()) / lock["weight_minimum"] < 1.08
    )  # the rest is scratch, through the cache


@pytest.mark.parametrize(
    ("change", "said"),
    [({"launches_a_layer": 9}, "launches_a_layer: 8.0 -> 9"),
     ({"launches": {"_new_kernel": 1}}, "launches _new_kernel: None -> 1"),
     ({"bytes_read": {"_embed_kernel": 1}}, "bytes_read _embed_kernel: ")],
)  # fmt: skip
def test_what_changed_is_named(change: dict[str, Any], said: str) -> None:
    lock = read_lock()
    found = {k: v | change[k] if isinstance(v, dict) and k in change else change.get(k, v) for k, v in lock.items()}
    assert differences(lock, lock) == []
    assert [line for line in differences(lock, found) if line.startswith(said)]


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_a_missing_or_broken_lock_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "proxies.lock.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidInput, match="counts"):
        read_lock(path)


def test_the_command_tells_a_change_from_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = json.loads(PATH.read_text())
    monkeypatch.setattr(proxies, "count_step", lambda: proxies.Step(**held))
    monkeypatch.setattr(proxies, "read_lock", lambda: held)
    assert main(["--check"]) == 0
    monkeypatch.setattr(proxies, "read_lock", lambda: held | {"launches_a_layer": 5})
    assert main(["--check"]) == 1


def test_nothing_is_counted_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxies, "interpreting", lambda: True)
    assert main([]) == 3
