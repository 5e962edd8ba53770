"""The accuracy measurement: what it sees, what it lets pass, and its command line."""

import json

import numpy as np
import pytest

from exactmoe.model.config import Config
from exactmoe.model.gguf.reader import open_gguf
from exactmoe.model.synth import LIKES, Like, synthesise
from exactmoe.parity import accuracy
from exactmoe.parity.accuracy import Accuracy, Threshold, cosine, describe, main, measure
from exactmoe.parity.exact import exact_forward

SMALL = Config(
    hidden=256,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    head_dim=128,
    n_experts=5,
    n_active=2,
    expert_width=256,
    vocab=512,
    context_length=64,
    eps=np.float32(1e-6),
    rope_base=1e6,
)
TOKENS = [(37 * i + 11) % 512 for i in range(12)]
T = len(TOKENS)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LIKES, "small", Like("small", "5x1M", 512, SMALL))
        synthesise(path, "small", seed=1)
    return path


@pytest.fixture(scope="module")
def exact(path):
    return exact_forward(open_gguf(path), TOKENS)


def good(profile="q8_k", **changed):
    """A result without fault, with changes."""
    yes = np.ones(T, bool)
    parts = {
        "profile": profile,
        "cosine": np.ones(T),
        "error": np.full(T, 0.1),
        "gap": np.full(T, 0.5),
        "same_token": yes,
        "alike": yes,
        "unreached": yes,
        "flips": (),
    }
    return Accuracy(**{**parts, **changed})


def at(value, *positions, rest=1.0):
    x = np.full(T, rest)
    x[list(positions)] = value
    return x


def test_the_reference_is_near_exact_and_15_bits_nearer_than_8(path, exact):
    file = open_gguf(path)
    q8, q16 = (measure(file, TOKENS, profile, exact) for profile in ("q8_k", "q16_k"))
    assert q8.cosine.shape == q8.error.shape == q8.gap.shape == (T,)
    assert 1e-9 < 1 - np.median(q16.cosine) < (1 - np.median(q8.cosine)) / 100
    assert np.median(q8.cosine) > 0.99
    assert np.median(q16.error) < np.median(q8.error) / 10
    assert q16.failures() == []


def test_a_logit_that_is_off_shows_at_its_position(path, exact):
    right = measure(open_gguf(path), TOKENS, "q16_k", exact)
    logits = exact.logits.copy()
    logits[3, 7] += 5
    found = measure(open_gguf(path), TOKENS, "q16_k", exact._replace(logits=logits))
    assert found.error[3] == pytest.approx(5, abs=0.1)
    assert np.flatnonzero(found.cosine != right.cosine).tolist() == [3]


def test_another_choice_of_token_shows_at_its_position_with_the_gap_it_had(path, exact):
    logits = exact.logits.copy()
    logits[3, 7] = logits[3].max() + 5
    found = measure(open_gguf(path), TOKENS, "q16_k", exact._replace(logits=logits))
    assert np.flatnonzero(~found.same_token).tolist() == [3]
    ranked = np.sort(logits, axis=1)
    assert found.gap.tolist() == (ranked[:, -1] - ranked[:, -2]).tolist()
    assert found.gap[3] == pytest.approx(5)


def test_a_flip_is_listed_with_its_experts_and_its_margin(path, exact):
    router, experts = exact.router.copy(), exact.experts.copy()
    left_out = next(e for e in range(5) if e not in experts[1, 4])
    experts[1, 4, 1] = left_out
    router[1, 4] = np.float64([0.3, 0.25, 0.21, 0.19, 0.05])
    found = measure(open_gguf(path), TOKENS, "q16_k", exact._replace(router=router, experts=experts))
    (flip,) = found.flips
    assert (flip.layer, flip.position, flip.token) == (1, 4, TOKENS[4])
    assert flip.exact == tuple(experts[1, 4]) and flip.reference == tuple(exact.experts[1, 4])
    assert flip.margin == pytest.approx(0.04)
    assert np.flatnonzero(~found.alike).tolist() == [4]
    text = describe(found)
    assert f"layer 1, position 4, token {TOKENS[4]}: {list(flip.reference)}, exact {list(flip.exact)}, margin 4" in text


def test_the_order_of_the_chosen_experts_is_no_flip(path, exact):
    turned = exact._replace(experts=exact.experts[..., ::-1])
    found = measure(open_gguf(path), TOKENS, "q16_k", turned)
    assert found.flips == () and found.alike.all()


@pytest.mark.parametrize(("layer", "reached"), [(0, range(4, T)), (1, [4])])
def test_a_flip_reaches_later_positions_unless_it_is_in_the_last_layer(path, exact, layer, reached):
    experts = exact.experts.copy()
    experts[layer, 4, 1] = next(e for e in range(5) if e not in experts[layer, 4])
    found = measure(open_gguf(path), TOKENS, "q16_k", exact._replace(experts=experts))
    assert np.flatnonzero(~found.unreached).tolist() == list(reached)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (good(cosine=at(0.9997, *range(7))), "median cosine 0.999700000 is below 0.9998"),
        (good(cosine=at(0.9989, 5)), "worst cosine 0.998900000 is below 0.999"),
        (
            good("q16_k", cosine=at(0.999998, 5)),
            "worst cosine where experts are the same 0.999998000 is below 0.999999",
        ),
        (good("q16_k", alike=np.zeros(T, bool)), "at no position were all experts the same"),
        (good(cosine=at(np.nan, 5)), "the cosine is not a number at 1 of 12 positions"),
        (good("q16_k", cosine=at(np.nan, 5)), "the cosine is not a number at 1 of 12 positions"),
        (good(same_token=at(0, 5).astype(bool)), "another next token at 1 decided positions, first 5"),
    ],
)
def test_what_is_below_its_threshold_is_said(result, said):
    assert any(failure.startswith(said) for failure in result.failures())
    assert f"NO: {said}" in describe(result)


@pytest.mark.parametrize(
    "result",
    [
        good(),
        good(cosine=at(0.9998, *range(T))),
        good(cosine=at(0.999, 5)),
        good("q16_k", cosine=at(0.5, 5), alike=at(0, 5).astype(bool)),
        good("q16_k", cosine=at(0.999999, *range(T))),
        good(
            same_token=at(0, 5).astype(bool), gap=at(0.1, 5, rest=0.5)
        ),  # a gap no larger than the error decides nothing
    ],
)
def test_what_keeps_its_threshold_passes(result):
    assert result.failures() == []
    assert "yes: every threshold is kept" in describe(result)


def test_cosine_is_that_of_the_angle():
    a, b = np.float64([[1, 0], [1, 1], [2, 0]]), np.float64([[0, 3], [1, 0], [-1, 0]])
    assert cosine(a, b) == pytest.approx([0, np.sqrt(0.5), -1])


@pytest.fixture
def tokens_file(tmp_path):
    path = tmp_path / "tokens.txt"
    path.write_text(" ".join(map(str, TOKENS)) + "\n")
    return path


@pytest.mark.parametrize(("median", "status"), [(0.9, 0), (1.1, 1)])
def test_the_exit_status_is_the_verdict(path, tokens_file, monkeypatch, capsys, median, status):
    monkeypatch.setattr(accuracy, "THRESHOLDS", {"q8_k": Threshold(median, None, None)})
    assert main([str(path), "--tokens-file", str(tokens_file), "--positions", "10"]) == status
    out = capsys.readouterr().out
    assert "q8_k: 10 positions" in out and ("yes" in out) == (status == 0)


def test_json_holds_what_the_text_says(path, tokens_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "THRESHOLDS", {name: Threshold(0.5, 0.1, None) for name in ("q8_k", "q16_k")})
    arguments = [str(path), "--tokens-file", str(tokens_file), "--positions", str(T)]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tokens"] == TOKENS and [r["profile"] for r in report["results"]] == ["q8_k", "q16_k"]
    for result in report["results"]:
        assert len(result["cosine"]) == T and result["failures"] == []
        assert result["worst_cosine"] == min(result["cosine"])
    out = tmp_path / "out.json"
    assert main([*arguments, "--json", str(out)]) == 0
    assert "q16_k: 12 positions" in capsys.readouterr().out
    assert json.loads(out.read_text()) == report


@pytest.mark.parametrize(
    ("content", "positions", "said"),
    [
        ("1 2 x", "2", "['x'] is not a token id"),
        ("1 2 -3", "2", "['-3'] is not a token id"),
        ("1 2 3", "4", "3 tokens, --positions asks for 4"),
        ("1 2 3", "0", "--positions must be positive, got 0"),
        ("1 512", "2", "is outside the vocabulary of 512"),
        (None, "2", "No such file"),
    ],
)
def test_what_cannot_be_measured_is_refused(path, tmp_path, capsys, content, positions, said):
    tokens = tmp_path / "tokens.txt"
    if content is not None:
        tokens.write_text(content)
    assert main([str(path), "--tokens-file", str(tokens), "--positions", positions]) == 2
    assert said in capsys.readouterr().err


def test_a_file_that_is_no_model_is_refused(tokens_file, capsys):
    assert main([str(tokens_file)]) == 2
    assert "tokens.txt" in capsys.readouterr().err


def test_15_bit_activations_keep_their_threshold_on_the_shipped_model():
    file = open_gguf(accuracy.MODEL)
    from exactmoe.model.tokenizer import load_tokenizer

    tokens = load_tokenizer(file).encode(accuracy.TEXT.read_text(), add_special_tokens=False).ids[:256]
    assert len(tokens) == 256
    result = measure(file, tokens, "q16_k", exact_forward(file, tokens))
    assert result.alike.sum() > 200 and result.failures() == []
