"""Arguments that several commands share, and the checks on what they name. No heavy import happens at import."""

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from exactmoe.kernels.errors import InvalidInput, require

if TYPE_CHECKING:
    from exactmoe.model.config import Config
    from exactmoe.model.gguf.reader import GGUFFile

DEFAULT_POSITIONS = 64
"""Tokens of a text that a command runs unless told otherwise."""

PROFILES = ("q8_k", "q16_k")
DEVICES = ("auto", "cuda", "interpret")
BACKENDS = ("triton", "reference")

_PACKAGE = Path(__file__).resolve().parent.parent
SHIPPED_MODEL = _PACKAGE / "model" / "tiny" / "qwen3-moe-tiny.gguf"
SHIPPED_TEXT = _PACKAGE / "model" / "tiny" / "prompt.txt"


def token_ids(text: str) -> list[int]:
    """Argument type: ids separated by commas, at least one."""
    ids = []
    for part in text.split(","):
        if not (part.strip().isascii() and part.strip().isdigit()):
            raise argparse.ArgumentTypeError(f"{part!r} is not a token id; give ids as 1,2,3")
        ids.append(int(part))
    return ids


def positive(text: str) -> int:
    """Argument type: an integer of at least 1."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def add_activations(parser: argparse.ArgumentParser) -> None:
    """--activations."""
    parser.add_argument(
        "--activations", choices=PROFILES, default="q8_k", help="how activations are quantised (default: q8_k)"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="where Triton kernels run: cuda, interpret (on the CPU), or auto, which is cuda where there is one",
    )


def add_backend(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """--backend, and --device beside it."""
    what = "the Triton kernels or the numpy reference" + ("" if required else " (default: triton)")
    parser.add_argument(
        "--backend", choices=BACKENDS, default=None if required else "triton", required=required, help=what
    )
    add_device(parser)


def require_backend(args: argparse.Namespace) -> None:
    """Refuse --device beside the reference, which always runs in numpy."""
    require(
        args.backend == "triton" or args.device == "auto",
        f"--device {args.device} is for --backend triton; the reference runs in numpy",
    )


def open_model(path: str | os.PathLike[str]) -> "tuple[GGUFFile, Config]":
    """Open and judge the whole file; raises InvalidInput for one that cannot run."""
    from exactmoe.model.config import Config, check_model
    from exactmoe.model.gguf.reader import open_gguf

    file = open_gguf(path)
    config = Config.from_gguf(file)
    check_model(file, config)
    return file, config


def require_prompt(tokens: Sequence[int], more: int, config: "Config") -> None:
    """Refuse a prompt the model cannot take, alone or with `more` tokens after it."""
    from exactmoe.model.generate import require_prompt

    require_prompt(tokens, more, config.vocab, config.context_length)


def encode(file: "GGUFFile", text: str) -> list[int]:
    """Token ids of `text` under the file's own tokenizer, nothing added."""
    from exactmoe.model.tokenizer import load_tokenizer

    ids: list[int] = load_tokenizer(file).encode(text, add_special_tokens=False).ids
    return ids


def add_prompt(parser: argparse.ArgumentParser, cut: str = "--first") -> None:
    """--tokens or --text, and `cut`, the option that cuts a text to its first tokens."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--tokens", type=token_ids, metavar="1,2,3", help="the prompt, as token ids")
    source.add_argument("--text", metavar="FILE", help="the prompt, as text (default: the shipped code)")
    parser.add_argument(
        cut,
        dest="first",
        type=positive,
        metavar="N",
        help=f"cut the text to its first N tokens (default: {DEFAULT_POSITIONS}, or all of a shorter text)",
    )
    parser.set_defaults(cut=cut)


def prompt(args: argparse.Namespace, file: "GGUFFile") -> list[int]:
    """The token ids that `add_prompt`'s options name; raises InvalidInput for a text that is empty or too short."""
    if args.tokens is not None:
        require(args.first is None, f"{args.cut} {args.first} cuts a text; with --tokens the prompt is what is given")
        tokens: list[int] = args.tokens
        return tokens
    source = args.text or SHIPPED_TEXT
    tokens = encode(file, read_text(source))
    require(len(tokens) > 0, f"{source}: the text is empty: no token to run")
    wanted = args.first or min(DEFAULT_POSITIONS, len(tokens))
    require(len(tokens) >= wanted, f"{source}: the text has {len(tokens)} tokens, {args.cut} asks for {wanted}")
    return tokens[:wanted]


def read_text(path: str | os.PathLike[str]) -> str:
    """The UTF-8 text of a file; raises InvalidInput that names it."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path}: not UTF-8 text at byte {error.start} ({error.reason})") from error


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write `path` whole or leave it as it was: what is written appears under its name at the end, or not at all.

    Raises InvalidInput where the file cannot be written."""
    name = os.fspath(path)
    partial = f"{name}.{os.getpid()}.partial"
    try:
        with open(partial, "xb") as file:
            yield file
        os.replace(partial, name)
    except OSError as error:
        raise InvalidInput(f"{name}: cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)


def require_writable(path: str | os.PathLike[str]) -> None:
    """Refuse an output path before the work whose result it is to hold."""
    folder = os.path.dirname(os.fspath(path)) or "."
    require(os.path.isdir(folder), f"{os.fspath(path)}: there is no folder {folder}")
    require(not os.path.isdir(path), f"{os.fspath(path)}: is a folder")
    require(os.access(folder, os.W_OK), f"{os.fspath(path)}: the folder {folder} cannot be written")
