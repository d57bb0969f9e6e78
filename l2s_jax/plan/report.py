"""plan.json and plan.md: what was compiled, whether it fits, and what it would cost."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from l2s_jax.cluster import sharding
from l2s_jax.cluster.chips import CHIPS
from l2s_jax.config import buckets_of
from l2s_jax.files import make_folder, write_json, write_text
from l2s_jax.plan import costs
from l2s_jax.plan.costs import number
from l2s_jax.plan.slices import Slice

NOTES = """\
- Sizes, FLOPs and collectives are those of one device. *Peak* is arguments, temporaries, results
  that are not written over arguments, and code; *capacity* is what the compiler may fill.
- FLOPs are the compiler's own count (`cost_analysis`), which takes a loop's body once, and at least
  those of the whole program, without loops over layers and before it is split, over the number of
  devices; those of training are multiplied by its accumulation. Decode and advance are one step of
  their loops, one token of each row.
- Bytes are what the compiled program's instructions read from main memory and write to it, of what
  is sliced, gathered or scattered the part, with the padding of tiles; what stays on the chip in
  between does not count. They, and collectives, count in a loop as often as it turns.
- The roofline is the longest of four times: FLOPs, bytes of memory, and bytes sent, each at the
  chip's published rate, and latency. A real step takes longer.
- Bytes are sent in one direction over all links at once of the chip that has the fewest: a
  collective waits for it. On a v5e or v6e an axis is a ring if it has 16 chips, on a v5p if the
  slice is made of cubes of 4x4x4; elsewhere a chip in a corner has one link along it.
- Latency is 1 microsecond for each collective, an assumption: about one hop between two chips.
- What slices send each other goes over the data center's network, at a chip's even share of what
  the chip's page says of a chip or a whole Pod: an assumption, since hosts share network cards, and
  the network has no published latency. Devices of a slice first add up what all of them have.
- Decoding is planned greedily or by sampling; a beam search is planned as if it had one beam.
- A run answers many prompts in rows, of which each takes the next prompt when its response has
  ended. *Read* is of the prompts that are read together, an eighth of the rows as a rule, and its
  peak counts all rows that are held meanwhile; *insert* puts them there, beside the weights. Few
  prompts, beams and stop texts have batches, by *encode*, *prefill* and *decode*.
- What is trained is float32 in memory; the frozen LLM and generation hold the weights of products
  in the products' dtype.
"""


def throughput(
    programs: dict[str, Any], config: ConfigDict, chips: int, price: float | None
) -> dict[str, Any]:
    """Tokens per second at the roofline, and dollars per million of them at `price` a chip-hour.

    train: prompt and response tokens of full batches. generate: new tokens, all of them decoded.
    """

    def milliseconds(name: str) -> float | None:
        return programs.get(name, {}).get("roofline_ms")

    rates = {}
    if step := milliseconds("train"):
        tokens = config.l2s.train.batch_size * sum(buckets_of(config)[-1])
        rates["train"] = tokens / step * 1e3
    encode, prefill, decode = (milliseconds(name) for name in ("encode", "prefill", "decode"))
    if encode and prefill and decode:
        new = config.decoding.max_new_tokens
        total = encode + prefill + decode * (new - 1)
        rates["generate"] = config.decoding.batch_size * new / total * 1e3
    result = {}
    for name, rate in rates.items():
        result[name] = {"tokens_per_s": rate}
        if price is not None:
            result[name]["dollars_per_million_tokens"] = price * chips / 3600 / rate * 1e6
    return result


def describe(where: Slice, mesh: Mesh) -> dict[str, Any]:
    """The head of a plan."""
    report: dict[str, Any] = {
        "topology": where.topology,
        "chips": where.chips,
        "mesh": dict(mesh.shape),
    }
    if where.slices > 1:
        report["slices"] = where.slices
    if where.chip:
        report["chip"] = {
            "flops_per_s": where.chip.flops,
            "memory_bytes_per_s": where.chip.hbm,
            "link_bytes_per_s": where.chip.links,
            "links": where.chip.ports,
            "least_links": where.chip.least_links(where.shape),
            "source": where.chip.source,
        }
        if where.slices > 1:
            report["chip"]["dcn_bytes_per_s"] = where.chip.dcn
    return report


def write(report: dict[str, Any], workdir: str) -> str:
    """Writes DIR/plan.json and DIR/plan.md; gives the latter's text."""
    make_folder(workdir)
    text = markdown(report)
    write_json(os.path.join(workdir, "plan.json"), report)
    write_text(os.path.join(workdir, "plan.md"), text)
    return text


def _name(mesh: Mapping[str, int]) -> str:
    return sharding.axes_name(list(mesh.values()))


def markdown(report: dict[str, Any]) -> str:
    """plan.md."""
    elsewhere = [name for name, p in report["programs"].items() if p["mesh"] != report["mesh"]]
    mesh = _name(report["mesh"])
    if elsewhere:
        other = _name(report["programs"][elsewhere[0]]["mesh"])
        mesh += f"; {', '.join(elsewhere)} on mesh {other}"
    model = report["model"]
    lines = [
        f"# Plan for {report['topology']}",
        "",
        f"{report['chips']} chips, mesh {mesh}. {model['llm_parameters']:,} frozen parameters of "
        f"the LLM in {model['encoder_dtype']}, {model['trained_parameters']:,} trained in "
        f"{model['dtype']}.",
    ]
    if "chip" in report:
        chip = report["chip"]
        lines += [
            "",
            f"A chip: {chip['flops_per_s'] / 1e12:g} TFLOP/s in bfloat16, "
            f"{chip['memory_bytes_per_s'] / 1e9:g} GB/s of memory, "
            f"{chip['link_bytes_per_s'] / 1e9:g} GB/s of {chip['links']} links in both directions "
            f"({chip['source']}). In this slice a chip has at least {chip['least_links']} of them.",
        ]
        if "slices" in report:
            lines[-1] += (
                f" Between its {report['slices']} slices a chip sends "
                f"{chip['dcn_bytes_per_s'] / 1e9:g} GB/s."
            )
    else:
        kind = report["topology"].partition(":")[0]
        rated = ", ".join(name for name, chip in CHIPS.items() if chip.ports)
        lines += [
            "",
            f"There are no rates of {kind} here, so no times: of slices {rated} have them.",
        ]
    lines += [
        "",
        "| program | rows | fits | arguments GiB | temporaries GiB | peak GiB | capacity GiB "
        "| GFLOP | GB accessed | latency ms | roofline ms | bound by | compile s |",
        "|" + "---|" * 13,
    ]
    for name, program in report["programs"].items():
        size = program["bytes_per_chip"]
        cells = [name, str(program["batch_size"]), "yes" if program["fits"] else "**no**"]
        names = ("arguments", "temporaries", "peak", "capacity")
        cells += [number(size[key], 2**30) for key in names]
        cells += [number(program["flops"], 1e9), number(program["bytes_accessed"], 1e9)]
        cells += [number(program.get("latency_ms"), 1), number(program["roofline_ms"], 1)]
        cells.append(program.get("bound", "-"))
        lines.append("| " + " | ".join([*cells, f"{program['compile_s']:.0f}"]) + " |")
    lines += ["", "| program | collective | count | MB |", "|---|---|---|---|"]
    for name, program in report["programs"].items():
        for kind, one in program["collectives"].items():
            lines.append(f"| {name} | {kind} | {one['count']} | {one['bytes'] / 1e6:.2f} |")
    if "slices" in report:
        lines += costs.dcn_lines(report["programs"])
    for name, one in report["throughput"].items():
        cost = one.get("dollars_per_million_tokens")
        money = "" if cost is None else f", ${cost:.4f} per million tokens"
        lines += ["", f"{name}: at most {one['tokens_per_s']:,.0f} tokens/s{money}."]
    if "run" in report:
        lines += costs.run_lines(report["run"])
    if report.get("meshes_with_room"):
        lines += [
            "",
            "What does not fit here: the weights, and in training the optimizer's state, take less "
            "than the capacity of a chip with",
            "",
            *(
                f"- {part}: {one}"
                for part, meshes in report["meshes_with_room"].items()
                for one in meshes
            ),
        ]
    if report.get("sweep"):
        axes = " | ".join(sharding.AXES)
        lines += ["", "## Sweep", "", f"| for | {axes} | rows | tokens/s | peak GiB |"]
        lines.append("|" + "---|" * (4 + len(sharding.AXES)))
        for name, rows in report["sweep"].items():
            for row in rows:
                shape = " | ".join(str(size) for size in row["mesh"].values())
                rate = f"{row['tokens_per_s']:,.0f}" if row["tokens_per_s"] else "-"
                lines.append(
                    f"| {name} | {shape} | {row['batch_size']} | {rate} "
                    f"| {number(row['peak'], 2**30)} |"
                )
    return "\n".join([*lines, "", NOTES])
