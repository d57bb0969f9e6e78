"""The benchmark's command, on a geometry so small that all of it takes seconds."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from importlib import metadata
from typing import ClassVar

import jax
import pytest

from l2s_jax.bench import __main__ as bench
from l2s_jax.bench import remote
from l2s_jax.bench.contestants import BANDWIDTH, OURS, Case, Setup, unfit
from l2s_jax.bench.geometry import write_random
from l2s_jax.models.geometries import GEOMETRIES
from l2s_jax.models.systems import LanguageModel, parameter_count

# Millions of parameters, as the models' cards on huggingface.co give them.
PUBLISHED = {
    "t5-small": 60.5,
    "t5-base": 222.9,
    "t5-large": 737.7,
    "flan-t5-small": 77.0,
    "flan-t5-base": 247.6,
    "flan-t5-large": 783.2,
    "flan-t5-xl": 2849.8,
    "flan-t5-xxl": 11135.3,
    "gpt2": 124.4,
    "pythia-160m": 162.3,
    "qwen3-0.6b": 596.0,
    "qwen3-8b": 8190.7,
    "llama-3-70b": 70553.7,
}


@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name != "tiny"])
def test_geometries_have_the_published_size(name):
    system = LanguageModel("llm", GEOMETRIES[name])
    count = parameter_count(jax.eval_shape(system.init, jax.random.key(0)))
    assert round(count / 1e6, 1) == PUBLISHED[name]


SETUP = Setup(
    llm="llm",
    slm="slm",
    dtype="float32",
    threads=1,
    folder="folder",
    vocab_size=100,
    real_weights=False,
)
PEERS = ("hf-slm", "hf-llm-assisted", "ct2-slm-int8")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    arguments = [
        *(
            "--llm=tiny",
            "--slm=tiny",
            f"--ours={','.join(OURS)}",
            f"--peers={','.join(PEERS)}",
            f"--output={folder / 'new' / 'speed.json'}",
        ),
        *("--batch_sizes=2", "--prompt_tokens=8", "--new_tokens=5", "--repeats=2", "--profile"),
    ]
    assert bench.main(arguments) == 0
    return folder / "new"


def test_everyone_is_measured_on_every_case(output):
    report = json.loads((output / "speed.json").read_text())
    measured = {(r["system"], r["batch_size"]) for r in report["rows"]}
    expected = {(name, 2) for name in (*OURS, "hf-slm", "ct2-slm-int8")}
    assert measured == expected
    assert report["weights"] == "random, of real geometry"
    assert "expected checkpoints" in report["not_measured"]["hf-llm-assisted"]
    assert {"jax", "torch", "transformers", "ctranslate2"} <= report["environment"].keys()
    for record in report["rows"]:
        assert record["total_ms"] > 0
        # Of others, the first run less the second, who may be as fast.
        assert record["compile_s"] > 0 or record["system"] not in OURS
        rate = record["batch_size"] * record["new_tokens"] / record["total_ms"] * 1e3
        assert math.isclose(record["tokens_per_s"], rate)
        assert record["peak_memory_mb"] > 1
        assert record["dtype"] == ("int8" if "int8" in record["system"] else "float32")
        encoder_dtype = "bfloat16" if record["system"] == "l2s-bfloat16" else record["dtype"]
        assert record["encoder_dtype"] == encoder_dtype
        library = {"hf": "transformers", "ct2": "ctranslate2"}.get(record["system"].split("-")[0])
        assert record["version"] == metadata.version(library or "jax")


def test_what_is_in_bfloat16_throughout_is_measured_once():
    reasons = {
        dtype: unfit("l2s-bfloat16", dataclasses.replace(SETUP, dtype=dtype), Case(1, 8, 5))
        for dtype in ("float32", "bfloat16")
    }
    assert reasons == {"float32": "", "bfloat16": "the same as L2S, all of which is in bfloat16"}


@pytest.mark.parametrize(
    ("name", "new_tokens", "reason"),
    [
        ("slm", 24, ""),
        ("slm", 25, "1025 tokens, the SLM has 1024 positions"),
        ("ct2-slm-int8", 25, "1025 tokens, the SLM has 1024 positions"),
        ("l2s-int8", 25, "1025 tokens, the SLM has 1024 positions"),
        ("hf-llm", 25, ""),
        ("hf-llm-assisted", 25, "1025 tokens, the SLM has 1024 positions"),
        (BANDWIDTH, 25, ""),
    ],
)
def test_nobody_is_measured_beyond_a_models_positions(name, new_tokens, reason):
    setup = dataclasses.replace(SETUP, slm_positions=1024, real_weights=True)
    assert unfit(name, setup, Case(1, 1000, new_tokens)) == reason


def test_checkpoints_are_measured_compiled_and_assisted_too(tmp_path):
    for name in ("llm", "slm"):
        write_random("tiny", str(tmp_path / name))
    arguments = [
        *(f"--llm={tmp_path / 'llm'}", f"--slm={tmp_path / 'slm'}", "--ours=llm"),
        *("--peers=hf-slm-compiled,hf-llm-assisted", f"--output={tmp_path / 'speed.json'}"),
        *("--batch_sizes=1", "--prompt_tokens=8", "--new_tokens=5", "--repeats=1"),
    ]
    assert bench.main(arguments) == 0
    report = json.loads((tmp_path / "speed.json").read_text())
    assert report["not_measured"] == {} and report["weights"] == "of the checkpoint"
    compile_s = {record["system"]: record["compile_s"] for record in report["rows"]}
    assert list(compile_s) == ["llm", "hf-slm-compiled", "hf-llm-assisted"]
    assert compile_s["hf-slm-compiled"] > 1 > compile_s["hf-llm-assisted"], compile_s


class Stand:
    """In the place of a contestant's process; who is in `ended` ends at its second run."""

    ended: tuple[str, ...] = ()
    closed: ClassVar[list[str]] = []

    def ask(self, request, *arguments):
        if request == "start":
            self.name, self.runs = arguments[0], 0
        elif request == "measure":
            self.runs += 1
            if self.name in self.ended and self.runs == 2:
                raise RuntimeError("its process ended (-9)")
        return {
            "prepare": {"compile_s": 1.0},
            "measure": {"gb_per_s": 1.0} if self.name == BANDWIDTH else {"total_ms": 1.0},
            "memory": {"peak_bytes": 1e6},
        }.get(request, {})

    def close(self):
        self.closed.append(self.name)


@pytest.mark.parametrize(("ended", "status"), [("hf-slm", 0), ("slm", 2)])
def test_who_ends_while_being_measured_is_left_out(ended, status, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "Remote", Stand)
    monkeypatch.setattr(bench, "write_report", lambda report, stem: reports.append(report))
    monkeypatch.setattr(bench, "write_random", lambda name, path: write_random("tiny", path))
    monkeypatch.setattr(Stand, "ended", (ended,))
    Stand.closed.clear()
    reports = []
    (tmp_path / "speed.md").touch()
    arguments = [
        *("--llm=tiny", "--slm=tiny", "--ours=slm", "--peers=hf-slm,ct2-slm"),
        *("--batch_sizes=1,8", "--prompt_tokens=8", "--new_tokens=5", "--repeats=2"),
    ]
    assert bench.main([*arguments, f"--output={tmp_path / 'speed.json'}"]) == status
    if status:
        assert "error: slm: its process ended (-9)" in capsys.readouterr().err
        assert reports == []
        return
    assert reports[-1]["not_measured"] == {"hf-slm": "its process ended (-9)"}
    measured = [(record["system"], record["batch_size"]) for record in reports[-1]["rows"]]
    assert measured == [("slm", 1), ("ct2-slm", 1), ("slm", 8), ("ct2-slm", 8)]
    # At once, and again with all others.
    assert Stand.closed[0] == "hf-slm" and Stand.closed.count("slm") == 1


def test_a_case_that_nobody_fits_leaves_the_others(tmp_path):
    arguments = [
        *("--llm=gpt2", "--slm=gpt2", "--ours=slm", "--peers=", "--batch_sizes=1"),
        *("--prompt_tokens=1024,8", "--new_tokens=2", "--repeats=1"),
    ]
    assert bench.main([*arguments, f"--output={tmp_path / 'speed.json'}"]) == 0
    report = json.loads((tmp_path / "speed.json").read_text())
    assert [record["prompt_tokens"] for record in report["rows"]] == [8]
    reason = "batch 1, 1024 prompt tokens, 2 new tokens: 1026 tokens, the SLM has 1024 positions"
    assert report["not_measured"] == {"slm": reason}
    assert report["environment"]["platform"] == "cpu"


@pytest.mark.parametrize("module", ["hf", "ct2"])
def test_other_libraries_processes_hold_no_jax(module):
    program = f"import sys, l2s_jax.bench.{module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_peak_is_that_of_one_case():
    block = bytearray(b"1") * 2**28
    before = remote._peak_bytes()
    del block
    remote._reset_peak()
    assert remote._peak_bytes() < before - 2**27


def test_the_floor_is_what_a_step_reads_at_the_bandwidth(output):
    report = json.loads((output / "speed.json").read_text())
    records = report["rows"]
    of_llm = next(r for r in records if r["system"] == "llm")
    assert math.isclose(report["floor"]["llm_ms_per_token"], of_llm["floor_ms_per_token"])
    assert report["floor"].keys() == {"gb_per_s", "l2s_ms_per_token", "llm_ms_per_token"}
    config = GEOMETRIES["tiny"]
    slm = LanguageModel("slm", config)
    params = jax.eval_shape(slm.init, jax.random.key(0))
    count = slm.parameters_read_per_token(params)
    for record in records:
        if record["system"] not in OURS:
            assert "floor_ms_per_token" not in record
            continue
        floor = record["bytes_read_per_token"] / record["gb_per_s"] / 1e6
        assert math.isclose(record["floor_ms_per_token"], floor)
        if record["dtype"] == "int8":
            # A number each, and scales.
            assert count < record["bytes_read_per_token"] < 2 * count
            continue
        cache = record["bytes_read_per_token"] - 4 * count
        heads = config.num_heads * config.head_width * 4 * 2 * config.num_decoder_layers
        positions = 8 + 1 + 8  # the prompt, the first token, a chunk
        assert record["batch_size"] * heads * positions <= cache < 1.2 * heads * positions * 2


def test_the_report_can_be_read(output):
    text = (output / "speed.md").read_text()
    assert "## Batch 2, 8 prompt tokens, 5 new tokens" in text
    assert "| SLM, CTranslate2, int8 |" in text
    for name in ("latency", "speedup", "shares"):
        assert (output / f"speed-{name}.png").stat().st_size > 10_000
    assert list((output / "speed-trace").rglob("*perfetto*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--llm=t6-large"], "'t6-large': neither a folder nor a geometry, expected one of tiny"),
        (["--ours=l2s,hf-llm"], "no 'hf-llm', expected some of l2s, l2s-bfloat16"),
        (["--ours=", "--profile"], "--profile: expected one of ours in --ours"),
        (
            [
                *("--llm=tiny", "--slm=tiny", "--dtype=bfloat16", "--ours=l2s-bfloat16"),
                *("--peers=", "--prompt_tokens=8", "--new_tokens=5", "--batch_sizes=1"),
            ],
            "nobody was measured (l2s-bfloat16: the same as L2S",
        ),
        (["--peers=hf,ours"], "no 'ours', expected some of hf, ct2, hf-llm"),
        (["--output=folder"], "'folder': expected the name of a .json file"),
        (["--batch_sizes=1,0"], "--batch_sizes"),
        (["--repeats=none"], "--repeats"),
        (["--threads=100000"], "--threads=100000: expected at most"),
        (["--dtype=float16"], "--dtype"),
        (["everything"], "everything"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path, capsys):
    try:
        status = bench.main([f"--output={tmp_path}/bench.json", *arguments])
    except SystemExit as error:
        status = error.code
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("error:"))
    assert status == 2 and message in line
    assert not list(tmp_path.iterdir())
