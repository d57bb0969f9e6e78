"""Damaged tokenizers, and L2S models: one line that names the file, or what was written."""

import json
import shutil

import corpus
import jax
import numpy as np
import pytest
import small
from corpus import Trial
from test_damaged_models import check
from tokenizers import processors

import l2s_jax
from l2s_jax import sealed
from l2s_jax.convert import main
from l2s_jax.models.systems import LlmToSlm
from l2s_jax.serving import bundle
from l2s_jax.tokenizers import load_tokenizer
from l2s_jax.tokenizers.sentencepiece import train_sentencepiece

FEW = {name: corpus.HOSTILE[name] for name in ("null", "text", "list", "-1", "0", "10^9")}
# What people may set as they like: any value of its kind is right.
FREE = {"max_new_tokens", "prompt_lengths", "search", "temperature", "top_k", "dropout_rate"}
FREE |= {"norm_epsilon", "max_distance", "eos_id"}


@pytest.fixture
def theirs(tmp_path):
    """A tokenizer as a checkpoint has it, in a folder; nothing says what it was."""
    tokenizer = corpus.byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    directory = tmp_path / "theirs"
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "add_bos_token": True,
        "model_max_length": 10**30,  # as transformers writes it
        "chat_template": "{{ messages[0].content }}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    return directory


def facts(tokenizer):
    """What a tokenizer does with a text, and all that it is told by."""
    ids = tokenizer.encode_prompts(["abc cab"])[0]
    back = tokenizer.decode(tokenizer.encode_responses(["abc"])[0])
    sizes = tokenizer.vocab_size, tokenizer.pad_id, tokenizer.end_ids, len(tokenizer.pieces)
    return tokenizer.identity, ids, back, sizes


def fits(found, _):
    """Of a file that nothing says the content of: ids are those of the vocabulary."""
    _, ids, _, (size, *_, pieces) = found
    return pieces == size and 0 <= min(ids, default=0) <= max(ids, default=0) < size


def test_a_damaged_tokenizer_of_a_checkpoint(theirs, capfd):
    trial = Trial()
    for name, hostile in (
        ("tokenizer_config.json", None),
        ("generation_config.json", None),
        ("tokenizer.json", FEW),
    ):
        path = theirs / name
        content = path.read_bytes()

        def read():
            return facts(load_tokenizer(str(theirs)))

        read()
        trial.read(corpus.json_texts(content), path, read, same=fits)
        values = corpus.json_values(json.loads(content), hostile)
        trial.read(values, path, read, same=fits)
    check(trial, 700)
    # The library's Rust code would print where it gave up.
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["tokenizer.json", "spiece.model"])
def test_a_damaged_tokenizer_of_ours(kind, theirs, tmp_path):
    directory = tmp_path / "ours"
    if kind == "spiece.model":
        train_sentencepiece(["abc bca cab abba"] * 20, vocab_size=9, directory=str(directory))
    else:
        load_tokenizer(str(theirs)).save(str(directory))
    path, trial = directory / kind, Trial()
    content = path.read_bytes()

    def read():
        return facts(load_tokenizer(str(directory)))

    expected = read()
    trial.read(corpus.flips(content, 100), path, read, same=lambda *_: False)
    trial.read(corpus.cut(content), path, read, same=lambda *_: False)
    assert trial.lines == trial.tried
    # Without hashes, as older versions left it.
    (directory / sealed.SUMS).unlink()
    assert read() == expected
    trial.read(corpus.flips(content, 200), path, read, same=lambda *_: True)
    trial.read(corpus.cut(content), path, read, same=lambda *_: True)
    if kind == "tokenizer.json":
        settings = directory / "tokenizer_config.json"
        values = corpus.json_values(json.loads(settings.read_bytes()), FEW)
        trial.read(values, settings, read, same=fits)
    check(trial, 200)


def test_a_damaged_list_of_hashes(theirs, tmp_path):
    directory = tmp_path / "ours"
    load_tokenizer(str(theirs)).save(str(directory))
    path, trial = directory / sealed.SUMS, Trial()

    def read():
        return facts(load_tokenizer(str(directory)))

    expected = read()
    trial.read(corpus.flips(path.read_bytes(), 200), path, read, same=lambda x, _: x == expected)
    trial.read(corpus.cut(path.read_bytes()), path, read, same=lambda x, _: x == expected)
    check(trial, 150)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An L2S model with its LLM inside, on disk."""
    root = tmp_path_factory.mktemp("saved")
    tokenizer = train_sentencepiece(
        ["abc bca cab abba"] * 20, vocab_size=9, directory=str(root / "tokenizer")
    )
    system = LlmToSlm(small.t5_config(), small.t5_config(width=12), projector_width=5)
    bundle.save_whole(
        system,
        *small.make_params(system),
        str(root / "l2s"),
        llm_tokenizer=tokenizer,
        slm_tokenizer=tokenizer,
        generation={
            "prompt_lengths": [8, 16],
            "max_new_tokens": 5,
            "batch_size": 2,
            "weights": "float",
            "search": {"temperature": 0.5, "top_k": 3},
        },
    )
    return root / "l2s"


@pytest.fixture
def model(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "l2s")


def state(model):
    arrays = [np.asarray(x).tobytes() for x in jax.tree.leaves((model.trained, model.frozen))]
    kept = model.system, model.prompt_lengths, model.max_new_tokens, model.batch_size, model.search
    return arrays, kept, facts(model.response_tokenizer)


def test_a_damaged_l2s_model(model):
    def read():
        return state(l2s_jax.load(str(model)))

    trial, expected = Trial(), read()
    names = ("config.json", "params.safetensors", "spiece.model", "llm/config.json")
    for name in (*names, "llm/params.safetensors"):
        path = model / name
        content = path.read_bytes()
        trial.read(corpus.flips(content, 60), path, read, same=lambda *_: False)
        trial.read(corpus.cut(content), path, read, same=lambda *_: False)
    assert trial.lines == trial.tried
    check(trial, 200)
    (model / sealed.SUMS).unlink()
    (model / "llm" / sealed.SUMS).unlink()
    assert read() == expected

    def same(found, variant):
        return found == expected or (found[0] == expected[0] and variant.key in FREE)

    named = str(model)
    settings, weights = model / "config.json", model / "params.safetensors"
    content = settings.read_bytes()
    trial.read(corpus.json_texts(content), settings, read, same=same)
    values = (
        variant
        for variant in corpus.json_values(json.loads(content))
        if variant.key not in FREE or variant.value in ("10^9", "infinity", "NaN", "text", "-1")
    )
    trial.read(values, settings, read, same=same)
    damaged = corpus.safetensors_variants(weights.read_bytes())
    trial.read(damaged, weights, read, same=same, named=named)
    check(trial, 1000)


def test_a_tokenizer_with_more_pieces_than_the_model_has_ids(model, tmp_path):
    (model / sealed.SUMS).unlink()
    words = ["".join(chr(97 + i + j) for j in range(3)) for i in range(24)]
    train_sentencepiece(words * 20, vocab_size=50, directory=str(tmp_path / "other"))
    shutil.copy(tmp_path / "other/spiece.model", model)
    with pytest.raises(ValueError, match="l2s: the tokenizer has 50 pieces, the model only 48 ids"):
        l2s_jax.load(str(model))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("generation", "max_new_tokens"), 10**9, "generation.max_new_tokens=1000000000: expected"),
        (("generation", "batch_size"), 10**9, "generation.batch_size=1000000000: expected"),
        (("generation", "prompt_lengths"), [16, 8], r"prompt_lengths=\[16, 8\]: expected numbers"),
        (("slm", "num_encoder_layers"), 9000, "9000 layers .* has only .* tensors"),
        (("stack",), 9000, r"9000 layers \(stack\)"),
        (("slm", "decoder_start_id"), -1, "decoder_start_id -1: expected 0 to 47"),
        (("llm", "layer"), "all", "llm.layer='all': expected a number"),
        (("layers",), [[3]], "expected 1 to 2|the LLM has 1 layers"),
    ],
)
def test_a_number_in_its_config_is_refused_in_one_line(
    path, value, message, model, tmp_path, capfd
):
    (model / sealed.SUMS).unlink()
    settings = model / "config.json"
    fields = json.loads(settings.read_text())
    inner = fields
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    settings.write_text(json.dumps(fields))
    assert main([f"--input={model}", f"--output={tmp_path / 'out'}"]) == 2
    said = capfd.readouterr().err
    with pytest.raises(ValueError, match=message):
        raise ValueError(said)
    assert said.startswith("error: ") and said.count("\n") == 1 and str(settings) in said
    assert not (tmp_path / "out").exists()
