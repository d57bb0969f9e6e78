"""The benchmark's command, on a geometry so small that all of it takes seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import re
import subprocess
import sys
import time
from importlib import metadata
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2s_jax.bench import __main__ as bench
from l2s_jax.bench import contest, machine, remote
from l2s_jax.bench.contestants import OURS, PEERS, Case, Setup, unfit, variants
from l2s_jax.bench.geometry import random_like, write_random
from l2s_jax.models.geometries import GEOMETRIES
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.models.systems import LanguageModel, parameter_count

# Millions of parameters, as the models' cards on huggingface.co give them.
PUBLISHED = {
    "mt5-small": 300.2,
    "smollm2-135m": 134.5,
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
    "llama-3-8b": 8030.3,
    "llama-3-70b": 70553.7,
    "llama-3-70b-instruct": 70553.7,
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
    accelerator=False,
    fast_bfloat16=True,
)
MEASURED = ("hf-slm", "hf-llm-assisted", "ct2-slm-int8", "ov-slm")
# Who is measured where the CPU has products in bfloat16.
FAST = ("l2s-bfloat16", "hf-slm-bfloat16")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    arguments = [
        *(
            "--llm=tiny",
            "--slm=tiny",
            f"--ours={','.join(OURS)}",
            f"--peers={','.join((*MEASURED, 'hf-slm-bfloat16'))}",
            f"--output={folder / 'new' / 'speed.json'}",
        ),
        *(
            "--no-tune",
            "--vocabulary=1000",
            "--acceptance=0.7",
            "--draft_tokens=2",
            "--batch_sizes=2",
            "--prompt_tokens=8",
            "--new_tokens=5",
            "--repeats=2",
            "--profile",
        ),
    ]
    assert bench.main(arguments) == 0
    return folder / "new"


def test_everyone_is_measured_on_every_case(output):
    report = json.loads((output / "speed.json").read_text())
    measured = {(r["system"], r["batch_size"]) for r in report["rows"]}
    names = {*OURS, "hf-slm", "hf-slm-bfloat16", "ct2-slm-int8"}
    if not machine.has_fast_bfloat16():
        names -= set(FAST)
        for name in FAST:
            assert "this CPU has no products in bfloat16" in report["not_measured"][name]
    assert measured == {(name, 2) for name in names}
    assert report["weights"] == "random, of real geometry"
    assert "expected checkpoints" in report["not_measured"]["hf-llm-assisted"]
    assert "--peer_python" in report["not_measured"]["ov-slm"]
    expected = {"jax", "torch", "transformers", "ctranslate2", "cpu", "instruction_set"}
    assert expected <= report["environment"].keys()
    for record in report["rows"]:
        assert record["total_ms"] > 0
        first, third = record["quartiles"]["total_ms"]
        assert first <= record["total_ms"] <= third
        # Of others, the first run less the second, who may be as fast.
        assert record["compile_s"] > 0 or record["system"] not in OURS
        rate = record["batch_size"] * record["new_tokens"] / record["total_ms"] * 1e3
        assert math.isclose(record["tokens_per_s"], rate)
        assert record["peak_memory_mb"] > 1
        ending = record["system"].split("-")[-1]
        encoder_dtype = {"int8": "int8", "bfloat16": "bfloat16"}.get(ending, "float32")
        assert record["encoder_dtype"] == encoder_dtype
        l2s = record["system"].startswith("l2s-b")
        assert record["dtype"] == ("float32" if l2s else encoder_dtype)
        library = {"hf": "transformers", "ct2": "ctranslate2"}.get(record["system"].split("-")[0])
        assert record["version"] == metadata.version(library or "jax")


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("l2s-bfloat16", {}, ""),
        (
            "l2s-bfloat16",
            {"dtype": "bfloat16"},
            "the same as L2S, all of which is in bfloat16",
        ),
        (
            "hf-llm-bfloat16",
            {"dtype": "bfloat16"},
            "the same as LLM, transformers, all of which is in bfloat16",
        ),
        ("hf-slm-bfloat16", {"fast_bfloat16": False}, "this CPU has no products in bfloat16"),
        ("hf-slm", {"fast_bfloat16": False}, ""),
    ],
)
def test_bfloat16_is_measured_once_and_where_it_is_fast(name, changes, reason):
    assert unfit(name, dataclasses.replace(SETUP, **changes), Case(1, 8, 5)) == reason


@pytest.mark.parametrize(
    ("name", "new_tokens", "reason"),
    [
        ("slm", 24, ""),
        ("slm", 25, "1025 tokens, the SLM has 1024 positions"),
        ("ct2-slm-int8", 25, "1025 tokens, the SLM has 1024 positions"),
        ("l2s-int8", 25, "1025 tokens, the SLM has 1024 positions"),
        ("hf-llm", 25, ""),
        ("hf-llm-assisted", 25, "1025 tokens, the SLM has 1024 positions"),
        ("ov-slm", 25, "1025 tokens, the SLM has 1024 positions"),
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
        *("--no-tune", "--batch_sizes=1", "--prompt_tokens=8", "--new_tokens=5", "--repeats=1"),
    ]
    assert bench.main(arguments) == 0
    report = json.loads((tmp_path / "speed.json").read_text())
    assert report["not_measured"] == {} and report["weights"] == "of the checkpoint"
    compile_s = {record["system"]: record["compile_s"] for record in report["rows"]}
    assert list(compile_s) == ["llm", "hf-slm-compiled", "hf-llm-assisted"]
    assert compile_s["hf-slm-compiled"] > compile_s["hf-llm-assisted"], compile_s


class Stand:
    """In the place of a contestant's process; who is in `ended` ends at its second run."""

    ended: tuple[str, ...] = ()
    opened: ClassVar[list[tuple[str, dict, dict]]] = []
    closed: ClassVar[list[str]] = []

    def __init__(self, environment, python):
        self.environment = dict(environment)

    def ask(self, request, *arguments):
        if request == "start":
            self.name, self.runs, self.arguments = arguments[0], 0, arguments[2]
            self.opened.append((self.name, self.environment, self.arguments))
            return {"version": "1", "platform": "cpu", "device": "stand"}
        if request == "prepare":
            return {"compile_s": 1.0}
        if request == "memory":
            return {"peak_bytes": 1e6}
        assert request == "measure"
        self.runs += 1
        if self.name in self.ended and self.runs == 2:
            raise RuntimeError("its process ended (-9)")
        # Who spins is the fastest, but for CTranslate2.
        spins = self.environment.get("OMP_WAIT_POLICY") == "ACTIVE"
        return {"total_ms": 1.0 if spins != self.name.startswith("ct2") else 2.0}

    def close(self):
        self.closed.append(self.name)


@pytest.fixture
def reports(monkeypatch):
    """What is reported of Stands."""
    monkeypatch.setattr(contest, "Remote", Stand)
    found = []
    monkeypatch.setattr(bench, "write_report", lambda report, stem: found.append(report))
    Stand.opened.clear()
    Stand.closed.clear()
    return found


def bench_stands(tmp_path, *arguments):
    (tmp_path / "speed.md").touch()
    fixed = ("--llm=tiny", "--slm=tiny", "--prompt_tokens=8", "--new_tokens=5", "--repeats=2")
    return bench.main([*fixed, *arguments, f"--output={tmp_path / 'speed.json'}"])


@pytest.mark.parametrize(("ended", "status"), [("hf-slm", 0), ("slm", 2)])
def test_who_ends_while_being_measured_is_left_out(
    ended, status, tmp_path, monkeypatch, capsys, reports
):
    monkeypatch.setattr(Stand, "ended", (ended,))
    arguments = ["--ours=slm", "--peers=hf-slm,ct2-slm", "--batch_sizes=1,8", "--no-tune"]
    assert bench_stands(tmp_path, *arguments) == status
    if status:
        assert "error: slm: its process ended (-9)" in capsys.readouterr().err
        assert reports == []
        return
    assert reports[-1]["not_measured"] == {"hf-slm": "its process ended (-9)"}
    measured = [(record["system"], record["batch_size"]) for record in reports[-1]["rows"]]
    assert measured == [("slm", 1), ("ct2-slm", 1), ("slm", 8), ("ct2-slm", 8)]
    # At once, and again with all others.
    assert Stand.closed[0] == "hf-slm" and Stand.closed.count("slm") == 1


def test_peers_have_the_settings_with_which_they_are_fastest(tmp_path, reports):
    threads = min(machine.cores(), 2)
    arguments = ["--ours=slm", "--peers=hf-slm,ct2-slm", "--batch_sizes=1,8"]
    assert bench_stands(tmp_path, *arguments, f"--threads={threads}") == 0
    chosen = {(r["system"], r["batch_size"]): r["settings"] for r in reports[-1]["rows"]}
    spin, defaults = "defaults, threads that spin", "defaults"
    assert chosen == {
        **{("slm", rows): defaults for rows in (1, 8)},
        **{("hf-slm", rows): spin for rows in (1, 8)},
        **{("ct2-slm", rows): defaults for rows in (1, 8)},
    }
    # For each batch size every variant once, and the best again for the turns.
    tried = len(variants("hf-slm", dataclasses.replace(SETUP, threads=threads)))
    assert [name for name, *_ in Stand.opened].count("hf-slm") == 2 * (tried + 1)
    last = [environment for name, environment, _ in Stand.opened if name == "hf-slm"][-1]
    assert last == {"OMP_WAIT_POLICY": "ACTIVE"}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("accelerator", [False, True])
def test_variants_differ(name, accelerator):
    setup = dataclasses.replace(SETUP, threads=2, accelerator=accelerator)
    found = variants(name, setup)
    assert len({variant.label for variant in found}) == len(found)
    settings = [(dict(v.arguments), dict(v.environment), v.threads) for v in found]
    assert all(settings.count(setting) == 1 for setting in settings)
    types = {v.arguments.get("compute_type") for v in found} - {None}
    if name.endswith("-int8") and name.startswith("ct2"):
        expected = {"int8_bfloat16", "int8_float32"} | ({"int8_float16"} if accelerator else set())
        assert types == expected
        # Without tuning it is the first, which is to be there on every machine.
        assert found[0].arguments == {"compute_type": "int8_float32"}


def test_who_is_not_asked_is_stopped_and_ends_with_its_parent(tmp_path):
    program = (
        "import sys, time, l2s_jax.bench.remote as remote\n"
        "found = remote.Remote()\n"
        "try: found.ask('start', 'nobody', {}, {})\n"
        "except RuntimeError: pass\n"
        "print(found._process.pid, flush=True)\n"
        "time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    status = pathlib.Path("/proc", parent.stdout.readline().strip(), "status")

    def state():
        with contextlib.suppress(OSError):
            return re.search(r"State:\s+(\w)", status.read_text())[1]
        return ""

    def wait_for(*states):
        deadline = time.monotonic() + 30
        while state() not in states and time.monotonic() < deadline:
            time.sleep(0.05)
        return state()

    assert wait_for("T") == "T"
    parent.kill()
    parent.communicate()
    assert wait_for("", "Z") in ("", "Z")


def test_quartiles():
    assert contest.quartiles([5.0]) == [5.0, 5.0]
    assert contest.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == [2.0, 4.0]


def test_random_weights_are_made_as_they_serve():
    system = LanguageModel("slm", dataclasses.replace(GEOMETRIES["tiny"], dtype=jnp.bfloat16))
    shapes = jax.eval_shape(
        lambda key: system.to_serve(system.init(key), {}, "int8")[0], jax.random.key(0)
    )
    made = random_like(shapes)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    for leaf in jax.tree.leaves(made):
        assert len(np.unique(np.asarray(leaf, np.float32))) > 1


def test_a_case_that_nobody_fits_leaves_the_others(tmp_path, monkeypatch):
    small = {"width": 16, "num_heads": 2, "num_layers": 1, "max_positions": 32}
    monkeypatch.setitem(GEOMETRIES, "gpt2", GPT2Config(vocab_size=48, pad_id=0, eos_id=1, **small))
    arguments = [
        *("--llm=gpt2", "--slm=gpt2", "--ours=slm", "--peers=", "--batch_sizes=1"),
        *("--prompt_tokens=32,8", "--new_tokens=2", "--repeats=1"),
    ]
    assert bench.main([*arguments, f"--output={tmp_path / 'speed.json'}"]) == 0
    report = json.loads((tmp_path / "speed.json").read_text())
    assert [record["prompt_tokens"] for record in report["rows"]] == [8]
    reason = "batch 1, 32 prompt tokens, 2 new tokens: 34 tokens, the SLM has 32 positions"
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
    assert report["floor"]["gb_per_s"] > 0
    config = GEOMETRIES["tiny"]
    slm = LanguageModel("slm", config)
    params = jax.eval_shape(slm.init, jax.random.key(0))
    count = slm.parameters_read_per_token(params)
    # A token of the exact mode reads as much of the LLM as drafts fail.
    steps = [name for name in OURS if name != "exact"]
    whole = {r["system"]: r["bytes_read_per_token"] for r in records if r["system"] in steps}
    for record in records:
        if record["system"] not in steps:
            assert "floor_ms_per_token" not in record
            continue
        if record["system"].endswith("-cut"):
            left_out = (config.vocab_size - 1000) * config.width
            assert record["bytes_read_per_token"] == whole[record["system"][:3]] - 4 * left_out
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
        (
            ["--llm=tiny", "--slm=tiny", "--vocabulary=40000"],
            "--vocabulary=40000: expected at most 32128, all of the SLM's",
        ),
        (["--ours=", "--profile"], "--profile: expected one of ours in --ours"),
        (
            [
                *("--llm=tiny", "--slm=tiny", "--dtype=bfloat16", "--ours=l2s-bfloat16"),
                *("--peers=", "--prompt_tokens=8", "--new_tokens=5", "--batch_sizes=1"),
            ],
            "nobody was measured (l2s-bfloat16: batch 1, 8 prompt tokens, 5 new tokens: the same",
        ),
        (["--peers=hf,ours"], "no 'ours', expected some of hf, ct2, ov, hf-llm"),
        (["--output=folder"], "'folder': expected the name of a .json file"),
        (["--batch_sizes=1,0"], "--batch_sizes"),
        (["--repeats=none"], "--repeats"),
        (["--threads=100000"], "--threads=100000: expected at most"),
        (["--peer_python=/no/python"], "'/no/python': expected a Python that can be run"),
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
