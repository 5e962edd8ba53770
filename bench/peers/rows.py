"""What other software takes for the same work, beside our rows: never our bits, so judged by closeness.

A peer is asked for by name. One that is not installed, or not as it is known here, is absent, with the reason. A layer
is judged by the layer in f64, a model by our logits; one whose numbers are far from them is wrong, and gets no time.
llama-bench gives no numbers to judge, so its rows say that they are not judged."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from exactmoe.bench.clock import Times
from exactmoe.kernels.errors import InvalidInput, require

PEERS = ("torch-grouped-mm", "transformers", "llama.cpp")
NEAR = 0.02  # of the norm of a layer: bf16 keeps 8 bits, and rounds four times on the way


class Absent(Exception):
    """Why a peer cannot be timed here."""


class Asked(NamedTuple):
    """A peer that the user named."""

    peer: str
    program: Path | None = None  # of llama.cpp: llama-bench


@dataclass(frozen=True)
class PeerRow:
    """What one peer gave for one piece of work."""

    peer: str
    name: str  # of the work; empty where the peer is absent as a whole
    computes: str = ""  # in which numbers
    cold: Times | None = None  # us a call, or a token
    gb_s: float | None = None  # of the peer's own weights
    version: str = ""
    absent: str = ""  # why there is nothing
    error: float | None = None  # relative distance from what it is judged by; None where nothing was compared
    near: float = NEAR  # that it may have

    @property
    def wrong(self) -> bool:
        """Compared, and not close."""
        return self.error is not None and not self.error <= self.near

    def timed(self, cold: Times, gb_s: float | None = None) -> "PeerRow":
        """The row with its times, and with its rate where that is known."""
        return replace(self, cold=cold, gb_s=gb_s)

    def without(self, why: str) -> "PeerRow":
        """The row of the same work, for which there is nothing."""
        return PeerRow(self.peer, self.name, version=self.version, absent=why)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {key: value for key, value in asdict(self).items() if value not in (None, "")}

    def __str__(self) -> str:
        what = f"{self.peer} {self.name}".strip()
        if self.absent:
            return f"{what:36} absent: {self.absent}"
        if self.wrong or self.cold is None:
            return f"{what:36} WRONG: {self.error:.1%} from what it is judged by, so it has no time"
        times = f"{self.cold.median:10.2f} {self.cold.p10:9.2f} {self.cold.p90:9.2f}"
        rate = f" {self.gb_s:7.0f} GB/s" if self.gb_s else ""
        judged = "not judged" if self.error is None else f"{self.error:.1%} away"
        return f"{what:36} {times} us{rate}  {self.computes}, {self.version}, {judged}"


def no_memory(error: Exception) -> str:
    """What torch says of an allocation that failed, without its advice: the first two sentences."""
    return ". ".join(str(error).split(". ")[:2])


def parse(asked: Iterable[Sequence[str]], whole_model: bool) -> list[Asked]:
    """What `--peer` was given. Raises InvalidInput for a peer unknown, out of place, or without its program."""
    found = []
    for name, *rest in asked:
        if name not in PEERS:
            raise InvalidInput(f"no peer is named {name}; there are {', '.join(PEERS)}")
        if name == "llama.cpp":
            require(len(rest) == 1, "--peer llama.cpp takes the path of its llama-bench")
            require(whole_model, "llama.cpp runs whole models: it is a peer of a --model")
            program = Path(rest[0])
            require(program.is_file() and program.stat().st_mode & 0o111 != 0, f"{program}: is no program")
            found.append(Asked(name, program))
        else:
            require(not rest, f"--peer {name} takes nothing more, got {' '.join(rest)}")
            require(
                name != "torch-grouped-mm" or not whole_model, "torch-grouped-mm is a layer: it is no peer of a --model"
            )
            found.append(Asked(name))
    return found


def collect(peer: str, rows: Callable[[], Iterable[PeerRow]]) -> Iterator[PeerRow]:
    """A peer's rows as they come, or the one that says why it is absent."""
    try:
        yield from rows()
    except Absent as error:
        yield PeerRow(peer, "", absent=str(error))
