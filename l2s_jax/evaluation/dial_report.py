"""What the dial found: dial.json for programs, dial.md and a plot for people.

dial.json is a dictionary:

    task: name, split, examples, requests, metric, metric_signatures, likeness_signature
    models: hashes of the llm and of the l2s
    search: that of the tolerances, as config.decoding.search
    decoding: all settings of decoding that answers depend on; not in dials of before
    points: the llm, the tolerances in ascending order (of system "exact"), the l2s; each with
      system, tolerance, quality: {metric: value}, cut_share, new_tokens (mean),
      request_ms (median), compile_s
      against_llm: equal_share, chrf
      drafts: as `exactness.drafting` gives it; null at both ends
    environment
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from l2s_jax.evaluation import dial_plot, plot
from l2s_jax.evaluation.report import dtypes, factor, metric_name, ms, number, table
from l2s_jax.evaluation.report_check import plain, require, require_numbers
from l2s_jax.evaluation.stage import deciding
from l2s_jax.experiment.experiment import Experiment
from l2s_jax.experiment.workdir import differences
from l2s_jax.files import is_file, read_json, write_bytes

log = logging.getLogger(__name__)

# The share of the LLM's quality that the conclusion asks for.
_KEPT = 0.995
_NAMES = {"llm": "LLM", "l2s": "L2S"}
_TIMES = "\N{MULTIPLICATION SIGN}"
_POINT = (
    "system", "tolerance", "quality", "against_llm", "cut_share", "new_tokens", "request_ms",
    "compile_s", "drafts",
)  # fmt: skip
_TASK = (
    "name", "split", "examples", "requests", "metric", "metric_signatures", "likeness_signature"
)  # fmt: skip


def write(dial: Mapping[str, Any], directory: str) -> None:
    """Writes dial.json, dial.md, dial.png and dial.svg; replaces each as a whole.

    Raises:
      ValueError: a key is missing, or a time is no number; nothing is written then.
    """
    dial = plain(dial, "dial")
    check(dial)
    figure = quality_time_figure(dial)
    files = {
        "dial.png": plot.image(figure, "png"),
        "dial.svg": plot.image(figure, "svg"),
        "dial.md": markdown(dial).encode(),
        "dial.json": (json.dumps(dial, indent=2, allow_nan=False) + "\n").encode(),
    }
    for name, content in files.items():
        write_bytes(os.path.join(directory, name), content)


def check(dial: Mapping[str, Any]) -> None:
    """Raises a ValueError that names a key: it is missing, or holds what it can't."""
    require(dial, "dial", ("task", "models", "search", "points", "environment"))
    require(dial["task"], "dial.task", _TASK)
    require(dial["models"], "dial.models", ("llm", "l2s"))
    metric = dial["task"]["metric"]
    for place, point in enumerate(dial["points"]):
        where = f"dial.points[{place}]"
        require(point, where, _POINT)
        timed = ("request_ms", "new_tokens", "cut_share", "compile_s")
        require_numbers(point, where, timed, timed)
        require(point["quality"], f"{where}.quality", (metric,))
        require_numbers(point["quality"], f"{where}.quality", point["quality"], (metric,))
        likeness = ("equal_share", "chrf")
        require(point["against_llm"], f"{where}.against_llm", likeness)
        require_numbers(point["against_llm"], f"{where}.against_llm", likeness, likeness)
        if point["request_ms"] <= 0:
            raise ValueError(f"{where}.request_ms is {point['request_ms']}: expected more than 0")
    systems = [point["system"] for point in dial["points"]]
    if len(systems) < 3 or {systems[0], systems[-1]} != {"llm", "l2s"}:
        raise ValueError(f"dial.points are of {systems}: expected llm, exact, ..., l2s")


def models_of(experiment: Experiment) -> dict[str, Any]:
    """Hashes of the models that a dial is about; one process may ask alone once all have."""
    return {
        stage.name: experiment.context.checkpoint(stage.directory)
        for stage in (experiment.llm, experiment.l2s)
    }


def found(experiment: Experiment, decoding: Mapping[str, Any] | None = None) -> str:
    """What the workdir's dial concludes, and of what; "" if there is none of the models.

    Where it answers otherwise than the report, that is said; `decoding` is the report's, as
    `deciding` has it. None: the experiment's.
    """
    workdir = experiment.context.workdir
    path = os.path.join(workdir, "dial.json")
    if not is_file(path) or not is_file(os.path.join(workdir, "dial.png")):
        return ""
    try:
        dial = read_json(path)
        check(dial)
    except ValueError as error:
        log.warning("the report shows no dial: %s", error)
        return ""
    if dial["models"] != models_of(experiment):
        return ""
    decoding = deciding(experiment.context.config) if decoding is None else decoding
    return f"{conclusion(dial)} {_measured_on(dial, decoding)}"


def _measured_on(dial: Mapping[str, Any], decoding: Mapping[str, Any]) -> str:
    """A sentence about the examples, and about what of `decoding` a dial has otherwise."""
    task, own = dial["task"], dial.get("decoding", {"search": dial["search"]})
    others = [
        name
        for name in differences(own, plain(decoding, "decoding"), common=True)
        if name != "search.exact" and not name.startswith("search.draft_")
    ]
    unlike = f", with another {', '.join(f'`decoding.{name}`' for name in others)} than above"
    return (
        f"It was measured on {task['examples']:,} examples of `{task['split']}`"
        f"{unlike if others else ''}."
    )


def conclusion(dial: Mapping[str, Any]) -> str:
    """A sentence about the fastest tolerance that keeps the LLM's quality."""
    metric, (llm, *_) = dial["task"]["metric"], dial["points"]
    name, whole = metric_name(metric), llm["quality"][metric]
    if whole <= 0:
        return f"The LLM scores no {name} for a draft tolerance to keep."
    drafted = [point for point in dial["points"] if point["tolerance"] is not None]
    enough = [point for point in drafted if point["quality"][metric] >= _KEPT * whole]
    if not enough:
        tried = ", ".join(f"{point['tolerance']:g}" for point in drafted)
        return f"No draft tolerance of {tried} keeps at least {_KEPT:.1%} of the LLM's {name}."
    best = min(enough, key=lambda point: point["request_ms"])
    return (
        f"Draft tolerance {best['tolerance']:g} is the fastest that keeps at least {_KEPT:.1%} of "
        f"the LLM's {name}: {best['quality'][metric] / whole:.1%} of it, at "
        f"{_speedup(dial, best)} the LLM's speed."
    )


def markdown(dial: Mapping[str, Any]) -> str:
    """The page of a checked dial, GitHub-flavoured; it embeds dial.png."""
    task, search = dial["task"], dial["search"]
    drafting = f"L2S drafts up to {search['draft_tokens']} tokens at a time"
    blocks = [
        f"# The dial on {task['name']}",
        "![Quality and likeness to the LLM's text, against time per request](dial.png)",
        f"{drafting}, and the LLM reads them at once. A drafted token is kept where the LLM gives "
        "it at least a share 1 - *tolerance* of its best token's probability. Tolerance 0 is the "
        "LLM's own text, tolerance 1 is L2S's.",
        f"Quality on {task['examples']:,} examples of `{task['split']}`. Times are of whole "
        f"requests at batch 1, text in and text out: medians over {task['requests']:,} of these "
        "prompts, each answered by every row in turn, after warm-up. Products are in "
        f"{dtypes(dial['environment'])}, on {dial['environment']['device']}.",
        _table(dial),
        "*Equal*: share of the responses that are the LLM's own text. *chrF to LLM*: chrF with the "
        "LLM's text as reference. *Kept*: drafted tokens that passed, of those that the LLM looked "
        "at. *Per block*: tokens for each time that the LLM is read. *Tokens*: the mean of a "
        "response, its end counted. *Cut*: share of the responses that `max_new_tokens` cut off. "
        "*Compile* is once per shape, and in no time.",
        "\n".join(
            f"- {name}: `{signature}`"
            for name, signature in (
                *((metric_name(key), text) for key, text in task["metric_signatures"].items()),
                ("chrF to LLM", task["likeness_signature"]),
            )
        ),
        "All numbers, unrounded: [dial.json](dial.json). The plot for a slide: "
        "[dial.svg](dial.svg).",
        conclusion(dial),
    ]
    return "\n\n".join(blocks) + "\n"


def quality_time_figure(dial: Mapping[str, Any]) -> Figure:
    """Quality, and likeness to the LLM's text, against the time of a request (ms)."""
    task, metric = dial["task"], dial["task"]["metric"]
    whole = dial["points"][0]["quality"][metric]
    return dial_plot.panels(
        [
            dial_plot.Dialled(
                _name(point),
                point["tolerance"] is None,
                point["request_ms"],
                point["quality"][metric],
                point["against_llm"]["chrf"],
                100 * point["against_llm"]["equal_share"],
            )
            for point in dial["points"]
        ],
        title=_title(dial),
        subtitle=f"{task['name']}, {task['split']}, {task['examples']:,} examples; times of "
        f"{task['requests']:,} requests; numbers are draft tolerances; quality not from 0",
        quality=metric_name(metric),
        kept=_KEPT * whole if whole > 0 else None,
        kept_label=f"{_KEPT:.1%} of the LLM's",
    )


def _title(dial: Mapping[str, Any]) -> str:
    l2s = dial["points"][-1]
    exact = next((point for point in dial["points"] if point["tolerance"] == 0), None)
    if exact is None:
        return f"From the LLM's text to L2S's, {_speedup(dial, l2s)} as fast"
    return f"The LLM's text at {_speedup(dial, exact)} its speed, L2S's at {_speedup(dial, l2s)}"


def _table(dial: Mapping[str, Any]) -> str:
    metrics = list(dial["task"]["metric_signatures"])
    header = (
        "tolerance", *map(metric_name, metrics), "equal", "chrF to LLM", "ms per request",
        "speedup", "kept", "per block", "tokens", "cut", "compile s",
    )  # fmt: skip
    rows = []
    for point in dial["points"]:
        drafts, likeness = point["drafts"] or {}, point["against_llm"]
        rows.append(
            [
                _name(point), *(number(point["quality"].get(name), ".1f") for name in metrics),
                f"{likeness['equal_share']:.1%}", f"{likeness['chrf']:.1f}",
                ms(point["request_ms"]), _speedup(dial, point),
                number(drafts.get("acceptance"), ".0%"),
                number(drafts.get("tokens_per_block"), ".2f"),
                f"{point['new_tokens']:.1f}", f"{point['cut_share']:.1%}",
                f"{point['compile_s']:.1f}",
            ]
        )  # fmt: skip
    return table(header, rows)


def _name(point: Mapping[str, Any]) -> str:
    tolerance = point["tolerance"]
    return _NAMES[point["system"]] if tolerance is None else f"{tolerance:g}"


def _speedup(dial: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    return f"{factor(dial['points'][0]['request_ms'] / point['request_ms'])}{_TIMES}"
