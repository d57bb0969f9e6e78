"""Quality metrics of generated text, each on a scale of 0 to 100.

BLEU and chrF are sacreBLEU's, ROUGE is rouge-score's, COMET is unbabel-comet's; this module only
feeds them the data in the form in which their published numbers are computed.
"""

import importlib.metadata
import logging
import os
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from l2s_jax.data.text import text_list
from l2s_jax.evaluation import comet, rouge
from l2s_jax.settings.evaluation import BLEU_TOKENIZERS, DEFAULT_TOKENIZER, METRICS

log = logging.getLogger(__name__)


class Measured(NamedTuple):
    """Scores of predictions, each from 0 to 100.

    quality: by metric.
    examples: of each example, by metric; none of BLEU and chrF, which are no means over examples.
    """

    quality: dict[str, float]
    examples: dict[str, list[float]]


def check(names: Sequence[str], *, tokenizer: str, comet_folder: str) -> None:
    """Finds out, before any work, whether all is there that the metrics need.

    sacreBLEU downloads the model of a tokenizer that has one.

    Raises:
      ValueError: a package, a model or a checkpoint is missing.
    """
    if "bleu" in names:
        _bleu(tokenizer)
    if "comet" in names:
        comet.check(comet_folder)


def warn_of_spaces(references: Sequence[Sequence[str]], tokenizer: str) -> None:
    """Warns of references that BLEU would take for one word each."""
    if tokenizer in (DEFAULT_TOKENIZER, "intl", "none") and rouge.has_no_spaces(references):
        log.warning(
            "BLEU's tokenizer %s takes text without spaces for one word: set config.task.language, "
            "or config.evaluation.bleu_tokenizer to one of %s",
            tokenizer,
            ", ".join(n for n in BLEU_TOKENIZERS if n not in ("auto", "13a", "intl", "none")),
        )


def measure(
    names: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenizer: str = DEFAULT_TOKENIZER,
    comet_folder: str = "",
    sources: Sequence[str] = (),
) -> Measured:
    """Scores predictions against their references.

    `references[i]` are the references of `predictions[i]`, one or more, and their number may
    differ from example to example. With several references BLEU and chrF follow sacreBLEU, ROUGE
    takes the best one for each metric, COMET looks at the first, and an exact match is a match with
    any of them.

    BLEU is cased (Post, 2018). ROUGE is the mean over examples of the F-measure with Porter
    stemming (Lin, 2004); of Latin text its tokenizer keeps only a-z and 0-9: an umlaut splits a
    word. Where a reference is in another script, words of all scripts count, and characters where a
    script has no spaces. ROUGE-Lsum compares sentence by sentence, see `rouge.split_sentences`. An
    exact match ignores white space at both ends of the text.

    Args:
      names: some of METRICS.
      predictions: the texts.
      references: of each.
      tokenizer: BLEU's, by sacreBLEU's name.
      comet_folder: COMET's checkpoint.
      sources: what was translated, for COMET.

    Raises:
      TypeError: one string where a sequence of strings belongs.
      ValueError: an unknown name, nothing to score, references that do not fit predictions, or
        something is missing that a metric needs.
    """
    _check_names(names)
    predictions = text_list(predictions, "predictions")
    _check_texts(predictions, references)
    quality = {
        name: metric.corpus_score(predictions, streams(references)).score
        for name, metric in corpus_metrics(names, tokenizer).items()
    }
    examples: dict[str, list[float]] = {}
    rouge_names = [name for name in METRICS if name in names and name.startswith("rouge")]
    if rouge_names:
        examples |= rouge.scores(rouge_names, predictions, references)
    if "exact_match" in names:
        examples["exact_match"] = [
            100.0 * (prediction.strip() in {reference.strip() for reference in group})
            for prediction, group in zip(predictions, references, strict=True)
        ]
    if "comet" in names:
        first = [group[0] for group in references]
        examples["comet"] = comet.scores(comet_folder, sources, predictions, first)
    quality |= {name: statistics.fmean(scores) for name, scores in examples.items()}
    return Measured(
        {name: float(quality[name]) for name in names},
        {name: examples[name] for name in names if name in examples},
    )


def corpus_metrics(names: Sequence[str], tokenizer: str) -> dict[str, BLEU | CHRF]:
    """sacreBLEU's among the metrics, which score all examples together; `tokenizer` is BLEU's."""
    make = {"bleu": lambda: _bleu(tokenizer), "chrf": CHRF}
    return {name: make[name]() for name in make if name in names}


def streams(references: Sequence[Sequence[str]]) -> list[list[Any]]:
    """Transposes references for sacreBLEU: stream k holds every example's k-th, None if absent."""
    width = max(len(group) for group in references)
    return [[group[k] if k < len(group) else None for group in references] for k in range(width)]


def signatures(
    names: Sequence[str],
    references: Sequence[Sequence[str]] | None = None,
    *,
    tokenizer: str = DEFAULT_TOKENIZER,
    comet_folder: str = "",
) -> dict[str, str]:
    """What someone needs to know to reproduce each metric: settings and library versions.

    BLEU and chrF give sacreBLEU's own signature. It states the number of references per example
    only where `references` (as in `evaluate`) is given, as does ROUGE's tokenizer.
    """
    _check_names(names)
    words = (
        "lowercase-all-scripts" if rouge.needs_all_scripts(references or ()) else "lowercase-a-z0-9"
    )
    result = {}
    for name in names:
        if name in ("bleu", "chrf"):
            metric = _bleu(tokenizer) if name == "bleu" else CHRF()
            metric.num_refs = _reference_count(references)
            result[name] = str(metric.get_signature())
        elif name == "exact_match":
            result[name] = "case:mixed|strip:yes|multi-ref:any"
        elif name == "comet":
            model = os.path.basename(os.path.normpath(comet_folder))
            version = importlib.metadata.version("unbabel-comet")
            result[name] = f"unbabel-comet|model:{model}|multi-ref:first|version:{version}"
        else:
            sentences = "|sentences:newline-or-[.!?]" if name == "rougeLsum" else ""
            version = importlib.metadata.version("rouge-score")
            result[name] = (
                f"rouge-score|F-measure|stemmer:porter|tok:{words}|aggregate:mean|multi-ref:best"
                f"{sentences}|version:{version}"
            )
    return result


def _bleu(tokenizer: str) -> BLEU:
    try:
        return BLEU(tokenize=tokenizer)
    except (ImportError, RuntimeError, OSError, AssertionError, SystemExit) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"config.evaluation.bleu_tokenizer: {tokenizer!r} cannot be used: {said}; expected "
            f"what it needs, or another of {', '.join(BLEU_TOKENIZERS)}"
        ) from error


def _reference_count(references: Sequence[Sequence[str]] | None) -> int | None:
    """The number in sacreBLEU's convention: -1 where it varies, None where it is unknown."""
    counts = {len(group) for group in references or ()}
    if len(counts) > 1:
        return -1
    return counts.pop() if counts else None


def _check_names(names: Sequence[str]) -> None:
    text_list(names, "names")
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
