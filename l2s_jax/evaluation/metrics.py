"""Quality metrics of generated text, each on a scale of 0 to 100.

BLEU and chrF are sacreBLEU's, ROUGE is rouge-score's; this module only feeds them the data in the
form in which their published numbers are computed.
"""

import importlib.metadata
import re
import statistics
from collections.abc import Sequence
from typing import Any

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

METRICS = ("bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match")

_SENTENCE_END = re.compile(r"(?<=[.!?])([\"'\u2019\u201d)\]]*)[ \t]+")
_ROUGE_SETTINGS = "F-measure|stemmer:porter|tok:lowercase-a-z0-9|aggregate:mean|multi-ref:best"


def evaluate(
    names: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Scores predictions against their references; returns {name: value in [0, 100]}.

    `references[i]` are the references of `predictions[i]`, one or more, and their number may
    differ from example to example. With several references BLEU and chrF follow sacreBLEU, ROUGE
    takes the best one for each metric, and an exact match is a match with any of them.

    BLEU is cased with the 13a tokenizer (Post, 2018). ROUGE is the mean over examples of the
    F-measure with Porter stemming (Lin, 2004); its tokenizer keeps only a-z and 0-9: an umlaut
    splits a word, and text in other scripts scores 0. ROUGE-Lsum compares sentence by sentence,
    see `split_sentences`. An exact match ignores white space at both ends of the text.

    Raises:
      ValueError: an unknown name, nothing to score, or references that do not fit predictions.
    """
    _check_names(names)
    _check_texts(predictions, references)
    scores = {}
    if "bleu" in names:
        scores["bleu"] = BLEU().corpus_score(predictions, _streams(references)).score
    if "chrf" in names:
        scores["chrf"] = CHRF().corpus_score(predictions, _streams(references)).score
    rouge_names = [name for name in METRICS if name in names and name.startswith("rouge")]
    if rouge_names:
        scores |= _rouge(rouge_names, predictions, references)
    if "exact_match" in names:
        hits = sum(
            prediction.strip() in {reference.strip() for reference in group}
            for prediction, group in zip(predictions, references, strict=True)
        )
        scores["exact_match"] = 100.0 * hits / len(predictions)
    return {name: float(scores[name]) for name in names}


def signatures(
    names: Sequence[str], references: Sequence[Sequence[str]] | None = None
) -> dict[str, str]:
    """What someone needs to know to reproduce each metric: settings and library versions.

    BLEU and chrF give sacreBLEU's own signature. It states the number of references per example
    only where `references` (as in `evaluate`) is given.
    """
    _check_names(names)
    rouge = f"rouge-score|{_ROUGE_SETTINGS}"
    result = {}
    for name in names:
        if name in ("bleu", "chrf"):
            metric = BLEU() if name == "bleu" else CHRF()
            metric.num_refs = _reference_count(references)
            result[name] = str(metric.get_signature())
        elif name == "exact_match":
            result[name] = "case:mixed|strip:yes|multi-ref:any"
        else:
            sentences = "|sentences:newline-or-[.!?]" if name == "rougeLsum" else ""
            version = importlib.metadata.version("rouge-score")
            result[name] = f"{rouge}{sentences}|version:{version}"
    return result


def split_sentences(text: str) -> str:
    """Puts each sentence on its own line, the form that ROUGE-Lsum expects.

    A sentence ends at a newline, or at `.`, `!` or `?` (closing quotes and brackets may follow)
    before a space or a tab. Abbreviations are not recognized.
    """
    return _SENTENCE_END.sub(r"\1\n", text)


def _rouge(
    names: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    # rouge-score imports nltk, which takes a second that most commands need not spend.
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(names, use_stemmer=True)
    # Newlines change nothing for the other ROUGE metrics: the tokenizer drops them.
    results = [
        scorer.score_multi([split_sentences(r) for r in group], split_sentences(prediction))
        for prediction, group in zip(predictions, references, strict=True)
    ]
    return {name: 100.0 * statistics.fmean(r[name].fmeasure for r in results) for name in names}


def _streams(references: Sequence[Sequence[str]]) -> list[list[Any]]:
    """Transposes references for sacreBLEU: stream k holds every example's k-th, None if absent."""
    width = max(len(group) for group in references)
    return [[group[k] if k < len(group) else None for group in references] for k in range(width)]


def _reference_count(references: Sequence[Sequence[str]] | None) -> int | None:
    """The number in sacreBLEU's convention: -1 where it varies, None where it is unknown."""
    counts = {len(group) for group in references or ()}
    if len(counts) > 1:
        return -1
    return counts.pop() if counts else None


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}: expected one of {', '.join(METRICS)}")


def _check_texts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not predictions:
        raise ValueError("no predictions to score: expected at least one")
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions but references for {len(references)}: "
            "expected one group of references for each prediction"
        )
    for index, group in enumerate(references):
        if isinstance(group, str) or not group:
            raise ValueError(
                f"references of prediction {index} are {group!r}: "
                "expected a non-empty sequence of strings"
            )
