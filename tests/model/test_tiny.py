"""The tiny model: how its text is gathered, that it trains, how it is written, and the file that ships."""

import hashlib
import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from exactmoe.kernels.errors import InvalidInput
from exactmoe.model.config import Config, check_model
from exactmoe.model.gguf.reader import open_gguf
from exactmoe.model.tiny import build, card, corpus, evaluate, train
from exactmoe.model.tiny.network import Dims, Network, next_token_loss
from exactmoe.model.tokenizer import load_tokenizer
from exactmoe.model.type_mix import q4_k_m

CARD = evaluate.MODEL.with_name("README.md")
SMALL = Dims(hidden=256, n_layers=2, n_heads=2, n_kv_heads=1, n_experts=3, n_active=2, vocab=300, context_length=64)


def small_network() -> Network:
    network = Network(SMALL)
    network.initialise(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)  # at 0.02 every path is so quiet that a wrong one would hardly show
    return network


def some_tokens(n: int, span: int) -> torch.Tensor:
    return torch.randint(0, SMALL.vocab, (n, span), generator=torch.Generator().manual_seed(3))


# The network


def test_grouped_experts_and_dense_experts_agree() -> None:
    network, tokens = small_network(), some_tokens(2, 40)
    gradients = {}
    for experts in ("dense", "grouped"):
        network.set_experts(experts)
        network.zero_grad()
        loss = next_token_loss(network, tokens)
        loss.backward()
        gradients[experts] = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    assert gradients["dense"].keys() == gradients["grouped"].keys() == {name for name, _ in network.named_parameters()}
    for name, gradient in gradients["dense"].items():
        assert gradient.abs().max() > 0
        room = 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(gradients["grouped"][name], gradient, rtol=0, atol=room)


def test_a_later_token_does_not_change_earlier_logits() -> None:
    network, tokens = small_network(), some_tokens(1, 20)
    changed = tokens.clone()
    changed[0, 12] = (tokens[0, 12] + 1) % SMALL.vocab
    before, after = network(tokens)[0][0], network(changed)[0][0]
    moved = (after - before).abs().amax(1)
    assert moved[:12].max() < 1e-5
    assert moved[12:].min() > 1e-3


def test_the_loss_of_a_uniform_model_is_the_log_of_its_vocabulary() -> None:
    network = small_network()
    torch.nn.init.zeros_(network.output.weight)
    assert next_token_loss(network, some_tokens(2, 9)).item() == pytest.approx(np.log(SMALL.vocab))


def test_the_loss_of_a_position_is_about_the_token_after_it() -> None:
    network, tokens = small_network(), some_tokens(2, 9)
    probability = network(tokens)[0].softmax(-1)
    losses = [-probability[n, s, tokens[n, s + 1]].log() for n in range(2) for s in range(8)]
    assert next_token_loss(network, tokens).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_the_balance_loss_is_one_when_every_expert_is_as_likely() -> None:
    network = small_network()
    for block in network.blk:
        torch.nn.init.zeros_(block.ffn_gate_inp.weight)  # type: ignore[union-attr, arg-type]
    assert network(some_tokens(2, 9))[1].item() == pytest.approx(1)


def test_the_state_has_the_names_and_shapes_of_the_file() -> None:
    state = Network(Dims()).state_dict()
    assert set(state) == set(build.tensor_names(4))
    assert state["blk.3.ffn_down_exps.weight"].shape == (12, 512, 256)
    assert state["blk.0.attn_q.weight"].shape == (1024, 512)


def test_more_positions_than_the_context_are_refused() -> None:
    with pytest.raises(InvalidInput, match="65 positions exceed the context of 64"):
        small_network()(some_tokens(1, 65))


# The text


def test_no_held_out_file_of_the_standard_library_is_trained_on() -> None:
    texts = corpus.gather(max_bytes=0, package_bytes=0)
    assert len(texts.held_out) > 10
    assert len(texts.train) > 10 * len(texts.held_out)
    assert not {s.path for s in texts.held_out} & {s.path for s in texts.train}
    assert not {s.text for s in texts.held_out} & {s.text for s in texts.train}
    assert [entry["name"] for entry in texts.record] == ["stdlib (held out)", "stdlib"]
    assert sum(int(str(entry["files"])) for entry in texts.record) == len(texts.held_out) + len(texts.train)


def test_a_near_copy_of_a_held_out_file_is_dropped_and_a_relative_is_kept() -> None:
    lines = [f"a line of code that is long enough, number {i}\n" for i in range(20)]
    held_out = [corpus.Source("stdlib", "a.py", "".join(lines))]
    relative = corpus.Source("other", "b.py", "".join(lines[:6]) + "something else of its own\n")
    copy = corpus.Source("other", "c.py", "".join(lines[:7]))
    assert corpus.without_near_copies([relative, copy], held_out) == [relative]


def test_held_out_windows_lie_in_the_stream_from_its_start_to_its_end() -> None:
    stream = np.arange(1000, dtype=np.uint16)
    windows = corpus.held_out_windows(stream, 5, 100)
    assert windows.shape == (5, 100)
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 999
    assert (np.diff(windows.astype(int), axis=1) == 1).all()


def test_every_text_is_closed_by_end_of_text() -> None:
    tokenizer = corpus.train_tokenizer(["def f(): pass\n" * 9], 300)
    end = tokenizer.token_to_id(corpus.END_OF_TEXT)
    stream = corpus.encode(tokenizer, ["def", "pass\n", ""])
    assert stream.dtype == np.uint16
    assert [tokenizer.decode(part) for part in split(stream.tolist(), end)] == ["def", "pass\n", ""]


def split(ids: list[int], end: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for i in ids:
        if i == end:
            parts.append([])
        else:
            parts[-1].append(i)
    assert parts.pop() == []
    return parts


# From text to file


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the training script writes, from a small text and a few steps."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.name for path in root.glob("[a-h]*.py"))[:60]
    sources = [corpus.Source("stdlib", name, (root / name).read_text(encoding="utf-8")) for name in names]
    facts: dict[str, object] = {"version": "3", "licence": "PSF-2.0", "bytes": 1}
    record = [{"name": "stdlib (held out)", "files": 4} | facts, {"name": "stdlib", "files": 56} | facts]
    texts = corpus.Corpus(sources[:-4], sources[-4:], record, 0)
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "gather", lambda *_: texts)
        arguments = "--smoke --minutes 0.05 --batch 2 --span 48 --windows 3 --seed 1 --out"
        assert train.main([*arguments.split(), str(out)]) == 0
    return out


def test_training_writes_all_that_a_build_needs(trained: Path) -> None:
    log = json.loads((trained / "train.json").read_text())
    assert log["steps"] > 0
    assert log["tokens_seen"] == log["steps"] * 2 * 48
    assert 0 < log["held_out_loss"]["f32"] < np.log(2048) + 1
    assert abs(log["held_out_loss"]["bf16"] - log["held_out_loss"]["f32"]) < 0.01
    assert np.shape(log["expert_load"]) == (2, 4)
    np.testing.assert_allclose(np.sum(log["expert_load"], axis=1), 1, atol=1e-3)
    held_out = np.load(trained / "heldout.npy")
    assert held_out.shape == (3, 512)
    assert held_out.dtype == np.uint16
    saved = evaluate.held_out_loss(evaluate.network_from_weights(trained), held_out)
    assert saved == pytest.approx(log["held_out_loss"]["bf16"], abs=1e-4)


def test_the_built_file_holds_the_trained_weights_in_the_q4_k_m_mix(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    build.build(trained, path)
    state = build.load_state(trained)
    reader = gguf.GGUFReader(path)  # a second opinion on every byte of the header
    assert {tensor.name for tensor in reader.tensors} == set(state)
    for tensor in reader.tensors:
        assert tensor.tensor_type.name == q4_k_m(tensor.name, 2)
        value, want = dequantize(tensor.data, tensor.tensor_type), state[tensor.name]
        assert value.shape == want.shape
        if tensor.tensor_type.name == "F32":
            np.testing.assert_array_equal(value, want)
        else:
            error = np.linalg.norm(value - want) / np.linalg.norm(want)
            assert 0 < error < (0.09 if tensor.tensor_type.name == "Q4_K" else 0.025)
    file = open_gguf(path)
    check_model(file, Config.from_gguf(file))


def test_a_built_file_scores_as_its_weights_do(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    build.build(trained, path)
    windows = np.load(trained / "heldout.npy")[:2, :128]
    before = evaluate.held_out_loss(evaluate.network_from_weights(trained), windows)
    after = evaluate.held_out_loss(evaluate.network_from_gguf(path), windows)
    assert 0 < abs(after - before) < 0.05


def test_the_same_weights_give_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        assert build.main([str(trained), str(tmp_path / name)]) == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_the_card_states_what_was_measured_on_the_file_beside_it(trained: Path, tmp_path: Path) -> None:
    assert card.main([str(trained), "--folder", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    windows = np.load(tmp_path / "heldout.npy")
    np.testing.assert_array_equal(windows, np.load(trained / "heldout.npy"))
    model = tmp_path / evaluate.MODEL.name
    loss = evaluate.held_out_loss(evaluate.network_from_gguf(model), windows)
    log = json.loads((trained / "train.json").read_text())
    for stated in (hashlib.sha256(model.read_bytes()).hexdigest(), f"{model.stat().st_size:,} bytes", f"{loss:.4f}"):
        assert stated in text
    for weights in ("f32", "bf16"):
        assert f"{log['held_out_loss'][weights]:.4f}" in text


def test_a_sharpened_file_ships_only_for_its_own_weights(trained: Path, tmp_path: Path) -> None:
    sharp, folder = tmp_path / "sharp.gguf", tmp_path / "out"
    folder.mkdir()
    build.build(trained, sharp)
    router = open_gguf(sharp).tensors["blk.0.ffn_gate_inp.weight"]
    content = bytearray(sharp.read_bytes())
    content[router.offset : router.offset + 4] = np.float32(0.75).tobytes()
    sharp.write_bytes(content)
    card.publish(trained, folder, sharp)
    assert (folder / evaluate.MODEL.name).read_bytes() == content
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "routers and norms trained after quantisation" in text
    assert hashlib.sha256(content).hexdigest() in text
    matrix = open_gguf(sharp).tensors["blk.0.attn_q.weight"]
    content[matrix.offset + 20] ^= 1
    sharp.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"blk\.0\.attn_q\.weight is not that of the weights given"):
        card.publish(trained, folder, sharp)


def test_the_file_encodes_text_as_the_trained_tokenizer_does(trained: Path, tmp_path: Path) -> None:
    import tokenizers

    path = tmp_path / "tiny.gguf"
    build.build(trained, path)
    text = Path(json.__file__).read_text(encoding="utf-8")
    ids = load_tokenizer(open_gguf(path)).encode(text).ids
    assert len(ids) > 1000
    assert ids == tokenizers.Tokenizer.from_file(str(trained / "tokenizer.json")).encode(text).ids


def test_a_folder_without_weights_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "train.json", tmp_path)
    with pytest.raises(InvalidInput, match=r"no weights-\*\.safetensors"):
        build.build(tmp_path, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_missing_tensor_is_refused_by_name(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = build.load_state(trained)
    del state["blk.1.attn_k.weight"]
    monkeypatch.setattr(build, "load_state", lambda _: state)
    with pytest.raises(InvalidInput, match=r"blk\.1\.attn_k\.weight"):
        build.build(trained, tmp_path / "out.gguf")


def test_a_tokenizer_whose_ids_leave_a_gap_is_refused(trained: Path) -> None:
    content = json.loads((trained / "tokenizer.json").read_text())
    content["added_tokens"][0]["id"] += 1
    with pytest.raises(InvalidInput, match="ids are not 0 to 2047"):
        build.tokenizer_metadata(content, 2048)


# The file that ships


def shipped_metadata() -> dict[str, Any]:
    return dict(open_gguf(evaluate.MODEL).metadata)


def test_the_shipped_file_fits_and_the_card_states_its_size_and_hash() -> None:
    data = evaluate.MODEL.read_bytes()
    card = CARD.read_text(encoding="utf-8")
    assert len(data) <= 16 << 20
    assert f"{len(data):,} bytes" in card
    assert hashlib.sha256(data).hexdigest() in card


def test_the_shipped_file_has_the_whole_q4_k_m_mix() -> None:
    file = open_gguf(evaluate.MODEL)
    config = Config.from_gguf(file)
    check_model(file, config)
    types = {name: info.type_name for name, info in file.tensors.items()}
    assert types == {name: q4_k_m(name, config.n_layers) for name in build.tensor_names(config.n_layers)}
    for part in ("attn_v", "ffn_down_exps"):
        assert {types[f"blk.{i}.{part}.weight"] for i in range(config.n_layers)} == {"Q4_K", "Q6_K"}


def test_the_shipped_file_says_the_same_to_gguf_py() -> None:
    reader = gguf.GGUFReader(evaluate.MODEL)
    ours = shipped_metadata()
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert len(ours) > 20
    assert set(theirs) == set(ours)
    for key, value in ours.items():
        assert np.array_equal(np.asarray(theirs[key]), np.asarray(value)), key


def test_the_shipped_model_has_learned_what_the_card_says() -> None:
    """The first four held-out windows; the card gives the loss over these and over all."""
    windows = np.load(evaluate.HELD_OUT)
    assert windows.shape == (64, 512)
    loss = evaluate.held_out_loss(evaluate.network_from_gguf(evaluate.MODEL), windows[:4])
    assert f"{loss:.3f} over the first 4" in CARD.read_text(encoding="utf-8")


def test_the_default_prompt_is_two_to_three_thousand_bytes_of_code_that_compiles() -> None:
    text = evaluate.MODEL.with_name("prompt.txt").read_text(encoding="utf-8")
    assert 2000 <= len(text.encode()) <= 3072
    compile(text, "prompt.txt", "exec")
