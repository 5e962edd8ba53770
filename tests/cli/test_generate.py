import re

import pytest

from exactmoe.kernels.errors import InvalidInput
from exactmoe.model.generate import greedy, require_prompt, text_pieces
from exactmoe.model.gguf.reader import open_gguf
from exactmoe.model.tokenizer import load_tokenizer

EOS = 511  # the model's last special token


class Script:
    """A backend that says what it was told to say, and notes what it was given."""

    def __init__(self, *ids: int) -> None:
        self.ids = list(ids)
        self.given: list[list[int]] = []

    def __call__(self, tokens):
        self.given.append(list(tokens))
        return self.ids.pop(0)


def test_the_prompt_is_run_once_and_then_each_token_as_it_is_chosen():
    script = Script(5, 6, 7, 8)
    assert list(greedy(script, [1, 2, 3], 3)) == [5, 6, 7]
    assert script.given == [[1, 2, 3], [5], [6]]


def test_a_token_comes_before_the_next_is_computed():
    script = Script(5, 6)
    ids = greedy(script, [1], 2)
    assert script.given == []
    assert next(ids) == 5
    assert script.given == [[1]]


def test_generation_ends_before_a_stop_token():
    script = Script(5, 9, 6)
    assert list(greedy(script, [1], 3, {9})) == [5]
    assert script.given == [[1], [5]]
    assert list(greedy(Script(9), [1], 3, {9})) == []


def pieces(*chunks: bytes) -> list[str]:
    """The pieces of text that token i, whose bytes are chunks[i], brings out."""

    def decode(ids):
        return b"".join(chunks[i] for i in ids).decode("utf-8", errors="replace")

    return list(text_pieces(decode, range(len(chunks))))


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ((b"ab", b"c"), ["ab", "c"]),
        ((), []),
        ((b"x\xe2", b"\x82", b"\xacy", b"z"), ["x", "€y", "z"]),  # a character in three tokens
        ((b"\xf0\x9f", b"\x98\x80"), ["😀"]),
        ((b"\xe2\x82", b"a"), ["\ufffda"]),  # never finished: shown as what it is
        ((b"\xe2\x82",), ["\ufffd"]),  # unfinished at the end
        ((b"\xff", b"\xff", b"a"), ["\ufffd", "\ufffda"]),
        ((b"a\xff\xc3", b"\xa9"), ["a\ufffd", "é"]),
    ],
)
def test_a_character_that_is_spread_over_tokens_comes_out_whole(chunks, expected):
    found = pieces(*chunks)
    assert "".join(found) == b"".join(chunks).decode("utf-8", errors="replace")
    assert found == expected


@pytest.mark.parametrize(
    ("tokens", "more", "text"),
    [
        ([], 1, "the prompt is empty"),
        ([1, 10], 1, "token id 10 is outside the vocabulary of 10"),
        ([-1], 1, "token id -1 is outside"),
        ([1, 2, 3], 6, "a prompt of 3 tokens and 6 after it exceeds the context of 8 positions"),
        ([1] * 9, 0, "a prompt of 9 tokens exceeds the context of 8 positions"),
    ],
)
def test_a_prompt_the_model_cannot_take_is_refused(tokens, more, text):
    with pytest.raises(InvalidInput, match=re.escape(text)):
        require_prompt(tokens, more, 10, 8)


def test_a_prompt_that_fills_the_context_is_taken():
    require_prompt([9] * 5, 3, 10, 8)


def test_both_backends_continue_a_text_with_the_same_tokens(exactmoe, model_file):
    outcomes = [
        exactmoe("generate", model_file, "-p", "def f", "-n", 4, "--backend", backend)
        for backend in ("reference", "triton")
    ]
    assert [o.status for o in outcomes] == [0, 0], outcomes
    assert outcomes[0].out == outcomes[1].out
    assert outcomes[0].out.rstrip("\n")
    assert "def f" not in outcomes[0].out


def test_the_text_is_what_the_kernels_choose(exactmoe, model_file):
    from exactmoe.kernels.launch import resolve_device
    from exactmoe.model.generate import generate
    from exactmoe.model.weights import load_model

    file = open_gguf(model_file)
    tokenizer = load_tokenizer(file)
    prompt = tokenizer.encode("ab", add_special_tokens=False).ids
    ids = list(generate(load_model(file, resolve_device("auto"), "q16_k"), prompt, 3))
    outcome = exactmoe("generate", model_file, "-p", "ab", "-n", 3, "--activations", "q16_k")
    assert len(ids) == 3
    assert outcome.out == tokenizer.decode(ids, skip_special_tokens=False) + "\n"


def test_the_end_of_text_token_ends_the_text(exactmoe, model_file, monkeypatch):
    file = open_gguf(model_file)
    assert file.metadata["tokenizer.ggml.eos_token_id"] == EOS
    (a,) = load_tokenizer(file).encode("a", add_special_tokens=False).ids
    script = Script(a, a, EOS, a)

    def scripted(args, file, tokens, stop):
        return greedy(script, tokens, args.max_new, stop)

    monkeypatch.setattr(
        "exactmoe.cli.commands.generate._triton",
        scripted,
    )
    outcome = exactmoe("generate", model_file, "-p", "ab", "-n", 4)
    assert outcome.out == "aa\n"
    assert "decode: 2 tokens in" in outcome.err


def test_the_speeds_of_prefill_and_decode_stand_apart_on_stderr(exactmoe, model_file):
    outcome = exactmoe("generate", model_file, "-p", "ab", "-n", 3)
    assert re.fullmatch(
        r"prefill: \d tokens in \d+\.\d\d s, \d+\.\d tokens/s \(first use included\); "
        r"decode: 2 tokens in \d+\.\d\d s, \d+\.\d tokens/s\n",
        outcome.err,
    )
    single = exactmoe("generate", model_file, "-p", "ab", "-n", 1)
    assert "decode" not in single.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-p", ""], "the prompt is empty"),
        (["-p", "a", "-n", "0"], "'0' is not a positive integer"),
        (["-p", "a", "-n", "x"], "'x' is not a positive integer"),
        (["-p", "a", "-n", "64"], "exceeds the context of 64 positions"),
        ([], "-p"),
        (["-p", "a", "--backend", "reference", "--device", "cuda"], "is for --backend triton"),
    ],
)
def test_wrong_arguments_are_refused(exactmoe, model_file, arguments, text):
    outcome = exactmoe("generate", model_file, *arguments)
    assert outcome.status == 2
    assert text in outcome.err
    assert outcome.out == ""


def test_a_model_that_is_not_there_is_refused_by_name(exactmoe, tmp_path):
    outcome = exactmoe("generate", tmp_path / "none.gguf", "-p", "a")
    assert outcome.status == 2
    assert "none.gguf: cannot be opened" in outcome.err


def test_a_gpu_that_is_demanded_and_absent_gives_3(exactmoe, model_file, no_cuda):
    assert exactmoe("generate", model_file, "-p", "a", "--device", "cuda").status == 3
