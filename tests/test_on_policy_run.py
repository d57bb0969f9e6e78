"""On-policy distillation in whole runs: what is trained, what is stale, bad input."""

import json
import shutil

import pytest
import tiny
from safetensors.numpy import load_file, save_file
from test_distillation_run import metrics_of
from test_stages import stale, states

from l2s_jax.experiment import toy
from l2s_jax.experiment.experiment import Experiment
from l2s_jax.experiment.workdir import read_config
from l2s_jax.training.on_policy import is_own

AS_IT_IS = ("--config.llm.train.steps=0", "--config.tokenizer.train_vocab_size=0")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Data, two LLMs, and a run of models that learn in all ways at once, with a cut vocabulary."""
    root = tmp_path_factory.mktemp("job")
    config = tiny.write_task(root / "data")
    texts = toy.write_task(str(root / "toy"))
    for family in ("t5", "gpt2"):
        toy.write_checkpoint(str(root / family), family=family, texts=texts)
    arguments = (
        *(f"--config.llm.path={root / 't5'}", *AS_IT_IS, "--config.scan_layers=true"),
        *("--config.slm.vocabulary=task", "--config.distillation.on_policy=0.5"),
        *("--config.distillation.weight=0.5", "--config.distillation.top_k=4"),
        "--config.evaluation.samples=0",
    )
    run = (f"--config={config}", f"--workdir={root / 'run'}", "--until=l2s")
    assert tiny.run(*run, *arguments) == 0
    return root


def test_the_slm_alone_and_l2s_learn_the_same_share_of_what_they_write(job):
    own = [is_own(step, 0.5, 0) for step in range(1, 5)]
    assert sum(own) == 2
    for stage in ("slm", "l2s"):
        lines = [line for line in metrics_of(job / "run", stage) if "grad_norm" in line]
        assert ["on_policy_loss" in line for line in lines] == own
        for line, is_written in zip(lines, own, strict=True):
            if is_written:
                assert line["on_policy_loss"] > 0 and 1 <= line["on_policy_tokens"] <= 32
                assert 0 <= line["on_policy_agreement"] <= 1 and line["on_policy_share"] == 1
            else:
                assert line["loss"] > 0.5 * line["divergence"] > 0
        record = json.loads((job / "run" / stage / "stage.json").read_text())
        assert record["on_policy"]["share"] == 0.5
    assert len(json.loads((job / "run/vocabulary/vocabulary.json").read_text())["kept"]) < 56


def test_what_is_on_policy_makes_the_models_stale_and_nothing_else(job):
    run = job / "run"
    assert {name: state for name, (state, _) in states(job).items() if name != "evaluation"} == (
        dict.fromkeys(("vocabulary", "logits", "slm", "l2s"), "done")
    )
    assert set(stale(job, **{"distillation.on_policy": 0.25})) - {"evaluation"} == {"slm", "l2s"}
    assert states(job, **{"distillation.on_policy": 0.25})["slm"] == (
        "stale",
        "on_policy.share changed",
    )
    config = read_config(str(run))
    config.distillation.on_policy = 0.0
    experiment = Experiment(config, str(run), "look")
    for stage in (experiment.slm, experiment.l2s):
        assert "on_policy" not in json.dumps(stage.inputs())
        assert stage.lessons.own_responses.load(stage.responses.tokenizer, stage.name) is None
        assert stage.lessons.own_responses.needs == ()


def test_an_adapted_decoder_only_llm_stays_the_one_that_scores(job, tmp_path, caplog):
    caplog.set_level("INFO")
    flags = (
        *(f"--config={job / 'data/tiny.py'}", f"--workdir={tmp_path / 'run'}", "--until=l2s"),
        *(f"--config.llm.path={job / 'gpt2'}", *AS_IT_IS, "--config.labels.source=llm"),
        *("--config.labels.max_new_tokens=8", "--config.distillation.on_policy=0.75"),
        *("--config.slm.lora.rank=2", "--config.slm.train.parameter_scale=False"),
        *("--config.llm.tune.rank=2", "--config.llm.tune.steps=2"),
        *("--config.l2s.train.parameter_scale=False", "--config.l2s.train.steps=2"),
        *(f"--config.features.cache={tmp_path / 'features'}", "--config.evaluation.samples=0"),
    )
    assert tiny.run(*flags) == 0
    for stage in ("slm", "l2s_frozen", "l2s"):
        assert any("on_policy_loss" in line for line in metrics_of(tmp_path / "run", stage))
        said = f"{stage}: answers the prompts of 75% of the batches itself, and the LLM reads"
        assert said in caplog.text
    assert not (tmp_path / "run/logits").exists()


def refused(capfd, *flags):
    """The one line that says why."""
    capfd.readouterr()
    assert tiny.run(*flags) == 2
    lines = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def test_bad_input_is_one_line_before_anything_is_made(job, tmp_path, capfd):
    run = tmp_path / "run"
    flags = (f"--config={job / 'data/tiny.py'}", f"--workdir={run}")
    for value in ("1", "-0.1"):
        line = refused(capfd, *flags, f"--config.distillation.on_policy={value}")
        assert "config.distillation.on_policy=" in line
        assert line.endswith("expected a number >= 0, below 1")
    flags += ("--config.distillation.on_policy=0.5",)
    line = refused(capfd, *flags, "--config.slm.tokenizer.train_vocab_size=30")
    assert (
        "config.distillation.on_policy=0.5 with config.slm.tokenizer.train_vocab_size=30: the SLM's"
    ) in line
    assert not run.exists()
    line = refused(capfd, *flags, f"--config.slm.path={job / 't5'}")
    assert "config.distillation.on_policy=0.5: the tokenizer of config.slm.path=" in line
    assert line.endswith(
        "makes other tokens than the LLM's, which reads what the SLM writes; "
        "expected an SLM with the LLM's tokenizer, or "
        "config.distillation.on_policy=0"
    )
    encoder = tmp_path / "encoder"
    shutil.copytree(job / "t5", encoder)
    path = encoder / "model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if k.startswith(("encoder.", "shared."))}
    save_file(tensors, path, {"format": "pt"})
    line = refused(capfd, *flags, f"--config.llm.path={encoder}", *AS_IT_IS)
    assert f"{encoder}: the model has no head or decoder" in line
    assert line.endswith("expected config.distillation.on_policy=0")
    assert not (run / "slm").exists() and not (run / "llm").exists()
