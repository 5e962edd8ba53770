"""`exactmoe inspect`: what a GGUF file holds and whether it can run here."""

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exactmoe.model.inspect import Inspection

HELP = "print a GGUF's architecture, dims, types, bytes per decoded token, and whether it can run here"
EXAMPLES = """examples:
  exactmoe inspect model.gguf
  exactmoe inspect model.gguf --json

exit status: 0 it can run, 2 the file is refused, 3 there is nothing here to run it on
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", help="GGUF file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the report")


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 if the file can run here, 2 if it is refused, 3 without torch and triton."""
    from exactmoe.model.inspect import inspect_model

    found = inspect_model(args.model)
    print(json.dumps(_as_json(found), indent=2) if args.json else _as_text(found))
    if found.refusal is not None:
        return 2
    return 0 if found.runs else 3


def _verdict(found: "Inspection") -> str:
    if found.refusal is not None:
        return f"no: {found.refusal}"
    if found.device is None:
        return "no: torch and triton are not installed"
    return f"yes ({found.device})"


def _as_json(found: "Inspection") -> dict[str, Any]:
    config = None
    if found.config is not None:
        config = dict(vars(found.config), eps=float(found.config.eps))
    return {
        "path": found.path,
        "file_bytes": found.file_bytes,
        "architecture": found.architecture,
        "config": config,
        "tensors": [vars(group) for group in found.groups],
        "parameters": found.parameters,
        "active_parameters": found.active_parameters,
        "bytes_per_token": found.bytes_per_token,
        "runs": found.runs,
        "verdict": _verdict(found),
        "device": found.device,
    }


def _as_text(found: "Inspection") -> str:
    lines = [("file", found.path), ("size", f"{found.file_bytes:,} bytes"), ("architecture", str(found.architecture))]
    if found.config is not None:
        c = found.config
        lines += [
            ("layers", f"{c.n_layers}"),
            ("width", f"{c.hidden}"),
            ("heads", f"{c.n_heads} query, {c.n_kv_heads} key/value, of {c.head_dim}"),
            ("experts", f"{c.n_experts} of width {c.expert_width}, {c.n_active} per token"),
            ("vocabulary", f"{c.vocab:,}"),
            ("context", f"{c.context_length:,} positions"),
            ("rope base", f"{c.rope_base:g}"),
            ("norm eps", f"{c.eps:g}"),
        ]
    active = "" if found.active_parameters is None else f", {found.active_parameters:,} active per token"
    lines.append(("parameters", f"{found.parameters:,}{active}"))
    if found.bytes_per_token is not None:
        lines.append(("read per token", f"{found.bytes_per_token:,} bytes of weights, the KV cache not counted"))
    out = [f"{what:<14}  {value}" for what, value in lines]
    out += ["", f"{'tensor':<14}  {'type':<6} {'count':>5} {'parameters':>15} {'bytes':>15}"]
    for group in found.groups:
        amounts = f"{group.tensors:>5} {group.parameters:>15,} {group.nbytes:>15,}"
        out.append(f"{group.name:<14}  {group.type_name:<6} {amounts}")
    return "\n".join([*out, "", f"{'can run here':<14}  {_verdict(found)}"])
