"""What a report has of a run's time, and what trackers have of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from l2s_jax.experiment.experiment import Experiment
from l2s_jax.experiment.stage import RecordedStage
from l2s_jax.training import spent


def times(experiment: Experiment) -> dict[str, Any]:
    """What each stage took, by its name: seconds, and the share of each kind of work."""
    records = {
        stage.name: stage.record
        for stage in experiment.stages
        if isinstance(stage, RecordedStage) and stage.is_used()
    }
    seconds = {name: spent.seconds_of(record.directory) for name, record in records.items()}
    seconds["evaluation"] = spent.taken()
    return {
        name: {"seconds": sum(of_stage.values()), "shares": spent.shares(of_stage)}
        for name, of_stage in seconds.items()
        if any(of_stage.values())
    }


def results(report: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a report that a list of runs is sorted by, by name."""
    quality = {
        f"{name}/{metric}": value
        for name, system in report["systems"].items()
        for metric, value in system["quality"].items()
    }
    times = {f"{n}/total_ms": s["latency"]["total_ms"] for n, s in report["systems"].items()}
    found = {**quality, **times, **report["l2s_vs_llm"]}
    return {
        f"report/{name}": float(value)
        for name, value in found.items()
        if value is not None and math.isfinite(value)
    }
