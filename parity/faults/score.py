"""How well bisection names the faults of the catalogue.

    python -m exactmoe.parity.faults.score [MODEL] [--json [FILE]] [--html FILE] [--markdown]

Every fault is planted and bisected, and so is its control, the same planting without the mistake. The exit status is 0
where all are caught and named to the stage, all faults of one expert or block to the expert or block, and all controls
are clean. A second table holds what metrics in common use would have said of the same faults."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exactmoe.kernels.errors import InvalidInput, MissingEnvironment, require
from exactmoe.model.stages import WHOLE_MODEL, Key
from exactmoe.parity.run import label

if TYPE_CHECKING:
    from exactmoe.model.gguf.reader import GGUFFile
    from exactmoe.parity.bisect.search import Place
    from exactmoe.parity.faults.catalogue_model import ModelFault, Spot

_FOLDER = Path(__file__).resolve().parent.parent.parent / "model" / "tiny"
TOKENS = 16  # of the shipped text


@dataclass(frozen=True)
class Row:
    """One fault, bisected."""

    fault: str
    planted: str  # the stage and layer that must be named
    named: str | None  # those that were
    expert_or_block: bool | None  # whether that was named too; None where the fault is of neither
    passes: int  # forward passes of the suspect
    most_passes: int
    steps: int  # single stages besides
    control_clean: bool
    stage_metrics: dict[str, bool]  # on the planted stage: metric -> detected
    logit_metrics: dict[str, bool]  # on the logits

    @property
    def right(self) -> bool:
        """Caught, and named in full; and the control is clean."""
        return self.named == self.planted and self.expert_or_block is not False and self.control_clean


@dataclass(frozen=True)
class Score:
    """All rows."""

    rows: tuple[Row, ...]
    seconds: float

    @property
    def perfect(self) -> bool:
        """Every row is right; none at all is not perfect."""
        return len(self.rows) > 0 and all(row.right for row in self.rows)

    def counts(self) -> dict[str, tuple[int, int]]:
        """What was achieved, of how many."""
        rows = self.rows
        within = [row for row in rows if row.expert_or_block is not None]
        return {
            "caught": (sum(row.named is not None for row in rows), len(rows)),
            "named to the stage": (sum(row.named == row.planted for row in rows), len(rows)),
            "named to the expert or block": (sum(row.expert_or_block is True for row in within), len(within)),
            "controls clean": (sum(row.control_clean for row in rows), len(rows)),
        }

    def power(self) -> dict[str, tuple[int, int]]:
        """Faults each metric detects, at the planted stage and in the logits."""
        names = self.rows[0].stage_metrics if self.rows else {}
        return {
            name: (sum(r.stage_metrics[name] for r in self.rows), sum(r.logit_metrics[name] for r in self.rows))
            for name in names
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "perfect": self.perfect,
            "counts": self.counts(),
            "power": self.power(),
            "seconds": self.seconds,
            "rows": [{**asdict(row), "right": row.right} for row in self.rows],
        }


def score(
    file: "GGUFFile",
    tokens: Sequence[int],
    profile: str = "q8_k",
    faults: "Sequence[ModelFault] | None" = None,
    progress: Callable[[str], None] | None = None,
) -> Score:
    """Bisect every fault of the catalogue, or those given, over `tokens`."""
    from exactmoe.parity.faults.catalogue_model import MODEL_FAULTS

    began = time.perf_counter()
    rows = []
    for fault in MODEL_FAULTS if faults is None else faults:
        if progress:
            progress(fault.name)
        rows.append(_row(fault, file, tokens, profile))
    return Score(tuple(rows), time.perf_counter() - began)


class _Two:
    """A plan for one stage and the logits."""

    def __init__(self, key: Key) -> None:
        self._keys = {key, ("lm_head", WHOLE_MODEL)}

    def wants(self, stage: str, layer: int) -> bool:
        return (stage, layer) in self._keys


def _row(fault: "ModelFault", file: "GGUFFile", tokens: Sequence[int], profile: str) -> Row:
    from exactmoe.parity.bisect.search import bisect
    from exactmoe.parity.faults.catalogue_model import prepared
    from exactmoe.parity.faults.power import detected

    with prepared(fault, file, tokens, profile) as pair:
        found = bisect(pair.reference, pair.suspect, file, tokens, name=fault.name)
        plan = _Two(pair.key)
        right, wrong = (side.trace((), tokens, plan) for side in (pair.reference, pair.suspect))
        logits = "lm_head", WHOLE_MODEL
        metrics = [detected(right[key], wrong[key]) for key in (pair.key, logits)]
        within = _within(fault, found.place, pair.spot) if fault.expert or fault.block else None
        planted = label(*pair.key)
    with prepared(fault, file, tokens, profile, control=True) as pair:
        control = bisect(pair.reference, pair.suspect, file, tokens, name=f"control of {fault.name}")
    return Row(
        fault=fault.name,
        planted=planted,
        named=label(found.stage, found.layer) if found.stage is not None and found.layer is not None else None,
        expert_or_block=within,
        passes=found.passes,
        most_passes=found.most_passes,
        steps=found.steps,
        control_clean=control.clean,
        stage_metrics=metrics[0],
        logit_metrics=metrics[1],
    )


def _within(fault: "ModelFault", place: "Place | None", spot: "Spot") -> bool:
    """Whether the expert, or the block, or both were named."""
    return (
        place is not None
        and (not fault.expert or place.experts == (spot.expert,))
        and (not fault.block or place.block == spot.block)
    )


def markdown(result: Score) -> str:
    """The two tables of the README."""
    n = len(result.rows)
    lines = ["| of the planted faults | |", "|---|---|"]
    lines += [f"| {what} | {got} of {of} |" for what, (got, of) in result.counts().items()]
    passes = [row.passes for row in result.rows]
    lines.append(
        f"| forward passes a bisection | {min(passes)} to {max(passes)}, at most {result.rows[0].most_passes} |"
    )
    lines += ["", f"| metric | detects at the planted stage, of {n} | in the logits, of {n} |", "|---|--:|--:|"]
    lines += [f"| {name} | {stage} | {logits} |" for name, (stage, logits) in result.power().items()]
    return "\n".join(lines)


def table(result: Score) -> str:
    """Every row in a line of text."""
    head = f"{'fault':32} {'planted in':34} {'named':34} {'within':7} {'passes':>6} control"
    lines = [head]
    for row in result.rows:
        within = {None: "", True: "yes", False: "NO"}[row.expert_or_block]
        named = "NOT CAUGHT" if row.named is None else "yes" if row.named == row.planted else row.named
        clean = "clean" if row.control_clean else "NOT CLEAN"
        lines.append(f"{row.fault:32} {row.planted:34} {named:34} {within:7} {row.passes:6} {clean}")
    lines += [f"{what}: {got} of {of}" for what, (got, of) in result.counts().items()]
    lines += [f"{name}: detects {s} at the stage, {o} in the logits" for name, (s, o) in result.power().items()]
    lines.append(f"SCORE: {'perfect' if result.perfect else 'NOT PERFECT'}, {result.seconds:.0f} s")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0 for a perfect score, 1 for another, 2 for refused input, 3 for a missing package."""
    parser = argparse.ArgumentParser(prog="python -m exactmoe.parity.faults.score", description="Score of bisection.")
    parser.add_argument("model", nargs="?", type=Path, default=_FOLDER / "qwen3-moe-tiny.gguf", metavar="MODEL")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="JSON to FILE, or in place of the text")
    parser.add_argument("--html", type=Path, metavar="FILE", help="a page with what each metric says of each fault")
    parser.add_argument("--markdown", action="store_true", help="the tables of the README in place of the text")
    args = parser.parse_args(argv)
    try:
        from exactmoe.model.gguf.reader import open_gguf
        from exactmoe.model.tokenizer import load_tokenizer

        file = open_gguf(args.model)
        text = (_FOLDER / "prompt.txt").read_text(encoding="utf-8")
        tokens = load_tokenizer(file).encode(text, add_special_tokens=False).ids[:TOKENS]
        require(len(tokens) == TOKENS, f"the text has {len(tokens)} tokens, {TOKENS} are needed")
        result = score(file, tokens)
        if args.json is not None:
            text = json.dumps(result.to_dict(), indent=2) + "\n"
            if args.json == "-":
                sys.stdout.write(text)
            else:
                Path(args.json).write_text(text, encoding="utf-8")
        if args.html is not None:
            from exactmoe.parity.html.score import render_score

            args.html.write_text(render_score(result), encoding="utf-8")
        if args.json != "-":
            print(markdown(result) if args.markdown else table(result))
    except (InvalidInput, OSError) as error:
        print(f"score: error: {error}", file=sys.stderr)
        return 2
    except MissingEnvironment as error:
        print(f"score: error: {error}", file=sys.stderr)
        return 3
    return 0 if result.perfect else 1


if __name__ == "__main__":
    sys.exit(main())
