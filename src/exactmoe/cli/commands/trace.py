"""`exactmoe trace`: run a prompt and save the stages of its forward pass."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exactmoe.cli import options, progress
from exactmoe.kernels.errors import require

if TYPE_CHECKING:
    from exactmoe.parity.trace.capture import Captured

HELP = "run a prompt and save stages of its forward pass, bit for bit"
EXAMPLES = """examples:
  exactmoe trace model.gguf -o traces/h100
  exactmoe trace model.gguf --stages moe_router,layer_output --layers 0..4,47 --positions last -o traces/routers
  exactmoe trace model.gguf --stages moe_expert_out --experts 17 --tokens 1,2,3 --backend reference -o traces/e17
  exactmoe trace model.gguf --digest -o h100.json

Stages: all, or names between commas in any case; layer_output is post_ffn_residual. Layers, positions, experts: all, or
numbers and ranges between commas (0..4 is 0,1,2,3); positions also last. Written: DIR/manifest.json, DIR/<stage> for
the whole model and DIR/layer-N/<stage>. A run that is stopped leaves whole files and a manifest that says it is
incomplete. With --digest, -o is one JSON file of hashes in place of the values.

exit status: 0 every stage that was asked for is saved, 2 the file, selection or folder is refused, 3 no CUDA device
where one was demanded
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", help="GGUF file")
    parser.add_argument("--stages", default="all", metavar="S", help="which stages (default: all)")
    parser.add_argument("--layers", default="all", metavar="L", help="of which layers (default: all)")
    parser.add_argument("--positions", metavar="P", help="which token positions to keep (default: all)")
    parser.add_argument("--experts", metavar="E", help="of the moe_expert_ stages, the rows of these experts alone")
    options.add_prompt(parser)
    options.add_backend(parser)
    options.add_activations(parser)
    parser.add_argument(
        "--format", choices=("safetensors", "aprt"), default="safetensors", help="of the files (default: safetensors)"
    )
    parser.add_argument("--digest", action="store_true", help="save a tree of hashes, of kilobytes, in place of values")
    parser.add_argument("--overwrite", action="store_true", help="replace a trace that is in DIR already")
    parser.add_argument("--json", metavar="FILE", help="write what was saved as JSON too; - is stdout")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="folder to write; a file with --digest")


def run(args: argparse.Namespace) -> int:
    """Trace and save."""
    options.require_backend(args)
    if args.json not in (None, "-"):
        options.require_writable(args.json)
    if args.digest:
        options.require_writable(args.output)
        require(args.format == "safetensors", "--format is for values; --digest writes JSON")
        require(args.positions is None and args.experts is None, "--digest hashes whole stages of every position")
    if args.backend == "triton":
        from exactmoe.kernels.launch import resolve_device

        resolve_device(args.device)
    file, config = options.open_model(args.model)
    tokens = options.prompt(args, file)
    options.require_prompt(tokens, 0, config)
    from exactmoe.model.plan import SaveTensorPlan

    plan = SaveTensorPlan.parse(
        args.stages,
        args.layers,
        args.positions,
        args.experts,
        n_layers=config.n_layers,
        n_positions=len(tokens),
        n_experts=config.n_experts,
        output_dir=Path(args.output),
    )
    if args.digest:
        from exactmoe.parity.trace.digest import digest_run

        with progress.status() as tell:
            tree = digest_run(file, tokens, plan, args.backend, args.activations, args.device, tell)
        with options.whole_file(args.output) as out:
            out.write(tree.to_json().encode())
        _report(args, {"output": args.output, "nodes": len(tree.nodes), "tokens": len(tokens), "root": tree.root})
        return 0
    from exactmoe.parity.trace.capture import capture

    with progress.status() as tell:
        captured = capture(
            file, tokens, plan, args.backend, args.activations, args.device, args.format,
            overwrite=args.overwrite, progress=tell,
        )  # fmt: skip
    _report(args, _summary(captured))
    return 0


def _summary(captured: "Captured") -> dict[str, Any]:
    manifest = captured.trace.manifest
    ratio = captured.traced_seconds / captured.production_seconds if captured.production_seconds else None
    return {
        "output": str(captured.trace.path),
        "tensors": len(manifest.tensors),
        "bytes": captured.bytes,
        "tokens": len(manifest.tokens),
        "positions": len(manifest.positions),
        "backend": manifest.backend,
        "device": manifest.device,
        "numerics": manifest.numerics,
        "activations": manifest.activations,
        "production_seconds": captured.production_seconds,
        "traced_seconds": captured.traced_seconds,
        "traced_over_production": ratio,
    }


def _report(args: argparse.Namespace, summary: dict[str, Any]) -> None:
    if args.json == "-":
        sys.stdout.write(json.dumps(summary, indent=2) + "\n")
        return
    if args.json is not None:
        with options.whole_file(args.json) as out:
            out.write((json.dumps(summary, indent=2) + "\n").encode())
    for name, value in summary.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' '):24}{shown}")
