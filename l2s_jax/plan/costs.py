"""What programs cost, one by one and over a whole run, as plan.json and plan.md have it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from l2s_jax.cluster import sharding
from l2s_jax.plan.hlo import Collective
from l2s_jax.plan.program import Program
from l2s_jax.plan.slices import Slice
from l2s_jax.plan.stages import Run, Stage


def program_report(program: Program, where: Slice) -> dict[str, Any]:
    """A program's entry in plan.json; null where the compiler gave nothing."""
    report: dict[str, Any] = {
        "fits": program.fits,
        "batch_size": program.batch_size,
        "bytes_per_chip": {
            "arguments": program.arguments,
            "temporaries": program.temporaries,
            "peak": program.peak,
            "capacity": where.capacity,
        },
        "flops": None,
        "bytes_accessed": None,
        "collectives": {},
        "roofline_ms": None,
        "compile_s": round(program.compile_s, 2),
    }
    if not program.costs:
        return report
    report["flops"] = program.costs.flops
    report["bytes_accessed"] = program.costs.memory_bytes
    everything = program.costs.collectives
    report["collectives"] = _by_kind([one for one in everything if one.slices == 1])
    if where.slices > 1:
        crossing = [one for one in everything if one.slices > 1]
        sent = sum(one.sent_over_dcn * one.times for one in crossing)
        report["dcn"] = {"collectives": _by_kind(crossing), "bytes_sent": round(sent)}
    if where.chip:
        times = program.costs.roofline(where.chip, where.sent_per_s, where.slices)
        bound = max(times, key=times.__getitem__)
        report |= {"roofline_ms": times[bound], "bound": bound.removesuffix("_ms"), **times}
    return report


def _by_kind(collectives: Sequence[Collective]) -> dict[str, dict[str, int]]:
    kinds: dict[str, dict[str, int]] = defaultdict(lambda: {"count": 0, "bytes": 0})
    for one in collectives:
        kinds[one.kind]["count"] += one.times
        kinds[one.kind]["bytes"] += one.bytes * one.times
    return dict(sorted(kinds.items()))


def dcn_lines(programs: Mapping[str, Any]) -> list[str]:
    """The part of plan.md about what slices send each other."""
    heads = "program | collective between slices | count | MB | MB sent | ms"
    lines = ["", f"| {heads} |", "|" + "---|" * 6]
    for name, program in programs.items():
        dcn = program.get("dcn")
        if not dcn:
            continue
        kinds = dcn["collectives"]
        cells = [", ".join(kinds) or "none"]
        cells += [str(sum(one["count"] for one in kinds.values()))]
        cells += [f"{sum(one['bytes'] for one in kinds.values()) / 1e6:.2f}"]
        cells += [f"{dcn['bytes_sent'] / 1e6:.2f}", number(program.get("dcn_ms"), 1)]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


def stage_report(
    stage: Stage, where: Slice, price: float | None, mfu: float | None
) -> dict[str, Any]:
    """A stage's entry in plan.json; null where there are no rates, or it is not known how often.

    hours: at the roofline. estimated_hours: with the FLOPs at `mfu` of the chip's, where that takes
    longer. dollars and estimated_dollars: of all chips of the slice for so long.
    """
    programs = {name: program_report(one, where) for name, one in stage.compile().items()}
    times = [(one, stage.times[name]) for name, one in programs.items()]
    report: dict[str, Any] = {
        "name": stage.name,
        "mesh": dict(stage.mesh.shape),
        "batch_size": stage.rows,
        "groups": stage.groups,
        "times": dict(stage.times),
        "fits": all(one["fits"] for one in programs.values()),
        "programs": programs,
        "hours": None,
    }
    if all(one["roofline_ms"] is not None and count is not None for one, count in times):
        report["hours"] = sum(one["roofline_ms"] * count for one, count in times) / 3.6e6
        if mfu is not None:
            real = (max(one["roofline_ms"], one["compute_ms"] / mfu) * n for one, n in times)
            report["estimated_hours"] = sum(real) / 3.6e6
    return report | _dollars(report, where.chips, price)


def _dollars(report: Mapping[str, Any], chips: int, price: float | None) -> dict[str, float]:
    if price is None:
        return {}
    hours = {"dollars": report["hours"], "estimated_dollars": report.get("estimated_hours")}
    return {name: n * chips * price for name, n in hours.items() if n is not None}


def run_report(
    stages: Sequence[Mapping[str, Any]],
    run: Run,
    price: float | None,
    mfu: float | None,
) -> dict[str, Any]:
    """The run's entry in plan.json; the total is that of the stages whose hours are known."""
    known = [stage for stage in stages if stage["hours"] is not None]
    total: dict[str, Any] = {"without": [s["name"] for s in stages if s["hours"] is None]}
    names = ("hours", "estimated_hours", "dollars", "estimated_dollars")
    for name in names:
        if known and all(name in stage for stage in known):
            total[name] = sum(stage[name] for stage in known)
    return {
        "examples": dict(run.examples),
        "response_tokens": run.response_tokens,
        "price": price,
        "mfu": mfu,
        "stages": list(stages),
        "total": total,
    }


def run_lines(run: Mapping[str, Any]) -> list[str]:
    """The run's part of plan.md."""
    columns = [("hours", "hours at least"), ("dollars", "dollars at least")]
    if run["mfu"] is not None:
        share = f"at {run['mfu']:.0%} of the FLOPs"
        columns[1:1] = [("estimated_hours", f"hours {share}")]
        columns.append(("estimated_dollars", f"dollars {share}"))
    columns = [column for column in columns if run["price"] is not None or "hours" in column[0]]
    heads = ["stage", "mesh", "rows", "programs", "fits", *(head for _, head in columns)]
    lines = ["", "## The whole run", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for stage in run["stages"]:
        mesh = sharding.axes_name([stage["mesh"][axis] for axis in sharding.AXES])
        several = f"{stage['groups']} times " if stage["groups"] > 1 else ""
        programs = ", ".join(_often(stage, name) for name in stage["programs"])
        cells = [stage["name"], several + mesh, str(stage["batch_size"]), programs]
        cells.append("yes" if stage["fits"] else "**no**")
        cells += [number(stage.get(key), 1) for key, _ in columns]
        lines.append(f"| {' | '.join(cells)} |")
    total = [number(run["total"].get(key), 1) for key, _ in columns]
    missing = run["total"]["without"]
    name = f"total without {', '.join(missing)}" if missing else "total"
    lines.append(f"| {' | '.join([name, '', '', '', '', *total])} |")
    counted = ", ".join(
        f"{split} {'not known' if count is None else f'{count:,}'}"
        for split, count in run["examples"].items()
    )
    mean = run["response_tokens"]
    written = (
        "every response that a model writes is as long as it may be"
        if mean is None
        else f"a response that a model writes has {mean:g} tokens on average, or as many as it may "
        "have if those are fewer"
    )
    return [
        *lines,
        "",
        f"Examples: {counted}. Batches are full and in the largest bucket, and {written}. Where "
        "rows are read for and advance, each takes the next prompt when its response has ended; "
        "the responses of a batch that is decoded are taken to be of one length. Of validation and "
        "evaluation examples that are not at hand there are as many as the config's limit. Not "
        "counted: validations and checkpoints, the time to compile, the host's work, measured "
        "latencies, responses that the SLM or L2S writes to learn from, exact decoding.",
    ]


def _often(stage: Mapping[str, Any], name: str) -> str:
    """A program of a stage: how often it runs, and the time of each."""
    one, count = stage["programs"][name], stage["times"][name]
    often = "?" if count is None else f"{count:,}"
    return f"{name} {often} x {number(one['roofline_ms'], 1)} ms"


def number(value: float | None, unit: float) -> str:
    """Three digits of a value in some unit; - for None."""
    return "-" if value is None else f"{value / unit:,.3g}"
