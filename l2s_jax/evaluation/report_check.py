"""What a report has to hold, and in which types, so that programs can read report.json.

The report is a dictionary; the names of keys below list what it holds. Times are in milliseconds
(compile times in seconds), shares in [0, 1], quality on each metric's own scale.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

_TASK = ("name", "split", "examples", "metric", "metric_signatures", "labels")
SYSTEMS = ("llm", "slm", "l2s", "l2s_mismatched")
_SYSTEM = (
    "description", "params", "params_read_per_token", "quality", "cut_share", "latency",
    "latency_batch",
)  # fmt: skip
_LATENCY = (
    "batch_size", "prompt_tokens", "new_tokens", "encode_ms", "prefill_ms", "decode_ms_per_token",
    "total_ms", "compile_s",
)  # fmt: skip
_ENVIRONMENT = ("device", "dtype", "encoder_dtype")
RATIOS = ("quality_ratio", "speedup", "decode_speedup", "speedup_batch")
_DIFFERENCE = ("difference", "low", "high", "p", "test")


def plain(value: Any, where: str) -> Any:
    """The same value in JSON's types; numbers keep their precision, non-finite ones become None."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    raise ValueError(f"{where} is {value!r}: expected text, a number, a list or a mapping")


def check(report: Mapping[str, Any]) -> None:
    """Raises a ValueError that names a key: it is missing, or holds what it can't.

    A report without "significance" or "time", as older ones are, is whole. So is one without
    "dial": what a dial of the same models concludes.
    """
    require(report, "report", ("task", "systems", "l2s_vs_llm", "environment"))
    require(report["environment"], "report.environment", _ENVIRONMENT)
    require(report["task"], "report.task", _TASK)
    task, metric = report["task"], report["task"]["metric"]
    require(task["metric_signatures"], "report.task.metric_signatures", ())
    require_numbers(task, "report.task", ("examples",), ("examples",))
    require(report["l2s_vs_llm"], "report.l2s_vs_llm", RATIOS)
    # An LLM that only encodes is no system, and nothing is compared with it.
    compared = any(report["l2s_vs_llm"][name] is not None for name in RATIOS)
    require(report["systems"], "report.systems", SYSTEMS if compared else SYSTEMS[1:])
    require_numbers(report["l2s_vs_llm"], "report.l2s_vs_llm", RATIOS)
    if not isinstance(report.get("dial", ""), str):
        raise ValueError(f"report.dial is {report['dial']!r}: expected a text")
    _check_significance(report.get("significance", {}))
    _check_time(report.get("time", {}))
    counts = ("params", "params_read_per_token")
    for name, system in report["systems"].items():
        where = f"report.systems.{name}"
        require(system, where, _SYSTEM)
        require_numbers(system, where, (*counts, "cut_share"), counts)
        require(system["quality"], f"{where}.quality", (metric,))
        require_numbers(system["quality"], f"{where}.quality", system["quality"], (metric,))
        for key in ("latency", "latency_batch"):
            require(system[key], f"{where}.{key}", _LATENCY)
            require_numbers(system[key], f"{where}.{key}", _LATENCY, ("total_ms",))
            if system[key]["total_ms"] <= 0:
                raise ValueError(
                    f"{where}.{key}.total_ms is {system[key]['total_ms']}: expected more than 0"
                )


def _check_significance(pairs: Any) -> None:
    where = "report.significance"
    require(pairs, where, ())
    for pair, metrics in pairs.items():
        require(metrics, f"{where}.{pair}", ())
        for name, found in metrics.items():
            require(found, f"{where}.{pair}.{name}", _DIFFERENCE)
            numbers_of_it = _DIFFERENCE[:-1]
            require_numbers(found, f"{where}.{pair}.{name}", numbers_of_it, numbers_of_it)


def _check_time(stages: Any) -> None:
    where = "report.time"
    require(stages, where, ())
    for name, stage in stages.items():
        require(stage, f"{where}.{name}", ("seconds", "shares"))
        require_numbers(stage, f"{where}.{name}", ("seconds",), ("seconds",))
        require(stage["shares"], f"{where}.{name}.shares", ())
        require_numbers(stage["shares"], f"{where}.{name}.shares", stage["shares"], stage["shares"])


def require(value: Any, where: str, keys: Iterable[str]) -> None:
    """Raises a ValueError that names what is missing of a mapping, or that it is none."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}: expected a mapping")
    for key in keys:
        if key not in value:
            raise ValueError(f"missing key {where}.{key}: present are {', '.join(value) or 'none'}")


def require_numbers(
    value: Mapping[str, Any], where: str, keys: Iterable[str], finite: Iterable[str] = ()
) -> None:
    """Raises a ValueError that names a key without a number; None passes if not in `finite`."""
    for key in keys:
        number = value[key]
        if number is None and key not in finite:
            continue
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"{where}.{key} is {number!r}: expected a finite number")
