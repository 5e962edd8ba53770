"""The tokenizer of a GGUF file, built from its metadata with the `tokenizers` library.

Byte-level BPE ("gpt2" in GGUF) with Qwen2's pre-tokeniser is implemented; anything else is refused. Texts are brought
to Unicode NFC first, as Qwen2's own tokenizer does; llama.cpp leaves that out, so they differ on text that is not NFC.
The literal text of a control token, such as <|endoftext|>, encodes to that token. Chat templates are never rendered."""

from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from exactmoe.kernels.errors import InvalidInput, MissingEnvironment, require
from exactmoe.model.gguf.reader import GGUFFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Qwen2's pre-tokeniser (transformers, tokenization_qwen2.py); llama.cpp has the same under the name "qwen2".
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT = {"qwen2": QWEN2_SPLIT}  # tokenizer.ggml.pre -> expression
# llama.cpp's llama_token_type. Decoding leaves out control tokens (skip_special_tokens), never user-defined ones.
_CONTROL, _USER_DEFINED = 3, 4


def load_tokenizer(file: GGUFFile) -> "Tokenizer":
    """The tokenizer stored in `file`; its ids are the rows of the embedding.

    Raises `InvalidInput` for a missing or inconsistent key, or a tokenizer that is not implemented."""
    metadata = _Metadata(file)
    model = metadata.string("tokenizer.ggml.model")
    require(model == "gpt2", f"{file.path}: tokenizer.ggml.model is {model!r}; supported: 'gpt2'")
    pre = metadata.string("tokenizer.ggml.pre")
    require(pre in _SPLIT, f"{file.path}: tokenizer.ggml.pre is {pre!r}; supported: {', '.join(map(repr, _SPLIT))}")
    for key in ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"):
        added = file.metadata.get(key, False)
        require(added is False, f"{file.path}: {key} is {added!r}; tokens around the text are not implemented")

    tokens = metadata.strings("tokenizer.ggml.tokens")
    kinds = metadata.integers("tokenizer.ggml.token_type")
    require(
        len(kinds) == len(tokens),
        f"{file.path}: tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens",
    )
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise InvalidInput(f"{file.path}: tokenizer.ggml.tokens holds {twice!r} twice")
    merges = []
    for i, line in enumerate(metadata.strings("tokenizer.ggml.merges")):
        left, space, right = line.partition(" ")
        whole = space and left in vocab and right in vocab and left + right in vocab
        require(bool(whole), f"{file.path}: tokenizer.ggml.merges[{i}] is {line!r}, not two tokens that make a third")
        merges.append((left, right))
    library = _library()
    lost = sorted(set(library.pre_tokenizers.ByteLevel.alphabet()) - vocab.keys())
    require(not lost, f"{file.path}: tokenizer.ggml.tokens has no token for {len(lost)} of 256 bytes, first {lost[:1]}")
    tokenizer = _byte_level_bpe(library, vocab, merges, _SPLIT[pre])
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [token for token, found in zip(tokens, kinds, strict=True) if found == kind]
        tokenizer.add_tokens([library.AddedToken(token, normalized=False, special=special) for token in added])
    return tokenizer


def _byte_level_bpe(
    library: ModuleType, vocab: dict[str, int], merges: list[tuple[str, str]], split: str
) -> "Tokenizer":
    tokenizer: Tokenizer = library.Tokenizer(library.models.BPE(vocab, merges))
    tokenizer.normalizer = library.normalizers.NFC()
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence(
        [
            library.pre_tokenizers.Split(library.Regex(split), behavior="isolated", invert=False),
            library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer


def _library() -> ModuleType:
    try:
        import tokenizers
    except ImportError as error:
        raise MissingEnvironment("text needs the tokenizers package: pip install tokenizers") from error
    return tokenizers


class _Metadata:
    """Metadata of `file` by key, with the type that is expected."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file

    def string(self, key: str) -> str:
        value = self._get(key)
        if not isinstance(value, str):
            raise InvalidInput(f"{self._file.path}: {key} is {value!r}, not a string")
        return value

    def strings(self, key: str) -> list[str]:
        value = self._get(key)
        if not isinstance(value, list):  # the reader gives lists to arrays of strings only
            raise InvalidInput(f"{self._file.path}: {key} is {type(value).__name__}, not an array of strings")
        return value

    def integers(self, key: str) -> list[int]:
        value = self._get(key)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            raise InvalidInput(f"{self._file.path}: {key} is {type(value).__name__}, not an array of integers")
        return [int(item) for item in value]

    def _get(self, key: str) -> object:
        require(key in self._file.metadata, f"{self._file.path}: {key} is missing")
        return self._file.metadata[key]
