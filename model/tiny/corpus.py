"""Text for the tiny model: Python sources found on the machine, a held-out part, a tokenizer and its tokens.

The standard library comes first; installed packages under permissive licences are added so that a few minutes of
training do not turn into many passes over the same text. Nothing is downloaded. What was read is recorded package by
package."""

import hashlib
import importlib.metadata
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from exactmoe.model.tokenizer import QWEN2_SPLIT

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_PER_256 = 12  # share of the standard library's files, by hash of their path
MAX_FILE_BYTES = 400_000  # larger sources are mostly tables
# fmt: off
PACKAGES = (
    "numpy", "scipy", "sympy", "networkx", "pandas", "scikit-learn", "scikit-image", "statsmodels", "matplotlib",
    "jax", "jaxlib", "flax", "optax", "chex", "equinox", "diffrax", "optimistix", "lineax", "numpyro", "torch",
    "torchvision", "torchaudio", "transformers", "accelerate", "peft", "triton", "pytest", "hypothesis", "setuptools",
    "pygments", "rich", "coverage", "cython", "numba", "llvmlite", "cupy-cuda13x", "h5py", "xarray", "seaborn",
    "patsy", "formulaic", "joblib", "aiohttp", "click", "jinja2", "werkzeug", "requests", "urllib3", "attrs",
    "sortedcontainers", "mpmath", "fsspec", "gpytorch", "botorch", "linear-operator", "pytorch-lightning",
    "lightning", "torch-geometric", "torchmetrics", "onnx", "onnxscript", "orbax-checkpoint", "tensorboard",
    "pyarrow", "typer", "portalocker", "einops", "e3nn", "timm", "huggingface-hub", "tokenizers", "safetensors",
    "psutil", "absl-py", "markdown", "protobuf", "jaxtyping",
)
# fmt: on
_SKIPPED = {"..", "_vendor", "_vendored", "vendored", "extern", "externals"}  # copies under licences of their own
_PERMISSIVE = re.compile(r"\b(BSD|MIT|Apache|PSF|Python Software Foundation|ISC|HPND|0BSD)\b", re.IGNORECASE)
_REFUSED = re.compile(r"\b(A?GPL|LGPL|MPL|Proprietary)", re.IGNORECASE)


class Source(NamedTuple):
    """One file of Python source."""

    origin: str  # "stdlib" or a distribution's name
    path: str  # relative to the origin
    text: str


class Corpus(NamedTuple):
    """What was found, split into text to train on and text that is held out."""

    train: list[Source]
    held_out: list[Source]
    record: list[dict[str, object]]  # one entry an origin: name, version, licence, files, bytes
    dropped_near_copies: int


def gather(max_bytes: int, package_bytes: int) -> Corpus:
    """Read at most `max_bytes` of text, at most `package_bytes` of one package; the standard library is read whole.

    A file of the standard library is held out by the hash of its relative path. No training file has a held-out file's
    content, nor more than 30% of its long lines."""
    seen: set[str] = set()
    stdlib = list(_fresh(_stdlib_sources(), seen))
    held_out = [s for s in stdlib if _rank(s.path)[0] < HELD_OUT_PER_256]
    train = [s for s in stdlib if _rank(s.path)[0] >= HELD_OUT_PER_256]
    facts = {"stdlib": (sys.version.split()[0], "PSF-2.0")}
    total = _size(train)
    for name in PACKAGES:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        licence = _licence(distribution)
        if licence is None or total >= max_bytes:
            continue
        facts[name] = (distribution.version, licence)
        size, limit = 0, min(package_bytes, max_bytes - total)
        for source in _fresh(_package_sources(name, distribution), seen):
            size += _size([source])
            if size > limit:
                break
            train.append(source)
            total += _size([source])
    kept = without_near_copies(train, held_out)
    record = [_entry("stdlib (held out)", facts["stdlib"], held_out)]
    by_origin: dict[str, list[Source]] = {}
    for source in kept:
        by_origin.setdefault(source.origin, []).append(source)
    record += [_entry(name, facts[name], sources) for name, sources in by_origin.items()]
    return Corpus(kept, held_out, record, len(train) - len(kept))


def without_near_copies(train: list[Source], held_out: list[Source], share: float = 0.3) -> list[Source]:
    """The training files that hold at most `share` of any held-out file's distinct lines of 30 characters or more."""
    owners: dict[str, list[int]] = {}
    size = []
    for i, source in enumerate(held_out):
        lines = _long_lines(source.text)
        size.append(len(lines))
        for line in lines:
            owners.setdefault(line, []).append(i)
    kept = []
    for source in train:
        shared = Counter(i for line in _long_lines(source.text) for i in owners.get(line, ()))
        if all(count <= share * size[i] for i, count in shared.items()):
            kept.append(source)
    return kept


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Byte-level BPE of `vocab` tokens with Qwen2's normaliser and pre-tokeniser; `END_OF_TEXT` is the last id."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts in order, each closed by END_OF_TEXT: one u16 array."""
    end = np.array([tokenizer.token_to_id(END_OF_TEXT)], np.uint16)
    parts: list[np.ndarray] = []
    for start in range(0, len(texts), 1024):
        for encoding in tokenizer.encode_batch(texts[start : start + 1024], add_special_tokens=False):
            parts += [np.array(encoding.ids, np.uint16), end]
    return np.concatenate(parts)


def held_out_windows(tokens: np.ndarray, count: int, span: int) -> np.ndarray:
    """`count` windows of `span` tokens, evenly spread over the held-out stream: [count, span] u16."""
    starts = np.linspace(0, len(tokens) - span, count).astype(np.int64)
    return np.stack([tokens[s : s + span] for s in starts])


def _stdlib_sources() -> Iterator[Source]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not {"site-packages", "dist-packages", "__pycache__"} & set(parts):
            text = _read(path)
            if text is not None:
                yield Source("stdlib", "/".join(parts), text)


def _package_sources(name: str, distribution: importlib.metadata.Distribution) -> Iterator[Source]:
    files = [f for f in distribution.files or () if f.suffix == ".py" and not _SKIPPED & set(f.parts)]
    for file in sorted(files, key=lambda f: _rank(str(f))):  # hash order, so that a cap takes a fair sample
        text = _read(Path(str(distribution.locate_file(file))))
        if text is not None:
            yield Source(name, str(file), text)


def _read(path: Path) -> str | None:
    try:
        data = path.read_bytes()
        text = data.decode()
    except (OSError, UnicodeDecodeError):
        return None
    lines = text.count("\n") + 1
    plain = 200 <= len(data) <= MAX_FILE_BYTES and len(text) / lines < 100 and "\0" not in text
    return text.replace("\r\n", "\n") if plain and END_OF_TEXT not in text else None


def _fresh(sources: Iterable[Source], seen: set[str]) -> Iterator[Source]:
    for source in sources:
        digest = hashlib.sha256(source.text.encode()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            yield source


def _licence(distribution: importlib.metadata.Distribution) -> str | None:
    """The licence as the package's metadata states it, or None unless it is plainly a permissive one."""
    metadata = distribution.metadata
    classifiers = [
        c.rsplit("::", 1)[1].strip() for c in metadata.get_all("Classifier") or () if c.startswith("License")
    ]
    expression = (metadata.get_all("License-Expression") or [""])[0]
    stated = expression or "; ".join(classifiers) or (metadata.get_all("License") or [""])[0][:60]
    return stated if _PERMISSIVE.search(stated) and not _REFUSED.search(stated) else None


def _entry(name: str, facts: tuple[str, str], sources: list[Source]) -> dict[str, object]:
    version, licence = facts
    return {"name": name, "version": version, "licence": licence, "files": len(sources), "bytes": _size(sources)}


def _size(sources: Iterable[Source]) -> int:
    return sum(len(s.text.encode()) for s in sources)


def _long_lines(text: str) -> set[str]:
    return {stripped for line in text.splitlines() if len(stripped := line.strip()) >= 30}


def _rank(path: str) -> bytes:
    return hashlib.sha256(path.encode()).digest()
