"""Whether systems differ by more than chance: paired bootstrap tests over the examples.

BLEU and chrF are tested by sacreBLEU's PairedTest (Koehn 2004). It knows no other metric, so means
over examples are resampled here, with as many resamples and the same seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import PairedTest

from l2s_jax.evaluation.metrics import Measured, corpus_metrics, streams

# sacreBLEU's own.
RESAMPLES = 1000
SEED = 12345
BASE = "l2s"
# In the order of a difference, which is the first less the second; BASE is in each.
PAIRS = {
    "l2s_vs_llm": ("l2s", "llm"),
    "l2s_vs_slm": ("l2s", "slm"),
    "l2s_mismatched_vs_l2s": ("l2s_mismatched", "l2s"),
}
_INTERVAL = (2.5, 97.5)  # percentiles
# PairedTest has the counts of all resamples in memory: 1.4 GB for so many.
_MOST_EXAMPLES = 20_000


def compare(
    predictions: Mapping[str, Sequence[str]],
    measured: Mapping[str, Measured],
    references: Sequence[Sequence[str]],
    *,
    tokenizer: str,
) -> dict[str, dict[str, dict[str, Any]]]:
    """The report's "significance": {pair: {metric: {"difference", "low", "high", "p", "test"}}}.

    `difference` is that of the scores, in their points. `low` and `high` are the ends of its 95%
    interval over resamples of the examples. `p` is how likely so large a difference is between
    systems that are equally good; 1 for two that say the same. `test` says how p was found.

    Args:
      predictions: of each system.
      measured: of each system, see `metrics.measure`.
      references: of each example.
      tokenizer: BLEU's, by sacreBLEU's name.

    Returns:
      Of the PAIRS whose two systems are there.
    """
    names = list(measured[BASE].quality)
    metrics = corpus_metrics(names, tokenizer)
    in_streams = streams(references)
    samples = {
        system: resampled(texts, measured[system], references, tokenizer=tokenizer)
        for system, texts in predictions.items()
    }
    by_sacrebleu = _paired_tests(metrics, predictions, in_streams)
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for pair, (one, other) in PAIRS.items():
        if one not in measured or other not in measured:
            continue  # an LLM that only encodes
        result[pair] = {}
        for name in names:
            difference = measured[one].quality[name] - measured[other].quality[name]
            found = tested(difference, samples[one][name] - samples[other][name])
            # Of two systems that say the same, sacreBLEU says that they differ.
            if name in by_sacrebleu and found["p"] < 1:
                found |= by_sacrebleu[name][other if one == BASE else one]
            result[pair][name] = found
    return result


def resampled(
    predictions: Sequence[str],
    measured: Measured,
    references: Sequence[Sequence[str]],
    *,
    tokenizer: str,
) -> dict[str, np.ndarray]:
    """Scores [RESAMPLES] of a system, by metric, on examples that are drawn alike for all systems.

    Arguments as of `compare`, of one system.
    """
    in_streams = streams(references)
    return {
        **{
            name: _resampled(metric, predictions, in_streams)
            for name, metric in corpus_metrics(list(measured.quality), tokenizer).items()
        },
        **{name: _means(scores) for name, scores in measured.examples.items()},
    }


def tested(difference: float, samples: np.ndarray) -> dict[str, Any]:
    """What `compare` says of a difference, by its value in each resample [RESAMPLES].

    A two-sided test: these values are shifted by the difference, so that they are about none (Efron
    and Tibshirani 1993, section 16.4).
    """
    low, high = np.percentile(samples, _INTERVAL)
    # Sums of the same numbers in another order differ in their last bits.
    as_large = np.abs(samples - difference) >= abs(difference) - 1e-9
    return {
        "difference": float(difference),
        "low": float(low),
        "high": float(high),
        "p": float((as_large.sum() + 1) / (RESAMPLES + 1)),
        "test": f"paired bootstrap|two-sided|bs:{RESAMPLES}|seed:{SEED}",
    }


def _paired_tests(
    metrics: Mapping[str, BLEU | CHRF],
    predictions: Mapping[str, Sequence[str]],
    references: list[Any],
) -> dict[str, dict[str, dict[str, Any]]]:
    """{metric: {system: {"p", "test"}}} of each system beside BASE, by sacreBLEU."""
    if not metrics or len(predictions[BASE]) > _MOST_EXAMPLES:
        return {}
    systems = [BASE, *(name for name in predictions if name != BASE)]
    texts: Any = [(name, predictions[name]) for name in systems]
    test = PairedTest(texts, metrics, references, test_type="bs", n_samples=RESAMPLES)
    signatures: Any
    found: Any
    signatures, found = test()
    return {
        name: {
            system: {
                "p": float(result.p_value),
                "test": f"sacrebleu.PairedTest|{signatures[key]}",
            }
            for system, result in list(zip(systems, found[key], strict=True))[1:]
        }
        for name, key in zip(metrics, signatures, strict=True)
    }


def _resampled(metric: BLEU | CHRF, texts: Sequence[str], references: list[Any]) -> np.ndarray:
    """Scores [RESAMPLES] of the examples drawn."""
    # sacreBLEU has no public way to the counts of each example, of which it makes a score.
    counts = np.array(metric._extract_corpus_statistics(texts, references), np.float64)
    scores = [metric._compute_score_from_stats(counts[d].sum(0)).score for d in _draws(len(texts))]
    return np.array(scores)


def _means(scores: Sequence[float]) -> np.ndarray:
    """Means [RESAMPLES] of the examples drawn."""
    each = np.asarray(scores, np.float64)
    return np.array([each[drawn].mean() for drawn in _draws(len(each))])


def _draws(examples: int) -> Iterator[np.ndarray]:
    """Places [examples] of the examples in each resample."""
    random = np.random.default_rng(SEED)
    return (random.choice(examples, size=examples) for _ in range(RESAMPLES))
