"""Exact decoding as users have it: in a run, from the command line, and from a model's folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
import weakref

import jax
import numpy as np
import pytest
import tiny

import l2s_jax
from l2s_jax.config import default
from l2s_jax.convert import main as convert
from l2s_jax.evaluation.generators import generator_of, side_by_side
from l2s_jax.experiment.early import check_models
from l2s_jax.experiment.experiment import Experiment
from l2s_jax.experiment.workdir import read_config
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.serving import bundle
from l2s_jax.serving.generator import Generator
from l2s_jax.settings.search import Search

EXACT = "--config.decoding.search.exact=true"


@pytest.fixture(scope="module")
def held():
    """System -> how many generators were in memory while it was asked for its quality."""
    return {}


@pytest.fixture(scope="module")
def run(tmp_path_factory, held):
    """(config, workdir) of a finished run whose report has the exact mode."""
    root = tmp_path_factory.mktemp("exact")
    config = tiny.write_task(root / "task")
    make, generate, alive = Generator.__init__, Generator.generate, weakref.WeakSet()

    def made(self, *args, **kwargs):
        alive.add(self)
        make(self, *args, **kwargs)

    def asked(self, *args, description="", **kwargs):
        held[description.removeprefix("evaluating ")] = len(alive)
        return generate(self, *args, description=description, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "__init__", made)
        patch.setattr(Generator, "generate", asked)
        assert tiny.run(f"--config={config}", f"--workdir={root / 'run'}", EXACT) == 0
    return config, root / "run"


def test_quality_is_measured_with_one_system_in_memory(run, held):
    assert held == dict.fromkeys(["llm", "slm", "l2s", "l2s_mismatched", "exact"], 1)


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_side_by_side_the_llm_is_in_memory_once(run, weights):
    _, workdir = run
    config = read_config(str(workdir))
    config.decoding.weights = weights
    experiment = Experiment(config, str(workdir), "find")
    found = side_by_side(experiment, exact=Search(exact=True))
    llm, encoder, of_exact = (
        {id(leaf) for leaf in jax.tree.leaves(params)}
        for params in (found["llm"].trained, found["l2s"].frozen, found["exact"].frozen)
    )
    assert encoder and encoder < llm == of_exact
    trained = (jax.tree.leaves(found[name].trained) for name in ("l2s", "exact"))
    assert all(one is other for one, other in zip(*trained, strict=True))
    # As it is by itself.
    alone, shared = generator_of(experiment, experiment.l2s).frozen, found["l2s"].frozen
    assert jax.tree.structure(alone) == jax.tree.structure(shared)
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(shared), strict=True):
        assert one.dtype == other.dtype and np.array_equal(one, other)


def responses(workdir, name):
    with open(workdir / "predictions" / f"{name}.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["response"] for line in file]


def prompts_of(config):
    with open(config.parent / "test.jsonl", encoding="utf-8") as file:
        return [f"reverse: {json.loads(line)['words']}" for line in file]


def test_a_report_has_the_exact_mode_beside_the_others(run):
    _, workdir = run
    report = json.loads((workdir / "report.json").read_text())
    exact, drafts = report["systems"]["exact"], report["systems"]["exact"]["drafts"]
    assert responses(workdir, "exact") == responses(workdir, "llm")
    assert exact["quality"] == report["systems"]["llm"]["quality"]
    assert drafts["against_llm"] == {"equal": 11, "of": 11, "different": []}
    assert 0 < drafts["acceptance"] <= 1 <= drafts["tokens_per_block"] <= 5
    assert len(drafts["acceptance_by_place"]) == 4
    assert drafts["times"]["block_tokens"] == 5
    assert exact["latency"]["total_ms"] > 0
    page = (workdir / "report.md").read_text()
    assert "## Exact decoding" in page and "11 of 11 texts are the LLM's own." in page


@pytest.mark.parametrize("flags", [["--system=exact"], ["--search=exact=true,draft_tokens=2"]])
def test_generate_says_what_the_llm_says(run, tmp_path, flags):
    config, workdir = run
    source, said = tmp_path / "prompts.txt", {}
    with open(config.parent / "test.jsonl", encoding="utf-8") as file:
        source.write_text("".join(f"{json.loads(line)['words']}\n" for line in file))
    for name, extra in (("exact", flags), ("llm", ["--system=llm"])):
        target = tmp_path / f"{name}.txt"
        assert not tiny.run(
            "--mode=generate", f"--workdir={workdir}", f"--input={source}", f"--output={target}",
            *extra,
        )  # fmt: skip
        said[name] = target.read_text()
    assert said["exact"] == said["llm"] and said["llm"].strip()


def test_a_folder_with_the_whole_llm_decodes_exactly_anywhere(run, tmp_path, capsys):
    config, workdir = run
    source, whole = str(workdir / "l2s" / "model"), str(tmp_path / "whole")
    assert not convert([f"--input={source}", f"--output={whole}", "--include-llm=whole"])
    encodes = str(tmp_path / "encodes")
    assert not convert([f"--input={source}", f"--output={encodes}", "--include-llm"])
    # Elsewhere, without the run that it is from.
    shutil.move(whole, tmp_path / "moved")
    prompts, expected = prompts_of(config), responses(workdir, "llm")
    model = l2s_jax.load(str(tmp_path / "moved"), exact=True)
    outputs = model.generate(prompts)
    assert [output.text for output in outputs] == expected
    assert all(output.drafts.blocks or output.tokens == 1 for output in outputs)
    assert "".join(model.stream(prompts[0])) == expected[0]
    stop = expected[0][1:3]
    (stopped,) = model.generate(prompts[:1], search=Search(stop=(stop,)))
    assert stopped.text == expected[0].split(stop)[0]
    assert stopped.drafts and len(stopped.drafts.tested) == 4
    # As the SLM's, the same folder answers as before.
    alone, before = (l2s_jax.load(path).generate(prompts) for path in (tmp_path / "moved", source))
    assert alone == before
    # What is whole stays so.
    assert not convert([f"--input={tmp_path / 'moved'}", f"--output={tmp_path / 'again'}"])
    again = l2s_jax.load(str(tmp_path / "again"), exact=True)
    assert [output.text for output in again.generate(prompts)] == expected

    with pytest.raises(ValueError, match=r"exact decoding asks all of it.*--include-llm=whole"):
        l2s_jax.load(encodes, exact=True)
    capsys.readouterr()
    target = str(tmp_path / "not")
    assert convert([f"--input={encodes}", f"--output={target}", "--include-llm=whole"]) == 2
    assert "exact decoding asks all of it" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        convert([f"--input={source}", f"--output={target}", "--include-llm=some"])
    with pytest.raises(ValueError, match="include_llm='all'"):
        bundle.copy(source, target, include_llm="all")


@pytest.mark.parametrize("other", ["tensor", "sequence"])
def test_on_a_mesh_the_text_is_the_same(run, other):
    config, workdir = run
    source, prompts = str(workdir / "l2s" / "model"), prompts_of(config)
    model = l2s_jax.load(source, exact=True, mesh={"data": 4, other: 2})
    texts = [output.text for output in model.generate(prompts)]
    assert texts == responses(workdir, "llm")


def test_what_exact_decoding_cannot_do_is_one_line(run):
    model = l2s_jax.load(str(run[1] / "l2s" / "model"))
    with pytest.raises(ValueError, match=r"load.*exact=True"):
        model.generate(["reverse: one"], search=Search(exact=True))
    with pytest.raises(ValueError, match="encoder_dtype='bfloat16' with exact=True"):
        l2s_jax.load(str(run[1] / "l2s" / "model"), exact=True, encoder_dtype="bfloat16")
    for search in (Search(exact=True), {"exact": True}):
        with pytest.raises(ValueError, match=r"exact=True: expected load.*exact=True"):
            l2s_jax.load(str(run[1] / "l2s" / "model"), search=search)
    exact = l2s_jax.load(str(run[1] / "l2s" / "model"), exact=True)
    for search, line in (
        ({"draft_tokens": 9}, "draft_tokens=9: expected at most the 8 new tokens"),
        ({"num_beams": 2, "exact": False}, "num_beams=2 with exact=True"),
    ):
        with pytest.raises(ValueError, match=line):
            exact.generate(["reverse: one"], search=Search(**{"exact": True, **search}))


def test_positions_of_a_draft_and_of_labels_are_asked_for_before_any_work():
    sizes = {"vocab_size": 64, "width": 16, "num_heads": 2, "num_layers": 1}
    models = {
        name: GPT2Config(**sizes, max_positions=40, pad_id=0, eos_id=1) for name in ("llm", "slm")
    }
    config = default()
    config.update(max_prompt_tokens=16, max_response_tokens=8)
    config.decoding.max_new_tokens = 20
    config.llm.path = "a checkpoint"
    check_models(config, models)
    config.decoding.search.update(exact=True, draft_tokens=4)
    check_models(config, models)
    config.decoding.search.draft_tokens = 5
    for name, where in (("llm", "a checkpoint"), ("slm", "config.slm.model")):
        wide = {key: dataclasses.replace(one, max_positions=41) for key, one in models.items()}
        check_models(config, wide)
        with pytest.raises(
            ValueError, match=rf"^{where}: .* 40 positions, .* need 41: .*draft_tok"
        ):
            check_models(config, wide | {name: models[name]})
    config.decoding.search.exact = False
    config.labels.update(source="llm", max_new_tokens=25)
    with pytest.raises(ValueError, match=r"need 41: lower .* or config\.labels\.max_new_tokens"):
        check_models(config, models)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--config.decoding.search.draft_tolerance=1.5"], "draft_tolerance=1.5"),
        (["--config.decoding.search.draft_tokens=0"], "draft_tokens=0"),
        (["--config.decoding.search.draft_tokens=9"], "expected at most"),
        (["--config.decoding.search.num_beams=2"], "num_beams=2 with exact=True"),
        (["--config.slm.tokenizer.train_vocab_size=30"], "one tokenizer for both"),
        (["--config.llm.tune.rank=2"], "the LLM that encodes is then not the one"),
        (["--config.labels.source=llm", "--config.labels.search.exact=true"], "makes labels alone"),
    ],
)
def test_a_config_that_cannot_be_exact_is_refused_before_any_work(flags, line, tmp_path, capsys):
    config = tiny.write_task(tmp_path / "task")
    workdir = tmp_path / "run"
    assert tiny.run(f"--config={config}", f"--workdir={workdir}", EXACT, *flags) == 2
    (error,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error:")]
    assert line in error
    assert not workdir.exists()
