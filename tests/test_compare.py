"""A grid by its command: every stage once, continued, and a table that the answers bear out."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from sacrebleu.metrics.bleu import BLEU

from l2s_jax.evaluation import compare_report, evaluate, significance
from l2s_jax.training import loop

VARY = ("--vary=l2s.fusion=add,cross", "--vary=seed=0,1")
# Answers while training would only take time.
OVERRIDES = ("--config.evaluation.samples=0",)
VARIANTS = [f"l2s.fusion={fusion},seed={seed}" for fusion in ("add", "cross") for seed in (0, 1)]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(config, workdir, names of the trainings) of a finished grid, begun as an ordinary run."""
    root = tmp_path_factory.mktemp("job")
    config = tiny.write_task(root / "data")
    command = (f"--config={config}", f"--workdir={root / 'grid'}", *OVERRIDES)
    assert tiny.run(*command, "--until=llm") == 0
    fitted = []
    fit = loop.fit

    def counted(*args, directory, **kwargs):
        fitted.append(os.path.basename(directory))
        return fit(*args, directory=directory, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "fit", counted)
        assert tiny.run(*command, "--mode=compare", *VARY) == 0
    return config, root / "grid", fitted


@pytest.fixture
def copy(job, tmp_path):
    """(arguments of the command, workdir) of a copy, in which links are links."""
    config, workdir, _ = job
    shutil.copytree(workdir, tmp_path / "grid", symlinks=True)
    command = (f"--config={config}", f"--workdir={tmp_path / 'grid'}", *OVERRIDES)
    return (*command, "--mode=compare", *VARY), tmp_path / "grid"


def report_of(workdir):
    return json.loads((workdir / "compare.json").read_text())


def row_of(report, system, **settings):
    settings = {key.replace("_", "."): value for key, value in settings.items()}
    (row,) = (
        row
        for row in report["rows"]
        if row["system"] == system and settings.items() <= row["settings"].items()
    )
    return row


def predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def bleu(records):
    references = [[record["references"][0] for record in records]]
    return BLEU().corpus_score([record["response"] for record in records], references).score


def times(folder):
    """When each file of a model was written."""
    return {path: path.stat().st_mtime_ns for path in sorted(folder.glob("**/model/*"))}


def test_each_model_is_trained_once_and_shared(job):
    _, workdir, fitted = job
    # The LLM is that of the ordinary run; the SLM alone does not know of fusion.
    assert sorted(fitted) == ["l2s"] * 4 + ["slm"] * 2
    assert {path.name for path in (workdir / "compare").iterdir()} == set(VARIANTS)
    folders = {
        stage: {os.path.realpath(workdir / "compare" / name / stage) for name in VARIANTS}
        for stage in ("tokenizer", "llm", "slm", "l2s")
    }
    assert folders["llm"] == {os.path.realpath(workdir / "llm")}
    assert folders["tokenizer"] == {os.path.realpath(workdir / "tokenizer")}
    assert [len(folders[name]) for name in ("slm", "l2s")] == [2, 4]
    # Seeds are of the SLM's side, from its random parameters on.
    seeds = {
        json.loads((workdir / "compare" / name / stage / "stage.json").read_text())["seed"]
        for name in VARIANTS
        for stage in ("slm", "l2s")
    }
    assert seeds == {0, 1}


def test_rows_are_systems_that_differ_with_what_their_answers_say(job):
    _, workdir, _ = job
    report = report_of(workdir)
    assert [(row["system"], row["settings"], row["is_base"]) for row in report["rows"]] == [
        ("llm", {}, False),
        ("slm", {}, False),
        ("l2s", {"l2s.fusion": "add"}, True),
        ("l2s", {"l2s.fusion": "cross"}, False),
    ]
    assert [len(row["answers"]) for row in report["rows"]] == [1, 2, 2, 2]
    assert (report["seeds"], report["base"]) == ([0, 1], {"l2s.fusion": "add"})
    for row in report["rows"]:
        scores = []
        for folder in row["answers"]:
            records = predictions(workdir / folder)
            assert len(records) == 11
            scores.append(bleu(records))
        quality = row["quality"]["bleu"]
        assert quality["seeds"] == pytest.approx(scores)
        assert quality["mean"] == pytest.approx(statistics.fmean(scores))
        if len(scores) > 1:
            assert quality["sd"] == pytest.approx(np.std(scores, ddof=1))
        else:
            assert quality["sd"] is None
        assert row["latency"]["batch_size"] == 1 and row["latency"]["total_ms"] > 0
        assert row["params_read_per_token"] > 0


def test_the_difference_to_the_base_is_that_of_means_over_seeds(job):
    _, workdir, _ = job
    report = report_of(workdir)
    base, other = row_of(report, "l2s", l2s_fusion="add"), row_of(report, "llm")
    assert base["against_base"]["quality"] == {} and base["against_base"]["request_time"] == 1
    found = other["against_base"]["quality"]["bleu"]
    means = [row["quality"]["bleu"]["mean"] for row in (other, base)]
    assert found["difference"] == pytest.approx(means[0] - means[1])
    assert other["against_base"]["request_time"] == pytest.approx(
        other["latency"]["total_ms"] / base["latency"]["total_ms"]
    )
    answers = [[predictions(workdir / folder) for folder in r["answers"]] for r in (other, base)]
    assert [len(of_seeds) for of_seeds in answers] == [1, 2]
    rng = np.random.default_rng(significance.SEED)
    samples = []
    for _ in range(significance.RESAMPLES):
        drawn = rng.choice(11, size=11)
        one, two = (
            statistics.fmean(bleu([records[i] for i in drawn]) for records in of_seeds)
            for of_seeds in answers
        )
        samples.append(one - two)
    assert [found["low"], found["high"]] == pytest.approx(np.percentile(samples, [2.5, 97.5]))
    assert found["low"] < found["high"]
    shifted = np.abs(np.array(samples) - found["difference"])
    beyond = (shifted >= abs(found["difference"]) - 1e-9).sum()
    assert found["p"] == pytest.approx((beyond + 1) / (significance.RESAMPLES + 1))


def test_people_read_a_table_and_a_plot(job):
    _, workdir, _ = job
    page, report = (workdir / "compare.md").read_text(), report_of(workdir)
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    for number, (row, line) in enumerate(zip(report["rows"], lines[2:], strict=False), 1):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        name, seeds = compare_report.row_name(row), len(row["answers"])
        assert cells[:3] == [str(number), name, str(seeds)]
        assert cells[3].startswith(f"{row['quality']['bleu']['mean']:.1f}")
        assert ("±" in cells[3]) == (seeds > 1)
    assert "standard deviation (n - 1)" in page and "2 seeds" in page
    assert (workdir / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (workdir / "compare.svg").read_bytes()


def test_a_variant_is_a_workdir(job, copy, capfd, tmp_path):
    _, workdir = copy
    variant = workdir / "compare" / VARIANTS[2]
    assert tiny.run(f"--workdir={variant}", "--mode=status") == 0
    states = [line.split()[:2] for line in capfd.readouterr().out.splitlines()]
    assert [state for state in states if state[0] != "evaluation"] == [
        [name, "done"] for name in ("tokenizer", "llm", "slm", "l2s")
    ]
    config, _, _ = job
    output = tmp_path / "out.jsonl"
    source = f"--input={config.parent / 'test.jsonl'}"
    generate = (f"--workdir={variant}", "--mode=generate", source, f"--output={output}")
    assert tiny.run(*generate) == 0
    answers = [json.loads(line)["response"] for line in output.read_text().splitlines()]
    assert answers == [record["response"] for record in predictions(variant / "answers_l2s")]
    assert tiny.run(f"--workdir={variant}", "--mode=evaluate") == 0
    report = json.loads((variant / "report.json").read_text())
    row = row_of(report_of(workdir), "l2s", l2s_fusion="cross")
    assert report["systems"]["l2s"]["quality"]["bleu"] == row["quality"]["bleu"]["seeds"][0]


def test_a_killed_grid_goes_on_where_it_was(copy, monkeypatch):
    command, workdir = copy
    variant = workdir / "compare" / VARIANTS[3]
    for stage in ("l2s", "answers_l2s"):
        shutil.rmtree(os.path.realpath(variant / stage))
        os.remove(variant / stage)
    expected = report_of(workdir)
    (workdir / "compare.json").unlink()
    before = times(workdir)
    environment = os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(__file__))}
    process = subprocess.Popen(
        [sys.executable, "-m", "l2s_jax.main", *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # It ends at its first checkpoint, or a little later.
    while process.poll() is None and not (variant / "l2s/checkpoints/2").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (variant / "l2s/checkpoints").exists()
    assert not (workdir / "compare.json").exists()
    latency, timed = evaluate.latency, []

    def seen(generators, *args):
        timed.append(generators)
        return latency(generators, *args)

    monkeypatch.setattr(evaluate, "latency", seen)
    assert tiny.run(*command) == 0
    after = times(workdir)
    assert {path: after[path] for path in before} == before
    found = report_of(workdir)
    for one, other in zip(found["rows"], expected["rows"], strict=True):
        assert one["quality"] == other["quality"]
        assert one["answers"] == other["answers"]
    # All are timed together, and have the same LLM in memory once.
    (generators,) = timed
    assert len(generators) == len(found["rows"])
    _, _, add, cross = (jax.tree.leaves(one.frozen) for one in generators.values())
    assert add and all(one is other for one, other in zip(add, cross, strict=True))


def test_a_variant_that_fails_says_its_name_and_the_others_stay(copy, capfd, monkeypatch):
    command, workdir = copy
    variant = workdir / "compare" / VARIANTS[2]
    (os.remove(variant / "l2s"), os.remove(variant / "answers_l2s"))
    before = times(workdir)
    shutil.rmtree(workdir / "shared" / os.path.basename(os.path.realpath(variant / "slm")))
    before = {path: when for path, when in times(workdir).items() if path in before}

    def fails(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(loop, "fit", fails)
    assert tiny.run(*command) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error == f"error: variant {VARIANTS[0]}: no space left on device"
    assert times(workdir) == before


def test_vary_belongs_to_compare(tmp_path, capfd):
    assert tiny.run(f"--workdir={tmp_path}", "--mode=status", "--vary=seed=0") == 2
    assert "--vary=seed=0: expected --mode=compare, not status" in capfd.readouterr().err
