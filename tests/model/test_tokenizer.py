"""The tokenizer built from GGUF metadata against the trained one that the metadata was written from."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from exactmoe.kernels.errors import InvalidInput
from exactmoe.model.gguf.reader import GGUFFile, open_gguf
from exactmoe.model.gguf.writer import TensorData, write_gguf
from exactmoe.model.tiny import build, corpus
from exactmoe.model.tiny.evaluate import MODEL
from exactmoe.model.tokenizer import load_tokenizer

VOCAB = 700
PROMPT = MODEL.with_name("prompt.txt").read_text(encoding="utf-8")
TEXTS = {
    "code": PROMPT,
    "empty": "",
    "blank lines": "\n\n  \n\t\tx = 1\r\n\r\n    \n",
    "contractions": "it's IT'S we'll they'Re",
    "digits": "0x1F 3.14159 1_000_000 ²³ ٣",
    "other scripts": "naïve Größe 日本語 עברית Привет",
    "combining": unicodedata.normalize("NFD", "é à ñ Å"),
    "emoji": "🙂👩‍🔬",
    "controls": "\x00\x01\x7f\x85\u2028",
    "special inside": "a<|endoftext|>b <|endoftext| >",
}


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return corpus.train_tokenizer([PROMPT, Path(__file__).read_text(encoding="utf-8"), *TEXTS.values()], VOCAB)


@pytest.fixture(scope="module")
def metadata(trained: Tokenizer) -> dict[str, object]:
    return build.tokenizer_metadata(json.loads(trained.to_str()), VOCAB)


def as_file(tmp_path: Path, metadata: dict[str, object]) -> GGUFFile:
    path = tmp_path / "tokenizer.gguf"
    data = TensorData("token_embd.weight", (1, 8), "F32", np.zeros((1, 8), np.float32))
    write_gguf(path, metadata, [data], overwrite=True)
    return open_gguf(path)


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_gets_the_ids_of_the_trained_tokenizer(
    case: str, trained: Tokenizer, metadata: dict[str, object], tmp_path: Path
) -> None:
    loaded = load_tokenizer(as_file(tmp_path, metadata))
    ids = trained.encode(TEXTS[case]).ids
    assert bool(ids) == bool(TEXTS[case])
    assert loaded.encode(TEXTS[case]).ids == ids
    for skip in (True, False):
        assert loaded.decode(ids, skip_special_tokens=skip) == trained.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("case", [case for case in TEXTS if case != "combining"])
def test_a_text_in_nfc_survives_the_round_trip(case: str, metadata: dict[str, object], tmp_path: Path) -> None:
    loaded = load_tokenizer(as_file(tmp_path, metadata))
    assert loaded.decode(loaded.encode(TEXTS[case]).ids, skip_special_tokens=False) == TEXTS[case]


def test_a_text_not_in_nfc_is_brought_to_it(metadata: dict[str, object], tmp_path: Path) -> None:
    loaded = load_tokenizer(as_file(tmp_path, metadata))
    text = TEXTS["combining"]
    assert loaded.decode(loaded.encode(text).ids) == unicodedata.normalize("NFC", text) != text


def test_text_is_cut_where_qwen2_cuts_it(metadata: dict[str, object], tmp_path: Path) -> None:
    """Digits one by one, a space with the word after it, other blanks apart, ends of line together."""
    cut = load_tokenizer(as_file(tmp_path, metadata)).pre_tokenizer.pre_tokenize_str("if x12 == 345:\r\n\n    it's(_y)")
    words = ["if", " x", "1", "2", " ==", " ", "3", "4", "5", ":\r\n\n", "   ", " it", "'s", "(_", "y", ")"]
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n").replace("č", "\r") for piece, _ in cut] == words


def test_every_id_has_its_token(trained: Tokenizer, metadata: dict[str, object], tmp_path: Path) -> None:
    loaded = load_tokenizer(as_file(tmp_path, metadata))
    assert loaded.get_vocab_size() == VOCAB
    assert [loaded.id_to_token(i) for i in range(VOCAB)] == [trained.id_to_token(i) for i in range(VOCAB)]


def test_a_control_token_is_left_out_of_decoded_text_and_a_user_defined_one_is_not(
    metadata: dict[str, object], tmp_path: Path
) -> None:
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    kinds = np.array(metadata["tokenizer.ggml.token_type"])
    extended = metadata | {
        "tokenizer.ggml.tokens": [*tokens, "<tool>"],
        "tokenizer.ggml.token_type": np.append(kinds, np.int32(4)),
    }
    loaded = load_tokenizer(as_file(tmp_path, extended))
    ids = loaded.encode("x<|endoftext|><tool>y").ids
    assert ids[1:3] == [VOCAB - 1, VOCAB]
    assert loaded.decode(ids) == "x<tool>y"


def test_the_shipped_file_has_the_tokenizer_that_came_out_of_training() -> None:
    loaded = load_tokenizer(open_gguf(MODEL))
    trained = Tokenizer.from_file(str(MODEL.with_name("tokenizer.json")))
    sources = [path.read_text(encoding="utf-8") for path in sorted(MODEL.parent.parent.rglob("*.py"))]
    total = 0
    for text in [*sources, *TEXTS.values()]:
        ids = trained.encode(text).ids
        assert loaded.encode(text).ids == ids
        assert loaded.decode(ids) == trained.decode(ids)
        total += len(ids)
    assert total > 20_000


def replaced(metadata: dict[str, object], **changes: object) -> dict[str, object]:
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


@pytest.mark.parametrize("key", ["model", "pre", "tokens", "token_type", "merges"])
def test_a_missing_key_is_refused_by_name(key: str, metadata: dict[str, object], tmp_path: Path) -> None:
    less = {k: v for k, v in metadata.items() if k != f"tokenizer.ggml.{key}"}
    with pytest.raises(InvalidInput, match=rf"tokenizer.gguf: tokenizer\.ggml\.{key} is missing"):
        load_tokenizer(as_file(tmp_path, less))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": "llama"}, "model is 'llama'; supported: 'gpt2'"),
        ({"model": 3}, "model is 3, not a string"),
        ({"pre": "llama-bpe"}, "pre is 'llama-bpe'; supported: 'qwen2'"),
        ({"add_bos_token": True}, "add_bos_token is True"),
        ({"add_eos_token": True}, "add_eos_token is True"),
        ({"tokens": "abc"}, "tokens is str, not an array of strings"),
        ({"tokens": ["a", "b", "a"], "token_type": np.ones(3, np.int32)}, "holds 'a' twice"),
        ({"tokens": ["a", "b"], "token_type": np.ones(2, np.int32), "merges": []}, "no token for 254 of 256 bytes"),
        ({"token_type": np.ones(3, np.int32)}, "has 3 entries for 700 tokens"),
        ({"token_type": np.ones(700, np.float32)}, "not an array of integers"),
        ({"merges": ["ab"]}, r"merges\[0\] is 'ab'"),
        ({"merges": ["a \u2603"]}, r"merges\[0\]"),
    ],
)
def test_a_tokenizer_that_is_not_implemented_or_inconsistent_is_refused(
    changes: dict[str, object], text: str, metadata: dict[str, object], tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=text):
        load_tokenizer(as_file(tmp_path, replaced(metadata, **changes)))
