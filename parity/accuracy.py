"""How near the reference's logits are to exact arithmetic, over real tokens, in both activation profiles.

    python -m exactmoe.parity.accuracy [MODEL] [--text FILE | --tokens-file FILE] [--positions 256] [--json [FILE]]

The two may choose different experts where the router is near a tie; every such flip is listed with its margin, the
exact probability of the last expert chosen minus that of the first one left out. Exit status: 0 both profiles keep
their thresholds, 1 one does not, 2 an input is refused, 3 a package is missing."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from exactmoe.kernels.errors import InvalidInput, MissingEnvironment, require
from exactmoe.model.gguf.reader import GGUFFile, open_gguf
from exactmoe.parity.exact import F64, ExactPass, exact_forward
from exactmoe.parity.load import reference_weights
from exactmoe.parity.reference.kv_cache import KVCache
from exactmoe.parity.reference.traced import forward_traced

TINY = Path(__file__).resolve().parent.parent / "model" / "tiny"
MODEL, TEXT = TINY / "qwen3-moe-tiny.gguf", TINY / "prompt.txt"
POSITIONS = 256


class Threshold(NamedTuple):
    """The least cosine a profile may have; None asks nothing."""

    median: float | None  # over all positions
    worst: float | None  # at any position
    worst_alike: float | None  # at any position where both chose the same experts in every layer


THRESHOLDS = {
    "q8_k": Threshold(median=0.9998, worst=0.999, worst_alike=None),
    "q16_k": Threshold(median=None, worst=None, worst_alike=0.999999),
}


class Flip(NamedTuple):
    """A token for which the reference chose other experts than exact arithmetic."""

    layer: int
    position: int
    token: int
    reference: tuple[int, ...]  # best first
    exact: tuple[int, ...]
    margin: float  # exact probability of rank A-1 minus that of rank A


class Accuracy(NamedTuple):
    """One profile against exact arithmetic, T positions."""

    profile: str
    cosine: F64  # [T] of the logits
    error: F64  # [T] largest difference of a logit
    gap: F64  # [T] exact largest logit minus the second largest
    same_token: npt.NDArray[np.bool_]  # [T] whether both choose the same next token
    alike: npt.NDArray[np.bool_]  # [T] whether both chose the same experts in every layer
    unreached: npt.NDArray[np.bool_]  # [T] alike, and no flip of an earlier position reaches it through keys and values
    flips: tuple[Flip, ...]

    @property
    def decided(self) -> npt.NDArray[np.bool_]:
        """Positions [T] at which the two largest exact logits lie further apart than the largest error."""
        return self.gap > self.error

    def failures(self) -> list[str]:
        """What is not kept, in sentences; none is the verdict yes."""
        T = len(self.cosine)
        said = []
        if not np.isfinite(self.cosine).all():
            said.append(f"the cosine is not a number at {int((~np.isfinite(self.cosine)).sum())} of {T} positions")
        limit = THRESHOLDS[self.profile]
        alike = self.cosine[self.alike]
        if limit.worst_alike is not None and not alike.size:
            said.append("at no position were all experts the same, so nothing could be judged")
        for what, value, least in (
            ("median cosine", np.median(self.cosine), limit.median),
            ("worst cosine", np.min(self.cosine), limit.worst),
            ("worst cosine where experts are the same", np.min(alike, initial=1.0), limit.worst_alike),
        ):
            if least is not None and not value >= least:
                said.append(f"{what} {value:.9f} is below {least}")
        lost = np.flatnonzero(self.decided & ~self.same_token)
        if lost.size:
            said.append(f"another next token at {lost.size} decided positions, first {lost[0]}")
        return said


def measure(file: GGUFFile, tokens: Sequence[int], profile: str, exact: ExactPass) -> Accuracy:
    """Run the reference on `tokens` and hold it against `exact`, the exact pass over the same tokens."""
    weights = reference_weights(file)
    require(len(exact.logits) == len(tokens), f"{len(tokens)} tokens, but {len(exact.logits)} exact positions")
    trace = forward_traced(weights, KVCache.allocate(weights.dims, len(tokens)), tokens, profile)
    chosen = np.stack([trace.stages["moe_router_indices", i] for i in range(weights.dims.n_layers)])  # [L, T, A]
    differs = (np.sort(chosen, axis=-1) != np.sort(exact.experts, axis=-1)).any(axis=-1)  # [L, T]
    A = weights.dims.n_active
    ranked = -np.sort(-exact.router, axis=-1)
    flips = tuple(
        Flip(
            layer=int(i),
            position=int(t),
            token=int(tokens[t]),
            reference=tuple(chosen[i, t].tolist()),
            exact=tuple(exact.experts[i, t].tolist()),
            margin=float(ranked[i, t, A - 1] - ranked[i, t, A]),
        )
        for i, t in np.argwhere(differs)
    )
    ours = trace.logits.astype(np.float64)
    first, second = -np.partition(-exact.logits, 1, axis=1)[:, :2].T
    return Accuracy(
        profile=profile,
        cosine=cosine(ours, exact.logits),
        error=np.abs(ours - exact.logits).max(axis=1),
        gap=first - second,
        same_token=ours.argmax(axis=1) == exact.logits.argmax(axis=1),
        alike=~differs.any(axis=0),
        unreached=~(differs.any(axis=0) | np.logical_or.accumulate(differs[:-1].any(axis=0))),
        flips=flips,
    )


def cosine(a: F64, b: F64) -> F64:
    """Cosine of the angle between the rows of a and b [T, V]."""
    c: F64 = (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return c


def describe(result: Accuracy) -> str:
    """The result in lines of text, every flip among them."""
    T, worst = len(result.cosine), int(np.argmin(result.cosine))
    decided = result.decided
    lines = [
        f"{result.profile}: {T} positions",
        f"  cosine      median {np.median(result.cosine):.9f}, worst {result.cosine[worst]:.9f} at position {worst}",
        f"  same experts in every layer at {_worst_where(result, result.alike)}",
        f"  and no earlier flip within reach at {_worst_where(result, result.unreached)}",
        f"  logit error largest {result.error.max():.6f}, median {np.median(result.error):.6f}",
        f"  next token  same at {int(result.same_token.sum())}/{T} positions, "
        f"at {int((decided & result.same_token).sum())}/{int(decided.sum())} where the gap exceeds the error",
        f"  router      {len(result.flips)} flips",
    ]
    lines += [
        f"    layer {f.layer}, position {f.position}, token {f.token}: "
        f"{list(f.reference)}, exact {list(f.exact)}, margin {f.margin:.3e}"
        for f in result.flips
    ]
    failures = result.failures()
    lines += [f"  NO: {failure}" for failure in failures] or ["  yes: every threshold is kept"]
    return "\n".join(lines)


def _worst_where(result: Accuracy, where: npt.NDArray[np.bool_]) -> str:
    chosen = result.cosine[where]
    counted = f"{chosen.size}/{where.size} positions"
    return f"{counted}, worst cosine there {chosen.min():.9f}" if chosen.size else counted


def as_json(result: Accuracy) -> dict[str, Any]:
    """The result as JSON, arrays by position."""
    arrays = {
        name: getattr(result, name).tolist() for name in ("cosine", "error", "gap", "same_token", "alike", "unreached")
    }
    return {
        "profile": result.profile,
        "median_cosine": float(np.median(result.cosine)),
        "worst_cosine": float(np.min(result.cosine)),
        "thresholds": THRESHOLDS[result.profile]._asdict(),
        "failures": result.failures(),
        "flips": [flip._asdict() for flip in result.flips],
        **arrays,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure both profiles and report; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m exactmoe.parity.accuracy", description="Reference against exact.")
    parser.add_argument("model", nargs="?", type=Path, default=MODEL, metavar="MODEL", help="GGUF file")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", type=Path, default=TEXT, metavar="FILE", help="the prompt, as text")
    source.add_argument("--tokens-file", type=Path, metavar="FILE", help="the prompt, as token ids between spaces")
    parser.add_argument("--positions", type=int, default=POSITIONS, metavar="N", help="tokens of it to run")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="JSON to FILE, or in place of the text")
    args = parser.parse_args(argv)
    try:
        file = open_gguf(args.model)
        tokens = _tokens(args, file)
        exact = exact_forward(file, tokens)
        results = [measure(file, tokens, profile, exact) for profile in THRESHOLDS]
        if args.json is not None:
            report = {"model": file.sha256(), "tokens": tokens, "results": [as_json(r) for r in results]}
            text = json.dumps(report, indent=2) + "\n"
            if args.json == "-":
                sys.stdout.write(text)
            else:
                Path(args.json).write_text(text, encoding="utf-8")
        if args.json != "-":
            print("\n".join(describe(result) for result in results))
    except (InvalidInput, OSError, UnicodeDecodeError) as error:
        return _fail(error, 2)
    except MissingEnvironment as error:
        return _fail(error, 3)
    return 1 if any(result.failures() for result in results) else 0


def _tokens(args: argparse.Namespace, file: GGUFFile) -> list[int]:
    """The first `--positions` tokens of the prompt."""
    source = args.tokens_file or args.text
    words = source.read_text(encoding="utf-8")
    if args.tokens_file:
        wrong = [word for word in words.split() if not (word.isascii() and word.isdecimal())]
        require(not wrong, f"{source}: {wrong[:1]} is not a token id")
        tokens = [int(word) for word in words.split()]
    else:
        from exactmoe.model.tokenizer import load_tokenizer

        tokens = load_tokenizer(file).encode(words, add_special_tokens=False).ids
    require(args.positions > 0, f"--positions must be positive, got {args.positions}")
    require(len(tokens) >= args.positions, f"{source}: {len(tokens)} tokens, --positions asks for {args.positions}")
    return tokens[: args.positions]


def _fail(error: Exception, status: int) -> int:
    print(f"accuracy: error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
