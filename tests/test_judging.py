"""What a system says while it trains: as it says it afterwards, scored, chosen by, and shown."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import small
import tiny

from l2s_jax.config import default
from l2s_jax.data.examples import TokenizedExamples
from l2s_jax.data.table import Example
from l2s_jax.evaluation import metrics
from l2s_jax.experiment import judging, toy
from l2s_jax.experiment.experiment import Experiment
from l2s_jax.experiment.workdir import read_config
from l2s_jax.models.lora import Lora
from l2s_jax.serving.generator import Generator
from l2s_jax.serving.loading import load_generator

PROMPTS = [prompt for prompt, _ in small.random_pairs(7, 5)]
EXAMPLES = [Example(prompt, f"right {i}", (f"right {i}",)) for i, prompt in enumerate(PROMPTS)]


def make_data():
    return TokenizedExamples(
        [Example(prompt, "", ()) for prompt in PROMPTS],
        prompt_tokenizer=small.NumberTokenizer(),
        response_tokenizer=small.NumberTokenizer(),
        max_prompt_tokens=8,
        max_response_tokens=8,
    )


def make_judge(system, data, mesh, score=None):
    return judging.Judge(
        system,
        data,
        EXAMPLES,
        widths=(4, 8),
        most_rows=3,
        max_new_tokens=6,
        mesh=mesh,
        samples=2,
        score=score,
    )


def answers(system, trained, frozen):
    tokenizer = small.NumberTokenizer()
    generator = Generator(
        *(system, trained, frozen, tokenizer, tokenizer),
        prompt_lengths=(8,),
        max_new_tokens=6,
        batch_size=8,
    )
    return [output.text for output in generator.generate(PROMPTS)]


class Kept:
    """H of prompts, as a cache has it."""

    def __init__(self, system, frozen, data):
        self.arguments = system, frozen, data

    def padded(self, indices, prompt_tokens):
        system, frozen, data = self.arguments
        ids, mask = data.padded_prompts(indices, prompt_tokens)
        hidden = np.array(jax.jit(system.encode)({}, frozen, ids, mask))
        return np.where(mask[..., None], hidden, 0)


@pytest.mark.parametrize("kind", ["slm", "add", "lora", "hidden", "mesh"])
def test_a_judge_hears_what_a_generator_says(kind):
    system = small.make_system("slm" if kind == "slm" else "add")
    trained, frozen = small.make_params(system)
    data, mesh = make_data(), small.mesh_of(*((2, 2, 1) if kind == "mesh" else (1, 1, 1)))
    told = []

    def score(examples, responses):
        assert examples == EXAMPLES
        told.extend(responses)
        return 12.5

    expected = answers(system, trained, frozen)
    assert len(set(expected)) > 2
    if kind == "lora":
        system = Lora(system, rank=2, alpha=8.0, pattern=".*query/kernel")
        trained, base = system.split(trained, jax.random.key(0))
        frozen = {"base": base, "inner": frozen}
    if kind == "hidden":
        data.hidden = Kept(system, frozen, data)
        frozen = {}
    with jax.set_mesh(mesh):
        found = make_judge(system, data, mesh, score)(trained, frozen)
    assert told == expected
    assert found.scores == {"val_quality": 12.5}
    assert found.samples == [
        {"prompt": PROMPTS[i], "reference": f"right {i}", "response": expected[i]} for i in (0, 1)
    ]
    with jax.set_mesh(mesh):
        assert make_judge(system, data, mesh)(trained, frozen).scores == {}


def test_more_answers_for_people_to_read_change_no_score():
    system, mesh = small.make_system("slm"), small.mesh_of(1, 1, 1)
    trained, frozen = small.make_params(system)
    config, told = default(), []
    config.slm.train.update(select="quality", selection_examples=3)
    config.evaluation.samples = 5
    config.decoding.max_new_tokens = 6

    def score(examples, responses):
        told.append((examples, responses))
        return 12.5

    context = SimpleNamespace(config=config, score=score, buckets=((4, 4), (8, 8)), mesh=mesh)
    judge = judging.make(context, config.slm.train, system, make_data(), EXAMPLES)
    with jax.set_mesh(mesh):
        found = judge(trained, frozen)
    assert told == [(EXAMPLES[:3], answers(system, trained, frozen)[:3])]
    assert len(found.samples) == 5


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The folder of a run up to the SLM, which is chosen by chrF on what it says."""
    root = tmp_path_factory.mktemp("job")
    config = tiny.write_task(root / "data")
    texts = toy.write_task(str(root / "toy"))
    toy.write_checkpoint(str(root / "llm"), family="t5", texts=texts)
    arguments = (
        f"--config.llm.path={root / 'llm'}",
        "--config.llm.train.steps=0",
        "--config.tokenizer.train_vocab_size=0",
        "--config.evaluation.metrics=('chrf', 'bleu')",
        "--config.evaluation.validation_examples=7",
        "--config.slm.train.selection_examples=6",
        "--config.evaluation.samples=2",
        "--config.slm.train.select=quality",
        "--config.slm.train.steps=24",
        "--config.slm.train.evaluate_every=6",
    )
    command = (f"--config={config}", f"--workdir={root / 'run'}", "--until=slm", *arguments)
    assert tiny.run(*command) == 0
    return root


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_model_is_that_of_the_best_score_on_the_primary_metric(job):
    lines = [line for line in lines_of(job / "run/slm/metrics.jsonl") if "val_quality" in line]
    assert [line["step"] for line in lines] == [6, 12, 18, 24]
    best = max(line["val_quality"] for line in lines)
    assert min(line["val_quality"] for line in lines) < best
    rows = lines_of(job / "data/validation.jsonl")[:6]
    generator = load_generator(read_config(str(job / "run")), str(job / "run"), "slm")
    outputs = generator.generate([f"reverse: {row['words']}" for row in rows])
    # Its responses are compared with the data's own, not with the labels.
    references = [[row["reversed"]] for row in rows]
    found = metrics.measure(["chrf"], [output.text for output in outputs], references).quality
    assert found["chrf"] == pytest.approx(best, abs=1e-3)


def test_samples_are_written_at_each_validation(job):
    rows = lines_of(job / "data/validation.jsonl")[:2]
    samples = lines_of(job / "run/slm/samples.jsonl")
    assert [sample["step"] for sample in samples] == [6, 6, 12, 12, 18, 18, 24, 24]
    for sample, row in zip(samples, rows * 4, strict=True):
        assert sample["prompt"] == f"reverse: {row['words']}"
        assert sample["reference"] == row["reversed"]


def test_what_a_checkpoint_is_chosen_by_makes_it_another(job):
    def state(**changes):
        config = read_config(str(job / "run"))
        with config.unlocked():
            config.update_from_flattened_dict(changes)
        return Experiment(config, str(job / "run"), "look").slm.state()

    assert state(**{"evaluation.samples": 0, "evaluation.metrics": ("chrf",)}) == ("done", "")
    for key, value, why in (
        ("slm.train.selection_examples", 5, "train.selection_examples"),
        ("slm.train.select", "best", "selection, train.select"),
        ("evaluation.metrics", ("exact_match",), "selection.metric"),
        ("decoding.max_new_tokens", 9, "selection.max_new_tokens"),
    ):
        state_of, changed = state(**{key: value})
        assert state_of == "stale" and why in changed


def test_other_references_choose_another_checkpoint(job, tmp_path):
    shutil.copytree(job, tmp_path / "job")
    config, run = read_config(str(job / "run")), tmp_path / "job/run"
    config.task.data_dir = str(tmp_path / "job/data")
    config.task.references = "more"
    path = tmp_path / "job/data/validation.jsonl"

    def state(more):
        rows = [row | {"more": more} for row in lines_of(path)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Experiment(config, str(run), "look").slm.state()

    assert state([]) == ("done", "")
    assert state(["also right"]) == ("stale", "selection.references changed")
    # What had no record of them is taken as found.
    record = json.loads((run / "slm/stage.json").read_text())
    del record["sha256"], record["selection"]["references"]
    (run / "slm/stage.json").write_text(json.dumps(record))
    assert state(["also right"]) == ("done", "")


def test_a_metric_that_is_not_there_is_one_line_before_any_work(tmp_path, capfd):
    config, workdir = tiny.write_task(tmp_path / "data"), tmp_path / "run"
    arguments = (
        "--until=slm",
        "--config.slm.train.select=quality",
        "--config.evaluation.metrics=('comet', 'bleu')",
        "--config.evaluation.comet=nowhere",
    )
    assert tiny.run(f"--config={config}", f"--workdir={workdir}", *arguments) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: config.evaluation.comet='nowhere': expected a checkpoint of")
    assert not workdir.exists()


def test_a_choice_by_quality_needs_a_way_to_score():
    with pytest.raises(ValueError, match=r'train\.select="quality": expected Experiment'):
        config = default()
        config.slm.train.select = "quality"
        context = SimpleNamespace(config=config, score=None)
        judging.make(context, config.slm.train, None, None, EXAMPLES)
