"""On-policy distillation in whole runs: what is trained, what is stale, bad input."""

import json
import shutil
from unittest import mock

import jax
import pytest
import small
import tiny
from safetensors.numpy import load_file, save_file
from test_distillation_run import metrics_of
from test_stages import stale, states

from l2s_jax.checkpoints import pretrained
from l2s_jax.cluster.paths import path_name
from l2s_jax.experiment import toy
from l2s_jax.experiment.experiment import Experiment
from l2s_jax.experiment.workdir import read_config
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.models.systems import LanguageModel
from l2s_jax.training import loop
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


def names_of(tree, there):
    """Paths of the leaves of a tree that are the very arrays of another, and of the others."""
    held = {id(leaf) for leaf in jax.tree.leaves(there)}
    found = jax.tree_util.tree_leaves_with_path(tree)
    same = {path_name(path) for path, leaf in found if id(leaf) in held}
    return same, {path_name(path) for path, _ in found} - same


def test_what_encodes_is_in_memory_once_beside_the_llm_that_scores(job, tmp_path):
    shutil.copytree(job / "run", tmp_path / "run")
    config = read_config(str(tmp_path / "run"))
    # So that the stage is made anew.
    config.l2s.train.steps = 5
    with mock.patch.object(loop, "fit", side_effect=small.Stop) as fit, pytest.raises(small.Stop):
        Experiment(config, str(tmp_path / "run")).l2s.make()
    (_, frozen, *_), policy = fit.call_args.args, fit.call_args.kwargs["policy"]
    assert set(frozen) == {"token_embedding", "encoder"}
    assert names_of(frozen, policy.params)[1] == set()


@pytest.mark.parametrize(
    ("layer", "settings", "apart"),
    [
        (0, {}, ()),
        (2, {}, ()),
        (0, {"scan_layers": True}, ()),
        # Half of the layers are no part of a stack of all.
        (2, {"scan_layers": True}, ("layers",)),
        # The table is the head's too, which has the dtype of products.
        (2, {"dtype": "bfloat16"}, ("token_embedding",)),
        (2, {"encoder_dtype": "bfloat16"}, ("layers_0", "layers_1")),
    ],
)
def test_what_lies_in_another_way_is_read_apart(job, layer, settings, apart, tmp_path):
    sizes = {"vocab_size": 56, "width": 16, "num_heads": 2, "num_layers": 4, "max_positions": 64}
    llm = GPT2Config(**sizes, pad_id=0, eos_id=1)
    params = small.random_like(jax.eval_shape(LanguageModel("slm", llm).init, jax.random.key(0)))
    pretrained.save_native(llm, params["slm"], str(tmp_path / "gpt2"))
    config = read_config(str(job / "run"))
    config.llm.update(path=str(tmp_path / "gpt2"), layer=float(layer))
    config.llm.encoder_dtype = settings.get("encoder_dtype", "auto")
    config.dtype = settings.get("dtype", "float32")
    config.scan_layers = settings.get("scan_layers", False)
    stage = Experiment(config, str(tmp_path / "run")).llm
    whole = pretrained.load(
        stage.directory,
        dtype=stage.context.dtypes[0],
        weights="float",
        mesh=stage.context.mesh,
        scan_layers=config.scan_layers,
    )[1]
    module, expected = stage.encoder(entries=None)
    config_of, found = stage.encoder(entries=None, whole=whole)
    assert config_of.config == module.config
    small.assert_same(found, expected)
    assert jax.tree.map(lambda x: (x.dtype, x.sharding), found) == (
        jax.tree.map(lambda x: (x.dtype, x.sharding), expected)
    )
    same, other = names_of(found, whole)
    assert {name.split("/")[0] for name in other} == set(apart)
    assert not {name.split("/")[0] for name in same} & set(apart)
    # Where H is kept, training reads the table alone.
    table = stage.encoder(entries=("token_embedding",), whole=whole)[1]
    small.assert_same(table, {"token_embedding": expected["token_embedding"]})


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
