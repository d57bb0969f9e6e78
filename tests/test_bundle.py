"""A trained L2S model on disk: what is saved is what is loaded, with the LLM that it belongs to."""

import json

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from safetensors.numpy import load_file

import l2s_jax
from l2s_jax.checkpoints import pretrained
from l2s_jax.checkpoints.files import content_hash
from l2s_jax.cluster import sharding
from l2s_jax.convert import main
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.models.l2s import FUSIONS
from l2s_jax.models.systems import LanguageModel, LlmToSlm, parameter_count
from l2s_jax.serving import bundle
from l2s_jax.serving.generator import Generator
from l2s_jax.settings.search import Search
from l2s_jax.tokenizers.sentencepiece import train_sentencepiece
from l2s_jax.tokenizers.tokenizer import load_tokenizer

LLM = small.t5_config(tied_head=True)
SLM = small.t5_config(width=12, activation="gated_gelu")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Two that differ."""
    return [
        train_sentencepiece(
            [text] * 20, vocab_size=9, directory=str(tmp_path_factory.mktemp("tokenizer"))
        )
        for text in ("abc bca cab abba", "xyz yzx zxy xyyx")
    ]


@pytest.fixture
def llm(tmp_path):
    """(directory, parameters) of an LLM on disk."""
    params = LanguageModel("llm", LLM).init(jax.random.key(0))["llm"]
    directory = tmp_path / "llm"
    pretrained.save_hf(LLM, params, str(directory))
    return directory, params


def save(tmp_path, llm, tokenizers, fusion="add", llm_path=None, shared=True):
    directory, _ = llm
    system = LlmToSlm(LLM, SLM, projector_width=5, fusion=fusion, shared_vocabulary=shared)
    trained = system.init(jax.random.key(1))
    bundle.save(
        system,
        trained,
        str(tmp_path / "l2s"),
        llm_path=llm_path or str(directory),
        llm_hash=content_hash(str(directory)),
        layer=0.0,
        llm_tokenizer=tokenizers[0],
        slm_tokenizer=tokenizers[0 if shared else 1],
        generation={"prompt_lengths": [8, 16], "max_new_tokens": 5, "batch_size": 2},
    )
    return system, trained


@pytest.mark.parametrize("mesh", [None, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_the_llm_may_encode_in_a_dtype_of_its_own(tmp_path, llm, tokenizers, mesh):
    save(tmp_path, llm, tokenizers)
    placed = mesh and sharding.make_mesh(mesh)
    settings = {"encoder_dtype": jnp.bfloat16, "mesh": placed, "weights": "float" if mesh else ""}
    system, trained, frozen = bundle.load(str(tmp_path / "l2s"), **settings)
    ids, mask = np.asarray([[3, 4, 5, 6]], np.int32), np.ones((1, 4), bool)
    hidden = system.encode(trained, frozen, ids, mask)
    module, params = pretrained.load_encoder(str(llm[0]), dtype=jnp.bfloat16)
    embedded = module.apply({"params": params}, ids, method="embed")
    expected = module.apply({"params": params}, embedded, mask, method="represent")
    exact = pretrained.load_encoder(str(llm[0]))[0].apply(
        {"params": params}, embedded, mask, method="represent"
    )
    error = np.abs(hidden - exact).max()
    assert np.abs(hidden - expected).max() < error / 4 and error > 1e-3
    kernels = [x for x in jax.tree.leaves(frozen) if x.dtype == jnp.bfloat16]
    assert bool(kernels) == bool(mesh)
    # What decodes is as it was.
    assert system.slm_config.dtype == jnp.float32
    plain, *_ = bundle.load(str(tmp_path / "l2s"), mesh=placed)
    assert plain.llm_config.dtype == plain.slm_config.dtype == jnp.float32


def test_a_mesh_is_named_by_its_axes(tmp_path, llm, tokenizers):
    save(tmp_path, llm, tokenizers)
    directory, prompts = str(tmp_path / "l2s"), ["abc bca", "cab", "abba abc bca cab"]
    model = l2s_jax.load(directory, mesh={}, batch_size=8)
    assert dict(model.mesh.shape) == {"data": 8, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert model.generate(prompts) == l2s_jax.load(directory).generate(prompts)
    with pytest.raises(
        ValueError, match=r"^prompt_lengths: prompts of 8 tokens, which mesh .* in 16"
    ):
        l2s_jax.load(directory, mesh={"sequence": 8})
    with pytest.raises(ValueError, match=r"batch_size=2: mesh data=4, .* such as 4$"):
        l2s_jax.load(directory, mesh={"tensor": 2})
    with pytest.raises(ValueError, match=r"projector/inward/kernel .* expected a divisor of 5$"):
        l2s_jax.load(directory, mesh={"tensor": 2}, batch_size=4)


BAD_SETTINGS = [
    ({"prompt_lengths": ()}, r"^prompt_lengths=\(\): expected numbers of tokens that ascend"),
    ({"prompt_lengths": (16, 8)}, r"^prompt_lengths=\(16, 8\): expected numbers"),
    ({"prompt_lengths": 8}, "^prompt_lengths=8: expected numbers"),
    ({"prompt_lengths": (8, 8.5)}, r"^prompt_lengths=\(8, 8.5\): expected numbers"),
    ({"max_new_tokens": 0}, "^max_new_tokens=0: expected an integer >= 1"),
    ({"max_new_tokens": "5"}, "^max_new_tokens='5': expected an integer"),
    ({"batch_size": 2.5}, "^batch_size=2.5: expected an integer"),
    ({"weights": "int4"}, r"^weights='int4': expected one of \('float', 'int8'\)"),
    ({"search": {"temprature": 1.0}}, "^search.temprature: no such setting, .* 'temperature'"),
    ({"search": {"top_k": 5}}, "^search.top_k=5 with temperature=0.0: expected top_k=0"),
    ({"search": None}, "^search=None: expected a section of settings"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
@pytest.mark.parametrize("exact", [False, True])
def test_what_is_wrong_with_a_setting_is_said_before_anything_is_read(settings, message, exact):
    with pytest.raises(ValueError, match=message):
        l2s_jax.load("/nowhere/at/all", exact=exact, **settings)
    defaults = {"prompt_lengths": (8,), "max_new_tokens": 4, "batch_size": 2}
    with pytest.raises(ValueError, match=message):
        Generator(None, {}, {}, None, None, **{**defaults, **settings})


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("max_new_token", "max_new_tokens"),
        ("dtpye", "dtype"),
        ("temperature", "; there are prompt_lengths, .*, mesh"),
    ],
)
def test_a_setting_that_is_not_there_is_one_line_with_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"^{name}: no such setting.*{nearest}"):
        l2s_jax.load("/nowhere/at/all", **{name: 1})


def test_numbers_of_settings_may_be_numpys(tmp_path, llm, tokenizers):
    save(tmp_path, llm, tokenizers)
    numbers = {"max_new_tokens": np.int64(3), "batch_size": np.int32(1)}
    settings = {**numbers, "prompt_lengths": np.array([4, 8]), "search": {"stop": ["ab"]}}
    model = l2s_jax.load(str(tmp_path / "l2s"), dtype="float32", **settings)
    assert (model.prompt_lengths, model.max_new_tokens, model.batch_size) == ((4, 8), 3, 1)
    assert model.search == Search(stop=("ab",))


def test_a_model_may_be_saved_at_home(tmp_path, llm, tokenizers, monkeypatch):
    save(tmp_path, llm, tokenizers)
    monkeypatch.setenv("HOME", str(tmp_path))
    l2s_jax.load("~/l2s").save_pretrained("~/copy")
    assert (tmp_path / "copy/params.safetensors").is_file()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_round_trip(tmp_path, llm, tokenizers, fusion, shared):
    system, trained = save(tmp_path, llm, tokenizers, fusion, shared=shared)
    loaded_system, loaded, frozen = bundle.load(str(tmp_path / "l2s"))
    found = [tokenizer.fingerprint for tokenizer in bundle.load_tokenizers(str(tmp_path / "l2s"))]
    assert found == [tokenizers[0].fingerprint, tokenizers[0 if shared else 1].fingerprint]
    assert loaded_system == system
    jax.tree.map(np.testing.assert_array_equal, trained, loaded)
    _, params = llm
    expected = {key: params[key] for key in ("token_embedding", "encoder")}
    jax.tree.map(np.testing.assert_array_equal, expected, frozen)


def test_a_relative_llm_is_found_when_both_are_moved(tmp_path, llm, tokenizers):
    save(tmp_path, llm, tokenizers, llm_path="../llm")
    (tmp_path / "moved").mkdir()
    for name in ("llm", "l2s"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    bundle.load(str(tmp_path / "moved/l2s"))


@pytest.mark.parametrize("include_llm", [True, False])
@pytest.mark.parametrize("kind", ["t5 and t5", "llama and gpt2"])
def test_a_copy_answers_as_the_original_does(tmp_path, llm, tokenizers, kind, include_llm):
    if kind == "t5 and t5":
        save(tmp_path, llm, tokenizers)
    else:
        hf.make_causal(str(tmp_path / "llama"), model_type="llama", num_hidden_layers=4)
        encoder, _ = pretrained.load_encoder(str(tmp_path / "llama"), layer=0.5)
        slm = GPT2Config(
            vocab_size=48, width=12, num_heads=2, num_layers=1, max_positions=64, pad_id=0, eos_id=1
        )
        system = LlmToSlm(encoder.config, slm, projector_width=5, shared_vocabulary=False)
        bundle.save(
            system,
            system.init(jax.random.key(1)),
            str(tmp_path / "l2s"),
            llm_path=str(tmp_path / "llama"),
            llm_hash=content_hash(str(tmp_path / "llama")),
            layer=0.5,
            llm_tokenizer=tokenizers[0],
            slm_tokenizer=tokenizers[1],
            generation={"prompt_lengths": [8, 16], "max_new_tokens": 5, "batch_size": 2},
        )
    (tmp_path / "l2s/README.md").write_text("a card")
    prompts = ["abc bca", "cab", "abba abc bca cab"]
    expected = l2s_jax.load(str(tmp_path / "l2s")).generate(prompts)
    flags = [f"--input={tmp_path / 'l2s'}", f"--output={tmp_path / 'copy'}"]
    assert main([*flags, *(["--include-llm"] if include_llm else [])]) == 0
    if include_llm:
        llm[0].rename(tmp_path / "away")
        (tmp_path / "copy").rename(tmp_path / "elsewhere")
        copied = tmp_path / "elsewhere"
    else:
        copied = tmp_path / "copy"
    assert l2s_jax.load(str(copied)).generate(prompts) == expected
    assert (copied / "README.md").read_text() == "a card"
    again = [f"--input={copied}", f"--output={tmp_path / 'second'}"]
    assert main(again) == 0
    assert (tmp_path / "second/llm").exists() == include_llm
    few = l2s_jax.load(str(copied), max_new_tokens=2, batch_size=1).generate(prompts)
    assert max(output.tokens for output in few) == 2
    if include_llm:
        held = sum(tensor.size for tensor in load_file(copied / "llm/params.safetensors").values())
        _, _, frozen = bundle.load(str(copied))
        assert held == parameter_count(frozen)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_slm_becomes_a_hugging_face_directory(tmp_path, llm, tokenizers, fusion, capsys):
    save(tmp_path, llm, tokenizers, fusion)
    flags = [f"--input={tmp_path / 'l2s'}", f"--output={tmp_path / 'slm'}", "--to=hf", "--verify"]
    status = main(flags)
    out, err = capsys.readouterr()
    if fusion == "cross":
        assert status == 2 and "an SLM without an encoder" in err
        assert not (tmp_path / "slm").exists()
        return
    assert (status, err) == (0, "")
    assert "agrees with transformers" in out
    _, trained, _ = bundle.load(str(tmp_path / "l2s"))
    _, params = pretrained.load_hf(str(tmp_path / "slm"))
    jax.tree.map(np.testing.assert_array_equal, trained["slm"], params)
    assert load_tokenizer(str(tmp_path / "slm")).fingerprint == tokenizers[0].fingerprint


def test_inspect_prints_every_parameter(tmp_path, llm, tokenizers, capsys):
    _, trained = save(tmp_path, llm, tokenizers)
    assert main([f"--input={tmp_path / 'l2s'}", "--inspect"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(jax.tree.leaves(trained))
    assert ["projector/inward/kernel", "16x5", "F32"] in [line.split()[:3] for line in lines]
    assert main([f"--input={llm[0]}", "--inspect"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(jax.tree.leaves(llm[1]))
    assert ["token_embedding/embedding", "48x16", "F32", "shared.weight"] in map(str.split, lines)


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (["--inspect", "--output={out}"], "--inspect only prints"),
        (["--output={out}", "--include-llm", "--to=hf"], "--include-llm"),
        (["--output={out}", "--verify"], "neither the input nor the output"),
    ],
)
def test_flags_that_make_no_sense_together(tmp_path, llm, tokenizers, capsys, flags, fragment):
    save(tmp_path, llm, tokenizers)
    out = tmp_path / "out"
    assert main([f"--input={tmp_path / 'l2s'}", *(f.format(out=out) for f in flags)]) == 2
    assert fragment in capsys.readouterr().err
    assert not out.exists()


def test_a_copy_of_a_model_whose_llm_is_gone_leaves_nothing(tmp_path, llm, tokenizers, capsys):
    save(tmp_path, llm, tokenizers)
    llm[0].rename(tmp_path / "away")
    assert main([f"--input={tmp_path / 'l2s'}", f"--output={tmp_path / 'copy'}"]) == 2
    assert "no such directory" in capsys.readouterr().err
    assert not list(tmp_path.glob("copy*"))


def test_another_llm_is_refused(tmp_path, llm, tokenizers):
    save(tmp_path, llm, tokenizers)
    other = LanguageModel("llm", LLM).init(jax.random.key(2))["llm"]
    pretrained.save_hf(LLM, other, str(llm[0]))
    with pytest.raises(ValueError, match="not the one that"):
        bundle.load(str(tmp_path / "l2s"))


def test_a_directory_of_another_kind_is_refused(tmp_path, llm):
    with pytest.raises(ValueError, match=r"config\.json: family is None, expected 'l2s'"):
        bundle.load(str(llm[0]))


def test_a_damaged_config_is_refused(tmp_path, llm, tokenizers):
    save(tmp_path, llm, tokenizers)
    path = tmp_path / "l2s/config.json"
    fields = json.loads(path.read_text())
    del fields["fusion"]
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"config\.json: not the config of an L2S model.*fusion"):
        bundle.load(str(tmp_path / "l2s"))
