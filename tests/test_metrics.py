"""Metrics against values computed by hand, brute force, and the libraries' single-example calls."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF

from l2s_jax.evaluation import metrics

WORDS = st.sampled_from(["a", "dog", "runs", "Runs", "fast", "home", "."])
SENTENCE = st.lists(WORDS, min_size=1, max_size=9).map(" ".join)
CORPUS = st.lists(
    st.tuples(SENTENCE, st.lists(SENTENCE, min_size=1, max_size=4)), min_size=1, max_size=5
)


def brute_force_bleu(predictions, references):
    """Corpus BLEU with exponential smoothing, written from its definition."""
    matched, total = [0] * 4, [0] * 4
    length = reference_length = 0
    for prediction, group in zip(predictions, references, strict=True):
        words, others = prediction.split(), [r.split() for r in group]
        length += len(words)
        reference_length += min((abs(len(o) - len(words)), len(o)) for o in others)[1]
        for n in range(1, 5):
            grams = [
                Counter(tuple(x[i : i + n]) for i in range(len(x) - n + 1))
                for x in (words, *others)
            ]
            total[n - 1] += sum(grams[0].values())
            matched[n - 1] += sum(min(c, max(o[g] for o in grams[1:])) for g, c in grams[0].items())
    if not any(matched) or not all(total):
        return 0.0
    logs, smooth = [], 1.0
    for hits, count in zip(matched, total, strict=True):
        if not hits:
            smooth *= 2
        logs.append(math.log(hits / count if hits else 1 / (smooth * count)))
    return 100 * min(1, math.exp(1 - reference_length / length)) * math.exp(sum(logs) / 4)


@settings(max_examples=60, deadline=None)
@given(CORPUS)
def test_bleu_with_varying_numbers_of_references_equals_brute_force(corpus):
    predictions, references = zip(*corpus, strict=True)
    score = metrics.evaluate(["bleu"], predictions, references)["bleu"]
    assert score == pytest.approx(brute_force_bleu(predictions, references), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(SENTENCE, st.lists(SENTENCE, min_size=1, max_size=4))
def test_chrf_takes_the_best_reference_of_an_example(prediction, group):
    score = metrics.evaluate(["chrf"], [prediction], [group])["chrf"]
    best = max(CHRF().sentence_score(prediction, [r]).score for r in group)
    assert score == pytest.approx(best, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(CORPUS)
def test_repeating_a_reference_changes_no_metric(corpus):
    predictions, references = zip(*corpus, strict=True)
    repeated = [[*group, *group[: i % 3]] for i, group in enumerate(references)]
    first = metrics.evaluate(metrics.METRICS, predictions, references)
    assert metrics.evaluate(metrics.METRICS, predictions, repeated) == pytest.approx(first)
    assert all(0 <= value <= 100 + 1e-9 for value in first.values())


def test_bleu_is_cased_and_splits_punctuation_as_13a():
    reference = [["The dog runs home today."]]
    assert metrics.evaluate(["bleu"], ["The dog runs home today."], reference)["bleu"] == (
        pytest.approx(100)
    )
    assert metrics.evaluate(["bleu"], ["the dog runs home today."], reference)["bleu"] < 99
    assert metrics.evaluate(["bleu"], ["The dog runs home today ."], reference)["bleu"] == (
        pytest.approx(100)
    )


def test_rouge_by_hand():
    scores = metrics.evaluate(
        ["rouge1", "rouge2", "rougeL"], ["the cats sat down"], [["the cat lay down there"]]
    )
    # Stemmed overlap: the, cat, down; bigrams: the cat; the common subsequence has 3 words.
    assert scores["rouge1"] == pytest.approx(100 * 2 * 3 / (4 + 5))
    assert scores["rouge2"] == pytest.approx(100 * 2 * 1 / (3 + 4))
    assert scores["rougeL"] == pytest.approx(100 * 2 * 3 / (4 + 5))


def test_rouge_takes_the_best_reference_for_each_metric_and_averages_examples():
    predictions = ["a b c d", "x"]
    references = [["d c b a", "a b"], ["y"]]
    scores = metrics.evaluate(["rouge1", "rouge2"], predictions, references)
    assert scores["rouge1"] == pytest.approx((100 + 0) / 2)
    assert scores["rouge2"] == pytest.approx((100 * 2 * 1 / (3 + 1) + 0) / 2)


def test_rouge_lsum_forgives_the_order_of_sentences_and_rouge_l_does_not():
    prediction, reference = "One cat slept. Two dogs ran!", "Two dogs ran! One cat slept."
    scores = metrics.evaluate(["rougeL", "rougeLsum"], [prediction], [[reference]])
    assert scores["rougeLsum"] == pytest.approx(100)
    assert scores["rougeL"] == pytest.approx(50)
    lines = metrics.evaluate(["rougeLsum"], ["one cat slept\ntwo dogs ran"], [[reference]])
    assert lines["rougeLsum"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("One. Two", ["One.", "Two"]),
        ('He said "no." She left?  Yes!', ['He said "no."', "She left?", "Yes!"]),
        ("Pay 3.50 at a.b.c now", ["Pay 3.50 at a.b.c now"]),
        ("one\ntwo", ["one", "two"]),
        ("", [""]),
    ],
)
def test_sentences(text, lines):
    assert metrics.split_sentences(text).split("\n") == lines


def test_exact_match_strips_and_accepts_any_reference():
    predictions = [" yes \n", "Yes", "no", ""]
    references = [["yes"], ["yes"], ["nein", "no "], ["", "x"]]
    assert metrics.evaluate(["exact_match"], predictions, references) == {"exact_match": 75.0}


def test_empty_text_scores_zero_without_failing():
    scores = metrics.evaluate(metrics.METRICS, ["", "..."], [["a dog"], ["", "!"]])
    assert scores == dict.fromkeys(metrics.METRICS, 0.0)


def test_only_what_was_asked_for_in_that_order():
    names = ["exact_match", "rougeL", "bleu"]
    scores = metrics.evaluate(names, ["a"], [["a"]])
    assert list(scores) == names and all(type(value) is float for value in scores.values())
    assert list(metrics.signatures(names)) == names


def test_signatures_equal_those_of_a_scored_metric():
    predictions, references = ["a b", "c"], [["a b"], ["c", "d"]]
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        metric.corpus_score(predictions, [["a b", "c"], [None, "d"]])
        assert metrics.signatures([name], references)[name] == str(metric.get_signature())
    assert "nrefs:1|case:mixed|" in metrics.signatures(["bleu"], [["a"], ["b"]])["bleu"]
    assert "nrefs" not in metrics.signatures(["bleu"])["bleu"]
    assert "stemmer:porter" in metrics.signatures(["rouge2"])["rouge2"]


@pytest.mark.parametrize(
    ("names", "predictions", "references", "part"),
    [
        (["blue"], ["a"], [["a"]], "'blue'"),
        (["bleu"], [], [], "no predictions"),
        (["bleu"], ["a", "b"], [["a"]], "2 predictions"),
        (["bleu"], ["a", "b"], [["a"], []], "prediction 1 are []"),
        (["bleu"], ["a"], ["a"], "prediction 0 are 'a'"),
    ],
)
def test_bad_input_is_named_in_one_line(names, predictions, references, part):
    with pytest.raises(ValueError, match="expected") as error:
        metrics.evaluate(names, predictions, references)
    assert part in str(error.value) and "\n" not in str(error.value)
