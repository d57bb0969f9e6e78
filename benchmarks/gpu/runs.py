"""Runs of `python -m l2s_jax.bench` within a part, as long as there is time, and their rows."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.gpu.part import Result, read_json, run_command
from l2s_jax.bench.contestants import CONTESTANTS

COLUMNS = (
    "LLM to SLM", "batch", "prompt", "new", "system", "encode ms", "first token ms", "ms per token",
    "times the floor", "total ms", "quartiles", "tokens/s", "peak GB", "compile s",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """One command of the benchmark."""

    llm: str
    slm: str
    batch_sizes: Sequence[int]
    new_tokens: Sequence[int]
    ours: Sequence[str]
    peers: Sequence[str] = ()
    prompt_tokens: int = 128
    repeats: int = 5
    tune: bool = False  # of the peers' settings
    acceptance: float | None = None  # of exact decoding: the share of drafts that pass

    @property
    def name(self) -> str:
        """Of its file: what it measures."""
        shape = "-".join(map(str, (*self.batch_sizes, self.prompt_tokens, *self.new_tokens)))
        made = f"{self.llm}-{self.slm}-{shape}-{'-'.join((*self.ours, *self.peers))}"
        return made if self.acceptance is None else f"{made}-{self.acceptance:g}"

    def tiny(self) -> Run:
        """The same with models and shapes that take seconds on a CPU."""
        return dataclasses.replace(
            self,
            llm="tiny",
            slm="tiny",
            batch_sizes=(2,),
            new_tokens=(5,),
            prompt_tokens=8,
            repeats=2,
        )

    def command(self, output: str, dtype: str) -> list[str]:
        """Its words."""
        return [
            *(sys.executable, "-m", "l2s_jax.bench", f"--llm={self.llm}", f"--slm={self.slm}"),
            *(f"--ours={','.join(self.ours)}", f"--peers={','.join(self.peers)}"),
            f"--batch_sizes={','.join(map(str, self.batch_sizes))}",
            f"--prompt_tokens={self.prompt_tokens}",
            f"--new_tokens={','.join(map(str, self.new_tokens))}",
            *(f"--dtype={dtype}", f"--repeats={self.repeats}", f"--output={output}"),
            "--tune" if self.tune else "--no-tune",
            *([] if self.acceptance is None else [f"--acceptance={self.acceptance}"]),
        ]


def dtype_of(options: argparse.Namespace) -> str:
    """In which a part's runs compute: not every CPU has bfloat16 products."""
    return "float32" if options.rehearse else "bfloat16"


def folder_of(options: argparse.Namespace) -> str:
    """Where a part's runs leave their files."""
    return options.output.removesuffix(".json")


def measure(
    options: argparse.Namespace, runs: Sequence[Run], result: Result
) -> Iterator[list[tuple[Run, dict[str, Any]]]]:
    """(run, row) of all that has been measured, whenever a run ends.

    Who is not reached is skipped by name. Of a run that is stopped at the limit, or that fails, the
    cases before are there. A run that ended in this folder before is not made again. `options` are
    a part's.
    """
    began, folder, dtype = time.monotonic(), folder_of(options), dtype_of(options)
    os.makedirs(folder, exist_ok=True)
    rows: list[tuple[Run, dict[str, Any]]] = []
    for run in runs:
        output = os.path.join(folder, f"{run.name}.json")
        done = os.path.join(folder, f"{run.name}.done")
        left = options.limit_s - (time.monotonic() - began)
        if not os.path.exists(done):
            if left < 1:
                result.skip(run.name, "no time was left")
                continue
            if reason := run_command(run.command(output, dtype), left):
                result.skip(run.name, reason)
            else:
                with open(done, "w", encoding="utf-8"):
                    pass
        if report := read_json(output):
            for name, reason in report["not_measured"].items():
                result.skip(f"{run.name}: {CONTESTANTS[name].label}", reason)
            rows += [(run, row) for row in report["rows"]]
            yield rows


def cells(run: Run, row: dict[str, Any], copy_gb_per_s: float | None) -> list[Any]:
    """A row of a table with COLUMNS.

    The floor is the time in which the card would read weights and cache once, at the rate of a
    large copy where that is known, else at what the benchmark measured.
    """
    floor = row.get("floor_ms_per_token")
    if copy_gb_per_s and "bytes_read_per_token" in row:
        floor = row["bytes_read_per_token"] / copy_gb_per_s / 1e6
    first, third = row["quartiles"]["total_ms"]
    return [
        *(f"{run.llm} to {run.slm}", row["batch_size"], row["prompt_tokens"], row["new_tokens"]),
        *(CONTESTANTS[row["system"]].label, row["encode_ms"], row["first_token_ms"]),
        row["decode_ms_per_token"],
        row["decode_ms_per_token"] / floor if floor else None,
        *(row["total_ms"], f"{first:.4g} to {third:.4g}", row["tokens_per_s"]),
        row["peak_memory_mb"] and row["peak_memory_mb"] / 1e3,
        row["compile_s"],
    ]


def copy_rate(output: str) -> float | None:
    """What the part *facts* measured, in GB/s, where its file lies beside `output`."""
    facts = read_json(os.path.join(os.path.dirname(os.path.abspath(output)), "facts.json"))
    return facts["ceilings"]["copy_gb_per_s"] if facts and "ceilings" in facts else None
