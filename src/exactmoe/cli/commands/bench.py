"""`exactmoe bench`: the time of each kernel at its real shapes, judged first."""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from exactmoe.cli import options, progress
from exactmoe.kernels.errors import InvalidInput, require

if TYPE_CHECKING:
    from exactmoe.bench.peers.rows import Asked, PeerRow
    from exactmoe.bench.run import Row, Run

HELP = "time kernels at the shapes of Qwen3-30B-A3B, or a whole model, on a CUDA device, after judging their bits"
EXAMPLES = """examples:
  exactmoe bench --list
  exactmoe bench
  exactmoe bench qkv moe-layer-1 --activations q16_k --json -
  exactmoe bench --record
  exactmoe bench qkv lm-head --compare HEAD~1
  exactmoe bench qkv --compare HEAD --trials 20
  exactmoe bench qkv --compare HEAD --plant 3 --trials 20
  exactmoe bench --model big.gguf --record
  exactmoe bench --model big.gguf decode-4096 prefill-512
  exactmoe bench --model big.gguf --context 4096 --trace step.json
  exactmoe bench --model big.gguf decode-0 --compare HEAD~1
  exactmoe bench --model big.gguf --context 70 --repeat 1000
  exactmoe bench moe-layer-1 --peer torch-grouped-mm --peer transformers
  exactmoe bench --model big.gguf decode-0 --peer llama.cpp build/bin/llama-bench
  exactmoe bench --history bench/results/nvidia-h100-80gb-hbm3.jsonl --markdown
  exactmoe bench --readme README.md

Times are of the device, between events around replays of a graph, behind a quarter of a second of the same: cold with
weights rotated so that they come from memory, warm from the cache. The roofs are measured in the same run. A row whose
bits are not those it is judged by, the reference's for a kernel, gets no number.

With --model the rows are decode steps after 0, 4,096 and 32,768 positions, prompts of 512 to 4,096 tokens, loading, and
memory. Steps and prompts are judged by each other. A row that the model or the device is too small for is not run, and
refused where it was asked for.

With --repeat nothing is timed: one decode step runs so often after the same context, and every repeat must leave the
same bits: logits, token, and what is appended to the cache. A CPU will do.

With --peer other software does the same work in the same run: torch and transformers the MoE layers among the rows, in
bf16, transformers and llama.cpp the decoding of the --model. It has other numbers, so it is judged by closeness, a
layer by the layer in f64 and a model by our logits; llama-bench gives none and is not judged. What is not installed is
named as absent, and nothing needs it. With --record these rows stand beside ours in the history and the README's table.

With --compare the verdict is on pairs of times, this tree's over REF's: faster, slower, or the same: within half a
percent, or within the interval.
Of a --model decode steps are compared; each side holds the model, so it must fit the device twice.
With --trials and REF the tree itself, every faster or slower is a false alarm.

exit status: 0 every row is right and none slower than REF, every repeat the same, the README as the history says; 1 one
is not; 2 the arguments are refused, or a row that the model is too short for; 3 no CUDA device, or too little memory
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all)")
    parser.add_argument("--list", action="store_true", help="print the names and cases, and run nothing")
    options.add_activations(parser)
    parser.add_argument("--record", action="store_true", help="add the run to the history in bench/results")
    parser.add_argument("--history", type=Path, metavar="FILE", help="print the runs that FILE holds, and run nothing")
    parser.add_argument("--markdown", action="store_true", help="with --history: print the README's table of it")
    parser.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help="run nothing; 1 where the tables of speed in FILE are not those of --history (default: of bench/results)",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="with --history: write it as a page with plots")
    parser.add_argument(
        "--compare", metavar="REF", help="time this tree against the git revision REF, both at once, in turn"
    )
    parser.add_argument(
        "--trials", type=options.positive, metavar="N",
        help="with --compare: do it N times over, and say how often it said faster, slower and same",
    )  # fmt: skip
    parser.add_argument(
        "--plant", type=float, metavar="PERCENT",
        help="with --compare: slow this tree down by so much on the device, to see whether that is seen",
    )  # fmt: skip
    parser.add_argument(
        "--model", metavar="GGUF", help="measure this model instead: decode steps, prompts, loading and memory"
    )
    parser.add_argument("--context", type=int, metavar="N", help="with --model: only the decode step after N positions")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="as --context (default: 0), and write a profile of some steps to FILE",
    )
    parser.add_argument(
        "--repeat", type=options.positive, metavar="N",
        help="with --model: run the step after --context (default: 0) N times over, and say how many digests it has",
    )  # fmt: skip
    parser.add_argument(
        "--peer", nargs="+", action="append", default=[], metavar=("NAME", "PATH"),
        help="time this software too: torch-grouped-mm, transformers, or llama.cpp with the path of its llama-bench",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON too; - is stdout")


def run(args: argparse.Namespace) -> int:
    """Judge and time; 0 if all are right, else 1."""
    if args.history is not None or args.readme is not None:
        return _history(args)
    require(args.html is None and not args.markdown, "--html and --markdown are of a --history")
    if args.json not in (None, "-"):
        options.require_writable(args.json)
    of_compare = args.trials is None and args.plant is None
    require(args.compare is not None or of_compare, "--trials and --plant are of a --compare")
    require(not (args.peer and args.compare), "--peer is beside a run of this tree, not of a --compare")
    asked = _asked(args)
    if args.repeat is not None:
        return _repeat(args)
    if args.model is not None:
        return _whole(args, asked)
    require(args.trace is None and args.context is None, "--trace and --context are of the decode step of a --model")
    from exactmoe.kernels.launch import resolve_device

    device = resolve_device("auto")
    from exactmoe.bench.cases import benches

    table = benches(args.activations)
    chosen = [table[name] for name in _known(args.names, table)]
    if args.list:
        print("\n".join(f"{bench.name:20} {bench.case.op:18} {bench.case}" for bench in chosen))
        return 0
    if args.compare is not None:
        return _compare(args, [bench.name for bench in chosen])
    chunks = []
    if asked:
        from exactmoe.bench.peers.run import chunks_of

        chunks = chunks_of([bench.name for bench in chosen])
    from exactmoe.bench.run import run as run_benches

    stream = sys.stderr if args.json == "-" else sys.stdout
    print(_HEAD, file=stream)
    found = run_benches(chosen, device, args.activations, lambda row: print(_line(row), file=stream, flush=True))
    peers = []
    if asked:
        from exactmoe.bench.peers.run import layer_peers

        peers = _told(layer_peers(asked, device, chunks), stream)
    return _finish(args, found, stream, peers)


def _write_json(path: str | None, found: object) -> None:
    if path is None:
        return
    text = json.dumps(found, indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        with options.whole_file(path) as out:
            out.write(text.encode())


def _compare(args: argparse.Namespace, names: list[str], model: str | None = None) -> int:
    from exactmoe.bench.compare import PAIRS, PAIRS_OF_STEPS, STRETCHES, compare, revisions
    from exactmoe.bench.trials import lines, tally, to_dict
    from exactmoe.kernels.launch import resolve_device

    require(args.plant is None or args.plant > 0, f"--plant must be more than 0 percent, got {args.plant}")
    resolve_device("cuda")
    stream = sys.stderr if args.json == "-" else sys.stdout
    plant = None if args.plant is None else args.plant / 100
    verdicts = []
    for _ in range(args.trials or 1):
        with revisions(args.compare, args.activations, plant, model) as (other, this):
            pairs = PAIRS if model is None else PAIRS_OF_STEPS
            for verdict in compare(names, other, this, pairs, partial(progress.track, total=STRETCHES)):
                verdicts.append(verdict)
                print(verdict, file=stream, flush=True)
    found: object = [verdict.to_dict() for verdict in verdicts]
    if args.trials is not None:
        rates = tally(verdicts)
        print("\n".join(lines(rates)), file=stream)
        found = {"verdicts": found, "rates": to_dict(rates)}
    _write_json(args.json, found)
    failed = [verdict.name for verdict in verdicts if not verdict.passed]
    print(f"{len(verdicts)} compared with {args.compare}: {len(failed)} slower, wrong or missing", file=stream)
    return 1 if failed else 0


def _repeat(args: argparse.Namespace) -> int:
    """One step of a model, many times over."""
    require(args.model is not None, "--repeat is of the decode step of a --model")
    others = args.names or args.list or args.trace or args.record or args.compare or args.peer
    require(not others, "--repeat times nothing: no names, --list, --trace, --record, --compare or --peer beside it")
    require(args.repeat > 1, f"--repeat {args.repeat}: one step is no repeat")
    context = args.context or 0
    require(context >= 0, f"--context must be 0 or more, got {context}")
    file, config = options.open_model(args.model)
    longest = f"the model's context has {config.context_length} positions, so none is behind {context}"
    require(context < config.context_length, longest)
    from exactmoe.bench.repeats import repeats, to_dict
    from exactmoe.kernels.launch import resolve_device
    from exactmoe.model.capacity import needed, require_capacity
    from exactmoe.model.weights import load_model

    device = resolve_device("auto")
    require_capacity(needed(file, config, context + 1), device, f"a step of {args.model}")
    with progress.transfer("loading") as loading:
        model = load_model(file, device, args.activations, progress=loading)
    seen = repeats(model, context, args.repeat, lambda numbers: progress.track(numbers, "repeats", args.repeat))
    stream = sys.stderr if args.json == "-" else sys.stdout
    for found, count in seen.most_common():
        print(f"{count:6,} times {found}", file=stream)
    outcome = "all the same" if len(seen) == 1 else f"{len(seen)} different"
    print(f"{args.repeat:,} steps after {context:,} positions, {args.activations}: {outcome}", file=stream)
    _write_json(args.json, to_dict(seen, context, args.activations))
    return 0 if len(seen) == 1 else 1


def _whole(args: argparse.Namespace, asked: "Sequence[Asked]") -> int:
    """The rows of a whole model."""
    from exactmoe.kernels.launch import resolve_device

    require(args.plant is None, "--plant is of kernels: nothing can be planted in the step of a --model")
    require(args.context is None or args.context >= 0, f"--context must be 0 or more, got {args.context}")
    alone = args.context is not None or args.trace is not None
    require(not (alone and args.names), "--context and --trace are of one decode step: no names beside them")
    if args.trace is not None:
        options.require_writable(args.trace)
    require(not (alone and args.compare), "--compare takes names; --context and --trace are of one run")
    file, config = options.open_model(args.model)
    device = resolve_device("auto")
    from exactmoe.bench.timeline import busy, summary, trace_step
    from exactmoe.bench.whole import Whole, decode_rows, refusal, run_wholes, wholes

    table = wholes() if args.compare is None else decode_rows()
    if alone:
        only = Whole("decode", args.context or 0)
        table = {only.name: only}
    chosen = [table[name] for name in table if name in _known(args.names, table)]
    refused = {row.name: error for row in chosen if (error := refusal(row, file, config, device))}
    if refused and (alone or args.names or len(refused) == len(chosen)):
        raise next(iter(refused.values()))
    stream = sys.stderr if args.json == "-" else sys.stdout
    for name, error in refused.items():
        print(f"{name:20} not run: {error}", file=stream)
    chosen = [row for row in chosen if row.name not in refused]
    if args.list:
        print("\n".join(row.name for row in chosen))
        return 0
    if args.compare is not None:
        return _compare(args, [row.name for row in chosen], args.model)
    print(_HEAD, file=stream)
    with progress.transfer("loading") as tell:
        found, model = run_wholes(
            chosen, file, device, args.activations, lambda row: print(_line(row), file=stream, flush=True), tell
        )
    if args.trace is not None and all(row.equal for row in found.rows):
        trace = trace_step(model, args.context or 0)
        with options.whole_file(args.trace) as out:
            out.write(json.dumps(trace).encode())
        for kernel in summary(trace):
            print(f"{kernel.name:36} {kernel.calls:6} calls {kernel.median:9.2f} us {kernel.total:11.1f}", file=stream)
        print(f"{busy(trace):.1f} us busy; {args.trace} opens in ui.perfetto.dev", file=stream)
    peers = []
    if asked:
        from exactmoe.bench.peers.run import judge_of, model_peers
        from exactmoe.bench.whole import release

        contexts = [row.tokens for row in chosen if row.kind == "decode"]
        ours = judge_of(asked, model)
        del model
        release()  # a peer needs the device's memory for weights of its own
        peers = _told(model_peers(asked, file, config, device, contexts, ours), stream)
    return _finish(args, found, stream, peers)


def _known(names: list[str], table: Mapping[str, object]) -> list[str]:
    """`names`, or all; refuses one that is not in the table."""
    unknown = [name for name in names if name not in table]
    if unknown:
        raise InvalidInput(f"no benchmark is named {', '.join(unknown)}; there are {', '.join(table)}")
    return names or list(table)


def _asked(args: argparse.Namespace) -> "list[Asked]":
    """The peers that are wanted, before anything is allocated for them."""
    if not args.peer:
        return []
    from exactmoe.bench.peers.rows import parse

    return parse(args.peer, args.model is not None)


def _told(rows: "Iterable[PeerRow]", stream: TextIO) -> "list[PeerRow]":
    """The rows, each printed as it comes."""
    told = []
    for row in rows:
        told.append(row)
        print(row, file=stream, flush=True)
    return told


def _finish(args: argparse.Namespace, found: "Run", stream: TextIO, peers: "Sequence[PeerRow]") -> int:
    """Say what the roofs were, write what was asked for; 0 if all rows are right, else 1."""
    print(f"roofs: copy {found.copy_gb_s:.0f} GB/s, fp16 matmul {found.matmul_tflop_s:.0f} TFLOP/s", file=stream)
    found = replace(found, peers=tuple(peers))
    _write_json(args.json, found.to_dict())
    if args.record:
        from exactmoe.bench.history import FOLDER
        from exactmoe.bench.run import append

        print(f"recorded in {append(found, FOLDER)}", file=stream)
    if peers:
        from exactmoe.bench.peers.run import require_some

        require_some(peers)
    return 0 if all(row.equal for row in found.rows) else 1


_HEAD = f"{'':20} {'us':>10} {'p10':>9} {'p90':>9} {'warm':>9} {'GB/s':>7} {'TFLOP/s':>8}   roof  tokens/s"


def _line(row: "Row") -> str:
    if not row.equal:
        return f"{row.name:20} WRONG: not the bits it is judged by, so it has no number"
    if row.cold is None:
        return f"{row.name:20} {row.gib:10.2f} GiB {row.case}"
    warm = f"{row.warm.median:9.2f}" if row.warm else ""
    tflop_s = f"{row.tflop_s:.1f}" if row.tflop_s else ""
    rate = f"{1e6 * row.tokens / row.cold.median:.0f}" if row.tokens and not row.warm else ""
    times = f"{row.cold.median:10.2f} {row.cold.p10:9.2f} {row.cold.p90:9.2f} {warm:>9}"
    return f"{row.name:20} {times} {row.gb_s or 0:7.0f} {tflop_s:>8} {100 * (row.roof or 0):5.1f}% {rate:>8}".rstrip()


def _history(args: argparse.Namespace) -> int:
    from exactmoe.bench.history import FOLDER, lines, read
    from exactmoe.bench.table import by_device, differences, tables

    if args.history is None:
        require(args.html is None and not args.markdown, "--html and --markdown are of a --history")
        wanted = tables(FOLDER)
    else:
        require(args.history.is_file(), f"{args.history}: there is no such file")
        runs = read(args.history)
        require(bool(runs), f"{args.history}: no run is recorded there")
        wanted = by_device(runs)
        print("\n\n".join(wanted) if args.markdown else "\n".join(lines(runs, args.names)))
    if args.html is not None:
        from exactmoe.bench.page import render_history

        options.require_writable(args.html)
        with options.whole_file(args.html) as out:
            out.write(render_history(runs, args.history.stem).encode())
    if args.readme is None:
        return 0
    found = differences(options.read_text(args.readme), wanted)
    if found:
        print("\n".join([*found, f"{args.readme}: its tables of speed are not what the history says"]), file=sys.stderr)
    return 1 if found else 0
