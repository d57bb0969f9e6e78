"""The whole main job with decoder-only models: two vocabularies, a middle layer, LoRA, beams.

Layers are scanned and rematerialized where they can be.
"""

from __future__ import annotations

import json
import shutil

import jax
import pytest
import small
import tiny

import l2s_jax
from l2s_jax.checkpoints import pretrained
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.models.llama import LlamaConfig
from l2s_jax.models.systems import LanguageModel
from l2s_jax.serving import bundle

CHANGES = """

import l2s_jax.config
base_config = get_config


def get_config():
    config = base_config()
    config.llm.model = l2s_jax.config.model_config("llama")
    config.llm.model.update(
        width=16, num_heads=2, num_kv_heads=1, head_width=8, feed_forward_width=32, num_layers=2
    )
    config.llm.layer = 0.5
    config.scan_layers = True
    config.l2s.train.remat = True
    config.slm.model = l2s_jax.config.model_config("gpt2")
    config.slm.model.update(
        width=16, num_heads=2, feed_forward_width=32, num_layers=1, max_positions=64
    )
    config.slm.tokenizer.train_vocab_size = 28
    config.labels.update(source="llm", max_new_tokens=8)
    config.labels.search.num_beams = config.decoding.search.num_beams = 2
    config.l2s.lora.rank = 2
    config.l2s.train.parameter_scale = False
    config.l2s.train.learning_rate_scales = (("projector/.*", 2.0),)
    config.slm.train.trainable = ("slm/layers_.*", "slm/final_norm/.*")
    return config
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(config file, workdir) of a finished run."""
    root = tmp_path_factory.mktemp("families")
    config = tiny.write_task(root / "task")
    config.write_text(config.read_text() + CHANGES)
    assert tiny.run(f"--config={config}", f"--workdir={root / 'run'}") == 0
    return config, root / "run"


def test_every_system_is_measured(job):
    _, workdir = job
    systems = json.loads((workdir / "report.json").read_text())["systems"]
    assert list(systems) == ["llm", "slm", "l2s", "l2s_mismatched"]
    for system in systems.values():
        assert system["latency"]["decode_ms_per_token"] > 0
    assert systems["l2s"]["params_read_per_token"] == systems["slm"]["params_read_per_token"]


def test_models_are_what_the_config_asks_for(job):
    _, workdir = job
    llm, _ = pretrained.load(str(workdir / "llm/model"))
    slm, slm_params = pretrained.load(str(workdir / "slm/model"))
    assert isinstance(llm.config, LlamaConfig) and isinstance(slm.config, GPT2Config)
    assert (llm.config.vocab_size, slm.config.vocab_size) == (30, 28)
    system, trained, frozen = bundle.load(str(workdir / "l2s/model"))
    assert system.llm_config.num_layers == 1 and set(frozen) == {"token_embedding", "layers_0"}
    assert not system.shared_vocabulary
    # LoRA is merged: what is on disk is an ordinary SLM, of which only kernels have changed.
    assert set(trained) == {"projector", "prompt_map", "slm"}
    start = jax.jit(LanguageModel("slm", slm.config).init)(jax.random.key(0))["slm"]
    assert changed(start, trained["slm"]) == {"layers_0"}
    # And of the SLM alone, which starts from the same, only what `trainable` names.
    assert changed(start, slm_params) == {"layers_0", "final_norm"}


def changed(before, after):
    """Names of the parts that differ."""
    return {name for name in before if small.differ(before[name], after[name])}


def test_the_model_answers_by_its_directory_alone(job):
    _, workdir = job
    lines = (workdir / "predictions/l2s.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    model = l2s_jax.load(str(workdir / "l2s/model"))
    outputs = model.generate([record["prompt"] for record in records])
    assert [output.text for output in outputs] == [record["response"] for record in records]


def test_the_card_says_what_it_is(job):
    _, workdir = job
    card = (workdir / "l2s/model/README.md").read_text()
    report = json.loads((workdir / "report.json").read_text())
    for fragment in ("llama, trained from nothing, layer 0.5", "gpt2", "one of each model"):
        assert fragment in card
    assert f"{report['systems']['l2s']['quality']['bleu']:.1f}" in card
    assert "the LLM's own responses" in card and "reverse: {words}" in card


def test_a_second_run_makes_nothing_anew(job):
    config, workdir = job
    files = sorted(workdir.glob("*/model/*"))
    before = [path.stat().st_mtime_ns for path in files if path.name != "README.md"]
    # Nor with layers computed in another way.
    flags = ["--mode=evaluate", "--config.scan_layers=False", "--config.l2s.train.remat=False"]
    assert tiny.run(f"--config={config}", f"--workdir={workdir}", *flags) == 0
    assert [p.stat().st_mtime_ns for p in files if p.name != "README.md"] == before


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--config.l2s.fusion=cross"], ["'cross'", "'gpt2'", "no cross-attention"]),
        (["--config.llm.layer=3"], ["layer 3", "2 layers"]),
        (["--config.slm.model.max_positions=8"], ["8 positions", "64"]),
        (["--config.slm.model.family=rwkv"], ["rwkv", "gpt_neox"]),
        (["--config.slm.model.num_heads=3"], ["slm.model.width=16", "num_heads=3"]),
        (["--config.l2s.train.parameter_scale=True"], ["parameter_scale", "lora.rank"]),
        (["--config.l2s.lora.rank=-1"], ["lora.rank=-1"]),
        (["--config.l2s.lora.pattern=nothing"], ["lora.pattern", "matches none"]),
        (["--config.slm.train.trainable=('slm/decoder/.*',)"], ["slm/decoder", "matches none"]),
        (
            ["--config.l2s.train.learning_rate_scales=(('projector/.*',-1.0),)"],
            ["learning_rate_scales", "positive"],
        ),
        (["--config.slm.tokenizer.train_vocab_size=3000"], ["3000 pieces is too large"]),
        (["--config.slm.tokenizer.model_type=wordpiece"], ["'wordpiece'"]),
    ],
)
def test_bad_settings_are_refused_in_one_line(job, tmp_path, capsys, flags, fragments):
    config, workdir = job
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    status = tiny.run(f"--config={config}", f"--workdir={copy}", *flags)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert status == 2 and len(error) == 1
    for fragment in fragments:
        assert fragment in error[0]


def test_generation_past_the_last_position_is_refused(job, tmp_path, capsys):
    config, workdir = job
    source = tmp_path / "in.txt"
    source.write_text("one two\n")
    flags = [f"--config={config}", f"--workdir={workdir}", "--mode=generate", f"--input={source}"]
    assert tiny.run(*flags, "--config.decoding.max_new_tokens=5000") == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and "slm: the model has 64 positions" in error[0]
    with pytest.raises(ValueError, match="64 positions, prompt and response need 80"):
        l2s_jax.load(str(workdir / "l2s/model"), prompt_lengths=(16,), max_new_tokens=64)
