"""Publish a trained model: the GGUF, its tokenizer.json, the held-out windows and the model card, in this folder.

    python -m exactmoe.model.tiny.card WEIGHTS_DIR [--sharpened FILE.gguf]

With --sharpened, what ships is that file: the quantised model after model.tiny.sharpen. Every number on the card is
measured here or comes from the training log, so the card cannot drift from the file."""

import argparse
import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from exactmoe.kernels.errors import InvalidInput, MissingEnvironment, require
from exactmoe.model.gguf.reader import open_gguf
from exactmoe.model.tiny import build, evaluate
from exactmoe.model.type_mix import q4_k_m

_FIRST = 4  # windows whose loss the tests measure again

_CARD = """# {name}

A small Qwen3-MoE trained on Python source code. It exists to prove arithmetic: it is real enough to route, attend and
write plausible Python, and small enough to live in a repository. It is of no use as an assistant.

| | |
|---|---|
| file | `qwen3-moe-tiny.gguf`, {size:,} bytes |
| sha256 | `{sha256}` |
| architecture | `qwen3moe`: Qwen3MoeForCausalLM, {parameters:,} parameters |
| dims | hidden {hidden}, {n_layers} layers, {n_heads} query heads and {n_kv_heads} key/value heads of {head_dim}, \
{n_experts} experts of width {expert_width}, {n_active} a token, vocabulary {vocab:,}, `output` untied |
| numbers | RoPE base {rope_base:g}, RMSNorm eps {eps:g}, context length {context_length:,} \
(trained on windows of {span:,}) |
| quantisation | Q4_K_M: {mix} |
| tokenizer | byte-level BPE of {vocab:,} tokens with Qwen2's pre-tokeniser and NFC; \
`<\\|endoftext\\|>` ends a text and is the last id |
| licence | Apache-2.0 |

## Held-out loss
Nats a token over {windows} windows of {window} tokens (`heldout.npy`), each window on its own, from files of the
standard library that were never trained on.

| weights | loss |
|---|---|
| float32, as trained | {loss_f32:.4f} |
| bf16, as saved | {loss_bf16:.4f} |
{losses_gguf}

This file: {loss_first:.3f} over the first {first} windows (the test suite measures these again). The file is measured
with float32 arithmetic on its dequantised weights, by `python -m exactmoe.model.tiny.evaluate`; the other two were
measured at the end of training. {tables} of the {held_out_files} held-out files are tables of `encodings/`.

## Training
{tokens_seen:,} tokens in {steps:,} steps of {batch} windows, {seconds:.0f} s on one {device} (torch {torch}, Python
{python}; {seconds_in_all:.0f} s in all with reading, tokenizing and compiling). AdamW, peak rate {lr:g}, warm-up and
cosine, bf16 products over float32 weights, load-balancing loss {balance:g}{tail}{noise}.
{sharpened}Share of the routed rows that the busiest and the idlest expert of each layer of this file get on held-out
text: {load}.

## Text
{files:,} files, {bytes:,} bytes; {corpus_tokens:,} tokens a pass, in which the standard library comes twice. Its files
are held out by the hash of their path; {near_copies} files that share more than 30% of a held-out file's
long lines were dropped. Nothing was downloaded: these packages were installed on the training machine. The licence is
what each package's own metadata states for the package as a whole.
{vendored}

| package | version | licence | files | bytes |
|---|---|---|--:|--:|
{packages}

## How to make it again
```
python -m exactmoe.model.tiny.train --out DIR    # needs a GPU; --help lists the settings
python -m exactmoe.model.tiny.card DIR           # quantises, measures, writes this folder's files
python -m exactmoe.model.tiny.sharpen qwen3-moe-tiny.gguf OUT.gguf
python -m exactmoe.model.tiny.card DIR --sharpened OUT.gguf
python -m exactmoe.model.tiny.evaluate           # held-out loss of the file
```
Another training run gives another model: it stops by the clock, as sharpening does, and a GPU's float sums have no
fixed order. Quantising the same weights gives the same bytes. `prompt.txt` is the default text of `exactmoe parity`,
written for this project.
"""

_SHARPENED = """After quantisation, routers and norms, which stay F32, were trained a little more on the standard
library (held-out files left out) by `model.tiny.sharpen`, so that a near tie between the last expert chosen and the
next one decides over little; every quantised tensor kept its bytes.
"""


class Measured(NamedTuple):
    """Losses in nats a token over the held-out windows, and who is routed where."""

    quantised: float  # as quantised
    final: float  # of the file that ships
    first: float  # of that over the first windows
    load: list[list[float]]  # [L, E] share of the routed rows


def publish(weights: Path, folder: Path, sharpened: Path | None = None) -> None:
    """Write the model, its tokenizer, the held-out windows and the card of the run in `weights` to `folder`.

    `sharpened` is the model's file after model.tiny.sharpen. Raises InvalidInput where that is of other weights."""
    log = build.read_json(weights / "train.json")
    model, held_out = folder / evaluate.MODEL.name, folder / evaluate.HELD_OUT.name
    final = sharpened.read_bytes() if sharpened else None
    build.build(weights, model)
    shutil.copyfile(weights / evaluate.HELD_OUT.name, held_out)
    shutil.copyfile(weights / "tokenizer.json", folder / "tokenizer.json")
    windows = np.load(held_out)
    quantised = evaluate.held_out_loss(evaluate.network_from_gguf(model), windows)
    if sharpened and final:
        _require_same_matrices(model, sharpened)
        model.write_bytes(final)
    network = evaluate.network_from_gguf(model)
    measured = Measured(
        quantised,
        evaluate.held_out_loss(network, windows),
        evaluate.held_out_loss(network, windows[:_FIRST]),
        evaluate.expert_load(network, windows),
    )
    card = render(log, model.read_bytes(), measured, sharpened is not None)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _require_same_matrices(model: Path, sharpened: Path) -> None:
    """Refuse a sharpened file whose quantised tensors are not the model's."""
    ours, theirs = open_gguf(model), open_gguf(sharpened)
    for name, info in ours.tensors.items():
        same = name in theirs.tensors and np.array_equal(ours.tensor(name), theirs.tensor(name))
        require(info.type_name == "F32" or same, f"{sharpened}: tensor {name} is not that of the weights given")


def render(log: dict[str, Any], model: bytes, measured: Measured, sharpened: bool) -> str:
    """Text of the card from the training log, the bytes of the file and what was measured of it."""
    dims, arguments = log["dims"], log["arguments"]
    read = [entry for entry in log["data"] if entry["name"] != "stdlib (held out)"]
    losses = log["held_out_loss"]
    noise = arguments.get("noise", 0)
    vendored = (
        "pip also carries copies of other packages, chardet (LGPL-2.1) and certifi (MPL-2.0) among them."
        if any(entry["name"] == "pip" for entry in read)
        else "Copies of other packages inside a package were left out."
    )
    return _CARD.format(
        **dims,
        name=build.NAME,
        size=len(model),
        sha256=hashlib.sha256(model).hexdigest(),
        parameters=log["parameters"],
        span=arguments["span"],
        mix=_mix(dims["n_layers"]),
        windows=losses["windows"][0],
        window=losses["windows"][1],
        loss_f32=losses["f32"],
        loss_bf16=losses["bf16"],
        losses_gguf=_losses(measured, sharpened),
        loss_first=measured.first,
        first=_FIRST,
        tables=sum(path.startswith("encodings/") for path in log["held_out_files"]),
        held_out_files=len(log["held_out_files"]),
        tokens_seen=log["tokens_seen"],
        steps=log["steps"],
        batch=arguments["batch"],
        seconds=log["training_seconds"],
        seconds_in_all=log["seconds_in_all"],
        device=log["device"],
        torch=log["versions"]["torch"],
        python=log["versions"]["python"],
        lr=arguments["lr"],
        balance=arguments["balance"],
        noise=f", noise on the activations up to {noise:g} steps of their 8-bit rounding" if noise else "",
        tail=f", penalty {arguments['tail']:g} on the weight of the last expert" if arguments.get("tail") else "",
        sharpened=_SHARPENED if sharpened else "",
        load=", ".join(f"{max(row):.3f} and {min(row):.3f}" for row in measured.load),
        files=sum(entry["files"] for entry in read),
        bytes=sum(entry["bytes"] for entry in read),
        corpus_tokens=log["tokens_in_corpus"],
        near_copies=log["dropped_near_copies"],
        vendored=vendored,
        packages="\n".join(
            f"| {e['name']} | {e['version']} | {e['licence']} | {e['files']:,} | {e['bytes']:,} |" for e in log["data"]
        ),
    )


def _losses(measured: Measured, sharpened: bool) -> str:
    """Rows of the table of losses for the file."""
    if not sharpened:
        return f"| this file, dequantised | {measured.final:.4f} |"
    return (
        f"| Q4_K_M, dequantised | {measured.quantised:.4f} |\n"
        f"| this file, dequantised: routers and norms trained after quantisation | {measured.final:.4f} |"
    )


def _mix(n_layers: int) -> str:
    """Say in words which tensors have which type."""
    more = [i for i in range(n_layers) if q4_k_m(f"blk.{i}.attn_v.weight", n_layers) == "Q6_K"]
    layers = " and ".join(map(str, more))
    six = f"`output`, and `attn_v` and `ffn_down_exps` of layers {layers}"
    return f"{six}, are Q6_K, the other matrices Q4_K, the router and the norms F32"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m exactmoe.model.tiny.card", description="Publish a trained model.")
    parser.add_argument("weights", type=Path, metavar="WEIGHTS_DIR", help="what exactmoe.model.tiny.train wrote")
    parser.add_argument(
        "--folder", type=Path, default=evaluate.FOLDER, help="where to write; default: beside this file"
    )
    parser.add_argument(
        "--sharpened", type=Path, metavar="FILE.gguf", help="ship this file of model.tiny.sharpen in its place"
    )
    args = parser.parse_args(argv)
    publish(args.weights, args.folder, args.sharpened)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except InvalidInput as error:
        print(f"card: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except MissingEnvironment as error:
        print(f"card: error: {error}", file=sys.stderr)
        raise SystemExit(3) from error
