"""Paired tests of systems: sacreBLEU's of BLEU and chrF, our own of means over examples."""

import random

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import PairedTest
from scipy import stats

from l2s_jax.evaluation import metrics, significance

WORDS = ["a", "dog", "runs", "over", "the", "grass", "with", "one", "red", "ball", "and", "two"]
NAMES = ("bleu", "chrf", "rouge1", "exact_match")
FOUND = {"difference", "low", "high", "p", "test"}


def texts(count, share, seed, rows):
    """`rows` with a share of their words replaced."""
    rng = random.Random(seed)
    return [
        " ".join(rng.choice(WORDS) if rng.random() < share else word for word in row.split())
        for row in rows[:count]
    ]


@pytest.fixture(scope="module")
def job():
    """(predictions by system, references): the LLM is a little better than L2S."""
    rng = random.Random(0)
    rows = [" ".join(rng.choices(WORDS, k=rng.randint(4, 12))) for _ in range(60)]
    shares = {"llm": 0.2, "slm": 0.5, "l2s": 0.25, "l2s_mismatched": 1.0}
    predictions = {name: texts(60, share, name, rows) for name, share in shares.items()}
    # Some examples have a second reference.
    references = [(row, rows[0]) if i % 3 else (row,) for i, row in enumerate(rows)]
    return predictions, references


def compare(predictions, references, names=NAMES):
    measured = {k: metrics.measure(names, v, references) for k, v in predictions.items()}
    return significance.compare(predictions, measured, references, tokenizer="13a")


def test_every_pair_on_every_metric(job):
    predictions, references = job
    found = compare(*job)
    assert list(found) == ["l2s_vs_llm", "l2s_vs_slm", "l2s_mismatched_vs_l2s"]
    scores = {k: metrics.measure(NAMES, v, references).quality for k, v in predictions.items()}
    for pair, (one, other) in significance.PAIRS.items():
        assert list(found[pair]) == list(NAMES)
        for name, result in found[pair].items():
            assert result.keys() == FOUND
            assert result["difference"] == pytest.approx(scores[one][name] - scores[other][name])
            assert result["low"] < result["difference"] < result["high"]
            assert 0 < result["p"] <= 1
    # What is clear is found to be clear.
    assert found["l2s_vs_slm"]["bleu"]["p"] < 0.01 < found["l2s_vs_llm"]["bleu"]["p"]
    assert found["l2s_mismatched_vs_l2s"]["rouge1"]["p"] < 0.01
    assert found == compare(*job)


@pytest.mark.parametrize(("name", "metric"), [("bleu", BLEU), ("chrf", CHRF)])
def test_corpus_metrics_have_the_p_of_sacrebleus_paired_test(job, name, metric):
    predictions, references = job
    found = compare(predictions, references, (name,))
    streams = [[group[0] for group in references], [(*g, None)[1] for g in references]]
    for pair, (one, other) in significance.PAIRS.items():
        systems = [(system, predictions[system]) for system in (one, other)]
        signatures, scores = PairedTest(systems, {name: metric()}, streams, test_type="bs")()
        ((key, signature),) = signatures.items()
        # Which of two systems is the baseline makes no difference.
        assert found[pair][name]["p"] == scores[key][1].p_value
        assert found[pair][name]["test"] == f"sacrebleu.PairedTest|{signature}"
        assert "bs:1000" in found[pair][name]["test"]


def test_the_interval_of_bleu_is_that_of_resampled_corpora(job, monkeypatch):
    predictions, references = job
    monkeypatch.setattr(significance, "RESAMPLES", 40)
    found = compare(predictions, references, ("bleu",))["l2s_vs_slm"]["bleu"]
    rng = np.random.default_rng(significance.SEED)
    samples = []
    for _ in range(40):
        drawn = rng.choice(60, size=60)
        one, other = (
            metrics.measure(
                ["bleu"], [predictions[k][i] for i in drawn], [references[i] for i in drawn]
            ).quality["bleu"]
            for k in ("l2s", "slm")
        )
        samples.append(one - other)
    low, high = np.percentile(samples, [2.5, 97.5])
    assert (found["low"], found["high"]) == pytest.approx((low, high))


def test_a_mean_over_examples_is_tested_as_its_normal_distribution_says():
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.12, -0.2):
        other = rng.normal(40, 5, 300)
        each = rng.normal(0, 1, 300)
        each += shift - each.mean()
        measured = {
            name: metrics.Measured({"comet": float(np.mean(scores))}, {"comet": list(scores)})
            for name, scores in (("l2s", other + each), ("slm", other))
        }
        predictions = dict.fromkeys(measured, [""] * 300)
        found = significance.compare(predictions, measured, [("",)] * 300, tokenizer="13a")
        assert list(found) == ["l2s_vs_slm"]
        result = found["l2s_vs_slm"]["comet"]
        error = each.std() / 300**0.5
        assert result["p"] == pytest.approx(2 * stats.norm.sf(abs(shift) / error), abs=0.04)
        expected = [shift - 1.96 * error, shift + 1.96 * error]
        assert [result["low"], result["high"]] == pytest.approx(expected, abs=0.02)


def test_systems_that_say_the_same_do_not_differ(job):
    predictions, references = job
    same = dict.fromkeys(predictions, predictions["l2s"])
    for pair in compare(same, references).values():
        for result in pair.values():
            assert [result[key] for key in ("difference", "low", "high", "p")] == [0, 0, 0, 1]


def test_so_many_examples_that_sacrebleu_would_fill_the_memory_are_tested_here(job, monkeypatch):
    with_sacrebleu = compare(*job, ("bleu",))
    monkeypatch.setattr(significance, "_MOST_EXAMPLES", 59)
    found = compare(*job, ("bleu",))
    for pair, expected in with_sacrebleu.items():
        result = found[pair]["bleu"]
        assert result["test"] == "paired bootstrap|two-sided|bs:1000|seed:12345"
        assert result["p"] >= expected["bleu"]["p"]
        assert result["difference"] == expected["bleu"]["difference"]
