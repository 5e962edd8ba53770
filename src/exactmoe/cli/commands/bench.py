"""`exactmoe bench`: the time of each kernel at its real shapes, judged first."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from exactmoe.cli import options, progress
from exactmoe.kernels.errors import InvalidInput, require

if TYPE_CHECKING:
    from exactmoe.bench.run import Row

HELP = "time the kernels at the shapes of Qwen3-30B-A3B on a CUDA device, after judging their bits"
EXAMPLES = """examples:
  exactmoe bench --list
  exactmoe bench
  exactmoe bench qkv experts-up --activations q16_k --json -
  exactmoe bench --record
  exactmoe bench qkv lm-head --compare HEAD~1
  exactmoe bench --model big.gguf --context 4096 --trace step.json
  exactmoe bench --history bench/results/nvidia-h100-80gb-hbm3.jsonl

Times are of the device, between events around replays of a graph: cold with weights rotated so that they come from
memory, warm from the cache. The roofs are measured in the same run. A kernel whose bits are not the reference's gets no
time.

With --compare the verdict is on pairs of times, this tree's over REF's: faster, slower, or the same within an interval.

exit status: 0 every kernel is right and none slower than REF, 1 one is not right, slower or missing, 2 the arguments
are refused, 3 no CUDA device
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all)")
    parser.add_argument("--list", action="store_true", help="print the names and cases, and run nothing")
    options.add_activations(parser)
    parser.add_argument("--record", action="store_true", help="add the run to the history in bench/results")
    parser.add_argument("--history", type=Path, metavar="FILE", help="print the runs that FILE holds, and run nothing")
    parser.add_argument("--html", type=Path, metavar="FILE", help="with --history: write it as a page with plots")
    parser.add_argument(
        "--compare", metavar="REF", help="time this tree against the git revision REF, both at once, in turn"
    )
    parser.add_argument("--model", metavar="GGUF", help="time the whole decode step of this model instead")
    parser.add_argument(
        "--context", type=int, default=0, metavar="N", help="with --model: positions before the step (default: 0)"
    )
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="with --model: write a profile of some steps, for Perfetto"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON too; - is stdout")


def run(args: argparse.Namespace) -> int:
    """Judge and time; 0 if all are right, else 1."""
    if args.history is not None:
        return _history(args)
    require(args.html is None, "--html draws a --history")
    if args.json not in (None, "-"):
        options.require_writable(args.json)
    if args.model is not None:
        return _step(args)
    require(args.trace is None and args.context == 0, "--trace and --context are of the decode step of a --model")
    from exactmoe.kernels.launch import resolve_device

    device = resolve_device("auto")
    from exactmoe.bench.cases import benches

    table = benches(args.activations)
    unknown = [name for name in args.names if name not in table]
    if unknown:
        raise InvalidInput(f"no benchmark is named {', '.join(unknown)}; there are {', '.join(table)}")
    chosen = [table[name] for name in args.names or table]
    if args.list:
        print("\n".join(f"{bench.name:20} {bench.case.op:18} {bench.case}" for bench in chosen))
        return 0
    if args.compare is not None:
        return _compare(args, [bench.name for bench in chosen])
    from exactmoe.bench.history import FOLDER
    from exactmoe.bench.run import append
    from exactmoe.bench.run import run as run_benches

    stream = sys.stderr if args.json == "-" else sys.stdout
    print(f"{'':20} {'us':>10} {'p10':>9} {'p90':>9} {'warm':>9} {'GB/s':>7} {'TFLOP/s':>8}   roof", file=stream)
    found = run_benches(chosen, device, args.activations, lambda row: print(_line(row), file=stream, flush=True))
    print(f"roofs: copy {found.copy_gb_s:.0f} GB/s, fp16 matmul {found.matmul_tflop_s:.0f} TFLOP/s", file=stream)
    _write_json(args.json, found.to_dict())
    if args.record:
        print(f"recorded in {append(found, FOLDER)}", file=stream)
    return 0 if all(row.equal for row in found.rows) else 1


def _write_json(path: str | None, found: object) -> None:
    if path is None:
        return
    text = json.dumps(found, indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        with options.whole_file(path) as out:
            out.write(text.encode())


def _compare(args: argparse.Namespace, names: list[str]) -> int:
    from exactmoe.bench.compare import compare, revisions
    from exactmoe.kernels.launch import resolve_device

    resolve_device("cuda")
    stream = sys.stderr if args.json == "-" else sys.stdout
    verdicts = []
    with revisions(args.compare, args.activations) as (other, this):
        for verdict in compare(names, other, this):
            verdicts.append(verdict)
            print(verdict, file=stream, flush=True)
    _write_json(args.json, [verdict.to_dict() for verdict in verdicts])
    failed = [verdict.name for verdict in verdicts if not verdict.passed]
    print(f"{len(verdicts)} compared with {args.compare}: {len(failed)} slower, wrong or missing", file=stream)
    return 1 if failed else 0


def _step(args: argparse.Namespace) -> int:
    """The decode step of a model."""
    from exactmoe.kernels.launch import resolve_device

    require(args.context >= 0, f"--context must be 0 or more, got {args.context}")
    require(not (args.names or args.compare or args.record), "--model times one step: no names, --compare or --record")
    if args.trace is not None:
        options.require_writable(args.trace)
    file, _ = options.open_model(args.model)
    device = resolve_device("cuda")
    from statistics import median

    from exactmoe.bench.step import TOKENS, busy, summary, time_step, trace_step
    from exactmoe.model.weights import load_model

    stream = sys.stderr if args.json == "-" else sys.stdout
    with progress.transfer("loading") as tell:
        model = load_model(file, device, args.activations, args.context + TOKENS, tell)
    samples = time_step(model, args.context)
    us = median(samples)
    spread = f"{min(samples):.1f} to {max(samples):.1f}"
    print(f"{us:.1f} us a token ({spread}), {1e6 / us:.1f} tokens/s after {args.context} positions", file=stream)
    found = {"context": args.context, "activations": args.activations, "us": samples, "tokens_s": 1e6 / us}
    if args.trace is not None:
        trace = trace_step(model, args.context, args.trace)
        for kernel in summary(trace):
            print(f"{kernel.name:36} {kernel.calls:6} calls {kernel.median:9.2f} us {kernel.total:11.1f}", file=stream)
        print(f"{busy(trace):.1f} us busy; {args.trace} opens in ui.perfetto.dev", file=stream)
    _write_json(args.json, found)
    return 0


def _line(row: "Row") -> str:
    if row.cold is None or row.warm is None:
        return f"{row.name:20} WRONG: not the reference's bits, so it has no speed"
    tflop_s = f"{row.tflop_s:8.1f}" if row.tflop_s else " " * 8
    times = f"{row.cold.median:10.2f} {row.cold.p10:9.2f} {row.cold.p90:9.2f} {row.warm.median:9.2f}"
    return f"{row.name:20} {times} {row.gb_s or 0:7.0f} {tflop_s} {100 * (row.roof or 0):5.1f}%"


def _history(args: argparse.Namespace) -> int:
    from exactmoe.bench.history import lines, read

    if not args.history.is_file():
        raise InvalidInput(f"{args.history}: there is no such file")
    runs = read(args.history)
    if not runs:
        raise InvalidInput(f"{args.history}: no run is recorded there")
    print("\n".join(lines(runs, args.names)))
    if args.html is not None:
        from exactmoe.bench.page import render_history

        options.require_writable(args.html)
        with options.whole_file(args.html) as out:
            out.write(render_history(runs, args.history.stem).encode())
    return 0
