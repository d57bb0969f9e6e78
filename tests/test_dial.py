"""The dial: quality and likeness to the LLM's text against time, from one command."""

from __future__ import annotations

import json
import re
import shutil

import hf
import pytest
import tiny
import transformers
from sacrebleu.metrics.chrf import CHRF

from l2s_jax import sealed
from l2s_jax.evaluation import dial_report
from l2s_jax.experiment.experiment import Experiment
from l2s_jax.experiment.workdir import read_config
from l2s_jax.tokenizers.sentencepiece import train_sentencepiece

# So trained, LLM and L2S say different things.
DIFFERENT = [
    f"--config.llm.train.{setting}"
    for setting in ("steps=40", "learning_rate=0.01", "evaluate_every=40")
]
FILES = ("dial.json", "dial.md", "dial.png", "dial.svg")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, workdir, what the dial printed) of a run, its dial, then its report."""
    root = tmp_path_factory.mktemp("dial")
    config = tiny.write_task(root / "task")
    source = config.read_text()
    dials = "    config.evaluation.update(dial=(1, 0.0), dial_requests=3)\n    return config\n"
    config.write_text(source.replace("    return config\n", dials))
    workdir = root / "run"
    command = (f"--config={config}", f"--workdir={workdir}", *DIFFERENT)
    assert tiny.run(*command, "--until=l2s") == 0
    assert tiny.run("--mode=dial", f"--workdir={workdir}") == 0
    assert not (workdir / "report.json").exists()
    assert tiny.run("--mode=evaluate", f"--workdir={workdir}") == 0
    return config, workdir


def dial_of(workdir):
    return json.loads((workdir / "dial.json").read_text())


def responses(workdir, name):
    with open(workdir / "predictions" / f"{name}.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["response"] for line in file]


def test_tolerances_lie_between_the_llm_and_l2s(run):
    _, workdir = run
    dial = dial_of(workdir)
    llm, exact, loose, l2s = dial["points"]
    assert [(p["system"], p["tolerance"]) for p in dial["points"]] == [
        ("llm", None), ("exact", 0.0), ("exact", 1.0), ("l2s", None)
    ]  # fmt: skip
    # What the report's systems say, each by itself.
    said = {name: responses(workdir, name) for name in ("llm", "l2s")}
    assert said["llm"] != said["l2s"]
    report = json.loads((workdir / "report.json").read_text())
    for ends, name in (((llm, exact), "llm"), ((l2s, loose), "l2s")):
        same = [one == other for one, other in zip(said[name], said["llm"], strict=True)]
        chrf = CHRF().corpus_score(said[name], [said["llm"]]).score
        for point in ends:
            assert point["quality"] == report["systems"][name]["quality"]
            assert point["against_llm"]["equal_share"] == pytest.approx(sum(same) / len(same))
            assert point["against_llm"]["chrf"] == pytest.approx(chrf)
            assert point["cut_share"] == report["systems"][name]["cut_share"]
    assert loose["drafts"]["acceptance"] == 1 > exact["drafts"]["acceptance"]
    assert loose["drafts"]["tokens_per_block"] > exact["drafts"]["tokens_per_block"] >= 1
    assert llm["drafts"] is None is l2s["drafts"]
    assert all(p["request_ms"] > 0 <= p["compile_s"] for p in dial["points"])
    assert dial["task"]["examples"] == 11 and dial["task"]["requests"] == 3


def test_the_page_ends_with_what_it_concludes_and_the_report_shows_it(run):
    _, workdir = run
    assert all((workdir / name).stat().st_size for name in FILES)
    last = (workdir / "dial.md").read_text().splitlines()[-1]
    dial = dial_of(workdir)
    metric, whole = dial["task"]["metric"], dial["points"][0]["quality"]["bleu"]
    kept = [p for p in dial["points"][1:-1] if p["quality"][metric] >= 0.995 * whole]
    fastest = min(kept, key=lambda point: point["request_ms"])["tolerance"]
    assert last.startswith(f"Draft tolerance {fastest:g} is the fastest that keeps at least 99.5%")
    page = (workdir / "report.md").read_text()
    shown = f"## The dial\n\n{last} It was measured on 11 examples of `test`. All of it: "
    assert shown in page and "(dial.png)" in page


def test_a_dial_of_other_examples_and_another_decoding_says_so_in_the_report(run, tmp_path):
    _, workdir = run
    shutil.copytree(workdir, tmp_path / "run")
    config = read_config(str(workdir))
    config.evaluation.update(split="validation", max_examples=5)

    def shown():
        experiment = Experiment(config, str(tmp_path / "run"), "find")
        return dial_report.found(experiment).partition(" It was measured on ")[2]

    assert shown() == "11 examples of `test`."
    config.decoding.max_new_tokens = 7
    config.decoding.search.update(repetition_penalty=1.5, draft_tokens=2)
    both = "`decoding.max_new_tokens`, `decoding.search.repetition_penalty`"
    assert shown() == f"11 examples of `test`, with another {both} than above."
    # A dial of before knows the search alone.
    dial = dial_of(workdir)
    del dial["decoding"]
    (tmp_path / "run/dial.json").write_text(json.dumps(dial))
    assert shown() == (
        "11 examples of `test`, with another `decoding.search.repetition_penalty` than above."
    )


def test_a_report_of_before_gets_the_dial_and_other_models_drop_it(run, tmp_path):
    _, workdir = run
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    for name in FILES:
        (copy / name).unlink()
    before = json.loads((copy / "report.json").read_text())
    conclusion = before.pop("dial")
    (copy / "report.json").write_text(json.dumps(before))
    (copy / "report.md").write_text("of before")
    assert tiny.run("--mode=dial", f"--workdir={copy}") == 0
    after = json.loads((copy / "report.json").read_text())
    assert after.pop("dial").split()[0] == conclusion.split()[0] == "Draft" and after == before
    assert "(dial.png)" in (copy / "report.md").read_text()

    (weights,) = (copy / "l2s" / "model").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-4] ^= 1  # the least bit of the last number
    weights.write_bytes(content)
    (weights.parent / sealed.SUMS).unlink()  # other models, not damaged ones
    experiment = Experiment(read_config(str(copy)), str(copy), "find")
    assert dial_report.found(experiment) == ""
    assert tiny.run("--mode=evaluate", f"--workdir={copy}") == 0
    assert "dial" not in json.loads((copy / "report.json").read_text())
    assert "dial" not in (copy / "report.md").read_text()
    # A dial that can't be read is none.
    (copy / "dial.json").write_text("{")
    assert dial_report.found(experiment) == ""


def refused(capfd, *flags):
    """The one line that says why."""
    capfd.readouterr()
    assert tiny.run("--mode=dial", *flags) == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error:")]
    return line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "no such stage; expected the workdir of a finished run"),
        (("--until=l2s",), "--until=l2s: expected --mode=train, not dial"),
        (("--vary=seed=0",), "--vary=seed=0: expected --mode=compare, not dial"),
        (("--config.llm.tune.rank=2",), "--mode=dial with config.llm.tune.rank=2: the LLM that"),
        (("--config.slm.tokenizer.train_vocab_size=30",), "expected one tokenizer for both"),
        (("--config.decoding.search.num_beams=2",), "--mode=dial with config.decoding.search.num"),
        (("--config.decoding.max_new_tokens=3",), "draft_tokens=4: expected at most config.deco"),
        (("--config.evaluation.dial=(0.0,1.5)",), "config.evaluation.dial=(0.0, 1.5): expected"),
        (("--config.evaluation.dial=()",), "config.evaluation.dial=(): expected numbers from 0"),
        (("--config.evaluation.dial=(True,)",), "config.evaluation.dial=(True,): expected numb"),
        (("--config.evaluation.dial_requests=0",), "config.evaluation.dial_requests=0: expected"),
    ],
)
def test_what_has_no_dial_is_one_line(flags, words, tmp_path, capfd):
    config = tiny.write_task(tmp_path / "task")
    workdir = tmp_path / "run"
    assert words in refused(capfd, f"--config={config}", f"--workdir={workdir}", *flags)
    assert not (workdir / "dial.json").exists()


CHANGES = """

base_config = get_config


def get_config():
    config = base_config()
    config.llm = default().llm
    config.llm.path = "PATH"
    config.tokenizer.train_vocab_size = 0
    return config
"""


@pytest.mark.parametrize("kind", ["encoder", "two tokenizers"])
def test_models_that_have_no_dial_are_one_line(kind, tmp_path, capfd):
    llm, slm = tmp_path / "llm", tmp_path / "slm"
    model = hf.make_t5(str(llm), vocab_size=30)
    hf.make_t5(str(slm), vocab_size=30)
    if kind == "encoder":
        part = transformers.T5EncoderModel(model.config)
        part.load_state_dict(model.state_dict(), strict=False)
        shutil.rmtree(llm)
        part.save_pretrained(llm)
    text = [*tiny.WORDS, "reverse:"]
    train_sentencepiece(text, vocab_size=24, directory=str(llm))
    train_sentencepiece(text, vocab_size=25, directory=str(slm))
    config = tiny.write_task(tmp_path / "task")
    config.write_text(config.read_text() + CHANGES.replace("PATH", str(llm)))
    flags = [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    if kind == "encoder":
        line = refused(capfd, *flags)
        assert f"--mode=dial: {llm}: the model has no head or decoder to decide with" in line
    else:
        line = refused(capfd, *flags, f"--config.slm.path={slm}")
        assert f"--mode=dial: the tokenizer of config.slm.path='{slm}' makes other tokens" in line


def point(system, tolerance, quality, ms):
    return {
        "system": system, "tolerance": tolerance, "quality": {"bleu": quality}, "cut_share": 0.0,
        "against_llm": {"equal_share": 0.5, "chrf": 80.0}, "new_tokens": 9.0, "request_ms": ms,
        "compile_s": 1.0, "drafts": None,
    }  # fmt: skip


def made_up(*points):
    task = dict.fromkeys(("name", "split", "likeness_signature"), "x")
    task |= {"examples": 4, "requests": 2, "metric": "bleu", "metric_signatures": {"bleu": "x"}}
    environment = {"device": "a CPU", "dtype": "float32", "encoder_dtype": "float32"}
    return {
        "task": task, "models": {"llm": "a", "l2s": "b"}, "search": {"draft_tokens": 4},
        "points": list(points), "environment": environment,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("qualities", "words"),
    [
        ((40.0, 40.0, 39.9, 39.7), "Draft tolerance 0.5 is the fastest that keeps at least 99.5%"),
        ((40.0, 40.0, 39.7, 39.9), "Draft tolerance 0.9 is the fastest that keeps at least 99.5%"),
        ((40.0, 39.7, 39.7, 39.7), "No draft tolerance of 0, 0.5, 0.9 keeps at least 99.5% of"),
        ((0.0, 0.0, 0.0, 0.0), "The LLM scores no BLEU for a draft tolerance to keep."),
    ],
)
def test_the_conclusion_is_the_fastest_that_keeps_enough(qualities, words, tmp_path):
    llm, *drafted = qualities
    points = [
        point("exact", tolerance, quality, ms)
        for tolerance, quality, ms in zip((0, 0.5, 0.9), drafted, (80, 60, 50), strict=True)
    ]
    dial = made_up(point("llm", None, llm, 100), *points, point("l2s", None, 0.1, 20))
    dial_report.write(dial, str(tmp_path))
    page = (tmp_path / "dial.md").read_text()
    assert page.splitlines()[-1].startswith(words)
    assert re.search(r"^\| 0\.9 .* 2\.00.*\|$", page, re.MULTILINE)
    assert re.search(r"^\| L2S .* 5\.00.*\|$", page, re.MULTILINE)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


def test_a_dial_that_lacks_something_is_not_written(tmp_path):
    whole = made_up(
        point("llm", None, 1, 9), point("exact", 0, 1, 8), point("l2s", None, 1, 7)
    )  # fmt: skip
    del whole["points"][1]["request_ms"]
    with pytest.raises(ValueError, match=r"missing key dial\.points\[1\]\.request_ms"):
        dial_report.write(whole, str(tmp_path))
    with pytest.raises(ValueError, match=r"expected llm, exact, \.\.\., l2s"):
        dial_report.write(made_up(point("llm", None, 1, 9)), str(tmp_path))
    assert not list(tmp_path.iterdir())
