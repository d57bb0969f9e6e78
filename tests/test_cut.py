"""A small model cut out of a large one, and a vocabulary cut to a task, in whole jobs."""

from __future__ import annotations

import json
import logging
import re
from unittest import mock

import hf
import jax
import numpy as np
import pytest
import small
import tiny
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import l2s_jax
from l2s_jax.checkpoints import pretrained
from l2s_jax.checkpoints.cutting import load_cut
from l2s_jax.convert import main as convert
from l2s_jax.experiment.experiment import Experiment
from l2s_jax.serving import bundle
from l2s_jax.settings.cut import Cut
from l2s_jax.tokenizers import load_tokenizer
from l2s_jax.tokenizers.cut import CutTokenizer, choose, count, essential
from l2s_jax.tokenizers.huggingface import HuggingFaceTokenizer, Special
from l2s_jax.tokenizers.sentencepiece import train_sentencepiece

IDS = np.arange(12, dtype=np.int32)[None] * 7 % 64
MASK = np.ones(IDS.shape, bool)


def apply(module, params, *args):
    with jax.default_matmul_precision("highest"):
        return np.asarray(module.apply({"params": params}, *args))


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama"])
@pytest.mark.parametrize("width", [0, 17])
def test_decoder_only_models_are_what_transformers_makes_of_the_same_layers(
    model_type, width, tmp_path
):
    geometry = "n_layer" if model_type == "gpt2" else "num_hidden_layers"
    changes = {geometry: 4, **({"n_inner": 40} if model_type == "gpt2" else {})}
    model = hf.make_causal(str(tmp_path / "whole"), model_type=model_type, **changes)
    cut = Cut(num_layers=3, feed_forward_width=width)
    module, params = load_cut(str(tmp_path / "whole"), cut)
    pretrained.save_hf(module.config, params, str(tmp_path / "cut"))
    assert module.config.num_layers == 3
    # transformers: the layers 0, 2 and 3 (evenly spaced), with the other units' outputs at zero.
    layers = model.transformer.h if model_type == "gpt2" else (
        model.gpt_neox.layers if model_type == "gpt_neox" else model.model.layers
    )  # fmt: skip
    del layers[1]
    for number, layer in enumerate(layers):
        (layer.self_attn if model_type == "llama" else layer.attn if model_type == "gpt2"
         else layer.attention).layer_idx = number  # fmt: skip
        if width:
            silence(layer.mlp, width, model_type)
    setattr(model.config, geometry, 3)
    with torch.no_grad():
        expected = model(torch.tensor(IDS).long()).logits.numpy()
    found = apply(module, params, IDS, MASK)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    # What is saved is an ordinary checkpoint.
    again = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "cut")).eval()
    with torch.no_grad():
        reloaded = again(torch.tensor(IDS).long()).logits.numpy()
    assert np.abs(reloaded - expected).max() <= 1e-4 * np.abs(expected).max()


def silence(mlp, width, model_type):
    """Sets to zero what the units but the `width` largest give to the residual stream."""
    with torch.no_grad():
        if model_type == "gpt2":
            size, outward = mlp.c_fc.weight.norm(dim=0) * mlp.c_proj.weight.norm(dim=1), None
            mlp.c_proj.weight[size.argsort(descending=True)[width:]] = 0
            return
        if model_type == "gpt_neox":
            inward, outward = [mlp.dense_h_to_4h], mlp.dense_4h_to_h
        else:
            inward, outward = [mlp.gate_proj, mlp.up_proj], mlp.down_proj
        size = outward.weight.norm(dim=0)
        for linear in inward:
            size = size * linear.weight.norm(dim=1)
        outward.weight[:, size.argsort(descending=True)[width:]] = 0


def test_a_t5_gives_layers_of_encoder_and_decoder(tmp_path):
    model = hf.make_t5(str(tmp_path / "whole"), num_layers=3, num_decoder_layers=4)
    cut = Cut(encoder_layers=(0, 2), num_decoder_layers=2)
    module, params = load_cut(str(tmp_path / "whole"), cut)
    del model.encoder.block[1], model.decoder.block[1:3]
    model.decoder.block[1].layer[0].SelfAttention.layer_idx = 1
    model.decoder.block[1].layer[1].EncDecAttention.layer_idx = 1
    ids = torch.tensor(IDS).long()
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, decoder_input_ids=ids).logits.numpy()
    found = apply(module, params, IDS, MASK, IDS)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (Cut(num_layers=5), "num_layers=5: expected at most 2, the model's"),
        (Cut(layers=(0, 7)), r"layers=\(0, 7\): the model has no layer 7, expected 0 to 1"),
        (Cut(num_decoder_layers=1), "num_decoder_layers: the model has no such layers, expected"),
        (Cut(feed_forward_width=99), "feed_forward_width=99: expected at most 40"),
    ],
)
def test_a_cut_of_what_is_not_there_is_refused(cut, message, tmp_path):
    hf.make_causal(str(tmp_path), model_type="llama")
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}: {message}"):
        load_cut(str(tmp_path), cut)


TEXTS = [
    "ein Mann geht über die Straße",
    "zwei Hunde spielen im Schnee mit einem Ball",
    "eine Frau lacht und ein Kind weint",
    "drei Männer stehen auf einer Straße neben einem Wagen",
    "ein Kind spielt mit einem Hund im Garten",
    "eine Frau mit einem Hut sitzt auf einer Bank im Park",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A SentencePiece tokenizer of some German words."""
    directory = str(tmp_path_factory.mktemp("whole"))
    return train_sentencepiece(TEXTS, vocab_size=60, model_type="bpe", directory=directory)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.sampled_from("einMagthüberdSrßzwHuspilmcF aunkxQé"), max_size=40),
    size=st.integers(0, 1),
)
def test_a_cut_tokenizer_writes_what_the_whole_one_writes(whole, text, size):
    responses = whole.encode_responses(TEXTS[:1])
    kept = choose(whole, count(whole, responses), size and len(essential(whole)) + 3)
    tokenizer = CutTokenizer(whole, kept)
    (ids,) = tokenizer.encode_responses([text])
    assert all(0 <= id < len(kept) for id in ids) and ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(ids) == whole.decode(whole.encode_responses([text])[0])
    assert tokenizer.encode_prompts([text]) == whole.encode_prompts([text])


ADDED = ("    ", "  ", "\n\t", "é\n", "<x y>")


@pytest.fixture(scope="module")
def byte_level():
    """A tokenizer of bytes, with tokens that were added to it as text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: id for id, piece in enumerate([*alphabet, "<eos>"])}, [])
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken("<eos>", special=True)])
    made.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in ADDED])
    return HuggingFaceTokenizer(made, Special(eos_id=len(alphabet)), origin="made here")


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.sampled_from([*ADDED, " ", "é", "Ã©", "a", "Ġ", "日"]), max_size=12))
def test_any_text_is_written_without_tokens_that_were_added(byte_level, parts):
    text = "".join(parts)
    tokenizer = CutTokenizer(byte_level, choose(byte_level, count(byte_level, [])))
    assert tokenizer.vocab_size == 257
    (ids,) = tokenizer.encode_responses([text])
    assert tokenizer.decode(ids) == text == byte_level.decode(*byte_level.encode_responses([text]))


def test_what_is_kept_is_written_as_before(whole):
    responses = whole.encode_responses(TEXTS)
    tokenizer = CutTokenizer(whole, choose(whole, count(whole, responses)))
    again = tokenizer.encode_responses(TEXTS)
    assert [tokenizer.kept[ids].tolist() for ids in again] == responses


def test_the_most_used_pieces_are_kept(whole):
    responses = whole.encode_responses(TEXTS[:3])
    least = len(essential(whole))
    kept = choose(whole, count(whole, responses), least + 4)
    assert len(kept) == least + 4 and kept == sorted(kept)
    counts = {id: sum(ids.count(id) for ids in responses) for id in range(whole.vocab_size)}
    chosen = set(kept) - set(essential(whole))
    left = set(range(whole.vocab_size)) - set(kept)
    assert min(counts[id] for id in chosen) >= max(counts[id] for id in left)
    with pytest.raises(ValueError, match=f"a vocabulary of 5: expected at least {least}"):
        choose(whole, count(whole, responses), 5)


def test_a_cut_tokenizer_is_kept_on_disk(whole, tmp_path):
    tokenizer = CutTokenizer(whole, choose(whole, count(whole, whole.encode_responses(TEXTS[:1]))))
    tokenizer.save(str(tmp_path))
    again = load_tokenizer(str(tmp_path))
    assert again.identity == tokenizer.identity != whole.identity
    assert again.encode_responses(TEXTS) == tokenizer.encode_responses(TEXTS)
    for wrong in ([], [0, 1, "2"], [3, 4], [1, 0], None):
        (tmp_path / "vocabulary.json").write_text(json.dumps({"kept": wrong}))
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            load_tokenizer(str(tmp_path))


CHANGES = """

import l2s_jax.config
base_config = get_config


def get_config():
    config = base_config()
    config.llm.model = l2s_jax.config.model_config("llama")
    config.llm.model.update(
        width=16, num_heads=2, num_kv_heads=1, head_width=8, feed_forward_width=32, num_layers=3,
        tied_head=True,
    )
    config.slm.model = l2s_jax.config.model_config()
    config.slm.cut.update(num_layers=2, feed_forward_width=20)
    config.slm.vocabulary = "27"
    config.labels.update(source="llm", max_new_tokens=8)
    for section in (config.llm, config.slm, config.l2s):
        section.train.parameter_scale = False
    return config
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(config file, workdir) of a finished run."""
    root = tmp_path_factory.mktemp("cut")
    config = tiny.write_task(root / "task")
    config.write_text(config.read_text() + CHANGES)
    assert tiny.run(f"--config={config}", f"--workdir={root / 'run'}") == 0
    return config, root / "run"


def test_the_slm_is_what_was_cut(job):
    _, workdir = job
    llm, _ = pretrained.load(str(workdir / "llm/model"))
    slm, _ = pretrained.load(str(workdir / "slm/model"))
    assert (llm.config.num_layers, slm.config.num_layers) == (3, 2)
    assert slm.config.feed_forward_width == 20 and slm.config.vocab_size == 30
    system, trained, _ = bundle.load(str(workdir / "l2s/model"))
    assert len(system.slm_config.vocabulary) == 27 and system.shared_vocabulary
    assert trained["slm"]["token_embedding"]["embedding"].shape == (30, 16)
    systems = json.loads((workdir / "report.json").read_text())["systems"]
    # Two layers less wide, and 27 rows of the table.
    layer = 16 * (16 + 2 * 8 + 16) + 3 * 16 * 20 + 2 * 16
    assert systems["l2s"]["params_read_per_token"] == 2 * layer + 16 + 27 * 16
    assert systems["slm"]["params_read_per_token"] == systems["l2s"]["params_read_per_token"]


def test_both_start_from_the_same(job, monkeypatch, tmp_path):
    config, _ = job
    starts = {}

    def fit(self, system, params, frozen, learnt, policy):
        starts[self.name] = params["slm"] if "slm" in params else params["llm"]
        if self.name == "l2s":
            starts["projector"] = params["projector"]
        return params

    monkeypatch.setattr("l2s_jax.experiment.training.TrainedStage.fit", fit)
    for name, flags in {
        "cut": [],
        "random": ["--config.slm.cut.num_layers=0", "--config.slm.cut.feed_forward_width=0"],
    }.items():
        run = [f"--config={config}", f"--workdir={tmp_path / name}", "--config.labels.source=data"]
        assert tiny.run(*run, *flags, "--until=l2s") == 0
        assert not small.differ(starts["slm"], starts["l2s"])
        assert all(np.any(leaf) for leaf in jax.tree.leaves(starts["projector"]["outward"]))
    assert small.differ(starts["slm"], starts["llm"])
    run = [f"--config={config}", f"--workdir={tmp_path / 'cut'}", "--config.labels.source=data"]
    inward = starts["projector"]["inward"]
    assert tiny.run(*run, "--config.l2s.zero_start=True", "--until=l2s") == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(starts["projector"]["outward"]))
    assert small.differ(starts["slm"], starts["llm"]) and np.any(inward["kernel"])


def test_the_model_answers_by_its_directory_alone(job):
    _, workdir = job
    lines = (workdir / "predictions/l2s.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    model = l2s_jax.load(str(workdir / "l2s/model"))
    outputs = model.generate([record["prompt"] for record in records])
    assert [output.text for output in outputs] == [record["response"] for record in records]


def test_systems_answer_from_a_file(job, tmp_path):
    _, workdir = job
    (tmp_path / "prompts.txt").write_text("reverse: one two\n")
    for system in ("slm", "l2s"):
        flags = [f"--input={tmp_path / 'prompts.txt'}", f"--output={tmp_path / system}"]
        assert (
            tiny.run("--mode=generate", f"--workdir={workdir}", f"--system={system}", *flags) == 0
        )
        assert len((tmp_path / system).read_text().splitlines()) == 1


def test_the_slm_goes_out_as_a_checkpoint_with_its_vocabulary(job, tmp_path):
    _, workdir = job
    source = str(workdir / "l2s/model")
    assert convert(["--input", source, "--output", str(tmp_path / "hf"), "--to=hf"]) == 0
    kept = json.loads((tmp_path / "hf/vocabulary.json").read_text())["kept"]
    assert len(kept) == 27
    model = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "hf"))
    assert model.config.vocab_size == 30 and model.config.eos_token_id == 1
    assert convert(["--input", source, "--output", str(tmp_path / "own"), "--include-llm"]) == 0
    prompts = ["reverse: one two three"]
    (before,) = l2s_jax.load(source).generate(prompts)
    assert l2s_jax.load(str(tmp_path / "own")).generate(prompts) == [before]


@pytest.mark.parametrize("kind", ["hf", "l2s_jax"])
def test_the_slm_alone_takes_its_vocabulary_along(job, tmp_path, kind):
    _, workdir = job
    source, target = str(workdir / "slm/model"), tmp_path / "out"
    assert convert(["--input", source, "--output", str(target), f"--to={kind}"]) == 0
    assert load_tokenizer(str(target)).identity == load_tokenizer(source).identity
    assert json.loads((target / "vocabulary.json").read_text())["kept"]


def test_the_card_says_what_was_cut(job):
    _, workdir = job
    card = (workdir / "l2s/model/README.md").read_text()
    assert "cut out of the LLM (num_layers=2, feed_forward_width=20), trained further" in card
    assert "shared; responses are written with 27 of 30 pieces" in card


def test_a_plan_knows_both_cuts(job, tmp_path):
    config, _ = job
    run = [f"--config={config}", f"--workdir={tmp_path}", "--mode=plan", "--topology=cpu:1"]
    assert tiny.run(*run, "--programs=decode") == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    # Projector 16 x 16 twice with biases or not, two narrower layers, the whole table, a norm.
    layer = 16 * (16 + 2 * 8 + 16) + 3 * 16 * 20 + 2 * 16
    projector = plan["model"]["trained_parameters"] - 2 * layer - 16 - 30 * 16
    assert projector == 2 * 16 * 16


def test_status_and_a_second_run_find_it_done(job, capsys):
    config, workdir = job
    assert tiny.run(f"--config={config}", f"--workdir={workdir}", "--mode=status") == 0
    assert re.search(r"vocabulary +done", capsys.readouterr().out)
    before = (workdir / "l2s/model/params.safetensors").stat().st_mtime_ns
    assert tiny.run(f"--config={config}", f"--workdir={workdir}") == 0
    assert (workdir / "l2s/model/params.safetensors").stat().st_mtime_ns == before


def test_distributions_over_the_whole_are_learnt_by_the_part(job, tmp_path):
    config, _ = job
    flags = ["--config.labels.source=data", "--config.distillation.weight=0.5"]
    flags += ["--config.distillation.top_k=30", "--config.slm.vocabulary=20"]
    experiments = []

    class Noted(Experiment):
        def make(self, until=""):
            experiments.append(self)
            super().make(until)

    with mock.patch("l2s_jax.experiment.experiment.Experiment", Noted):
        run = [f"--config={config}", f"--workdir={tmp_path}", *flags, "--until=vocabulary"]
        assert tiny.run(*run) == 0
    (experiment,) = experiments
    data = experiment.l2s._tokenized(experiment.labels.examples())
    experiment.logits.put_into(data)
    batch = data.padded(np.arange(4), 32, 32, "llm")
    # The LLM, asked for its distributions over what the SLM writes, without any file.
    system, trained, frozen = experiment.llm.load(experiment.context.mesh, "float")
    kept = np.array(json.loads((tmp_path / "vocabulary/vocabulary.json").read_text())["kept"])
    whole = {**batch, "response_ids": kept[batch["response_ids"]].astype(np.int32)}
    expected = np.asarray(jax.nn.softmax(system.scored(trained, frozen, whole).logits()))
    there = batch["response_mask"]
    found = np.zeros((*there.shape, len(kept) + 1))
    rows, places = np.indices(there.shape)
    for k in range(batch["teacher_ids"].shape[-1]):
        probabilities = np.exp(batch["teacher_log_probs"][..., k].astype(np.float32))
        np.add.at(found, (rows, places, batch["teacher_ids"][..., k]), probabilities)
    np.testing.assert_allclose(found[there][:, :-1], expected[there][:, kept], atol=2e-3)


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--config.slm.cut.num_layers=4"], ["config.slm.cut", "num_layers=4", "at most 3"]),
        (["--config.slm.cut.num_decoder_layers=1"], ["num_decoder_layers", "expected num_layers"]),
        (["--config.slm.cut.layers=(0,1)"], ["num_layers=2 and layers=(0, 1)"]),
        (["--config.llm.layer=99"], ["config.llm.layer: layer 99"]),
        (["--config.l2s.fusion=cross"], ["l2s.fusion='cross'", "config.slm.cut", "'replace'"]),
        (["--config.slm.vocabulary=9"], ["config.slm.vocabulary=9", "expected", "to 30"]),
        (["--config.slm.vocabulary=31"], ["config.slm.vocabulary=31", "to 30"]),
        (["--config.slm.vocabulary=some"], ["slm.vocabulary='some'", "all, task, or a number"]),
        (["--config.slm.tokenizer.train_vocab_size=28"], ["cut", "two tokenizers"]),
        (["--config.slm.model.width=8"], ["no effect with config.slm.cut", "cut out"]),
    ],
)
def test_bad_input_is_one_line_before_anything_is_trained(job, flags, fragments, tmp_path, capsys):
    config, _ = job
    run = [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    assert tiny.run(*run, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    for fragment in fragments:
        assert fragment in line
    assert not (tmp_path / "run/llm/model").exists()


def test_how_much_is_left_out_is_said(job, tmp_path, caplog, monkeypatch):
    config, _ = job
    # Pieces are counted a few responses at a time.
    monkeypatch.setattr("l2s_jax.experiment.vocabulary.AT_ONCE", 7)
    run = [f"--config={config}", f"--workdir={tmp_path}", "--config.labels.source=data"]
    with caplog.at_level(logging.INFO, "l2s_jax"):
        assert tiny.run(*run, "--until=vocabulary") == 0
    assert re.search(
        r"written with 27 of 30 pieces, which are \d+\.\d\d% of those in use", caplog.text
    )
