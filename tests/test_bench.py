"""The benchmark's command, on a geometry so small that all of it takes seconds."""

from __future__ import annotations

import json
import math
from importlib import metadata

import jax
import pytest

from l2s_jax.bench import __main__ as bench
from l2s_jax.bench.contestants import OURS, Case, Setup, unfit
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


PEERS = ("hf-slm", "hf-llm-assisted", "ct2-slm-int8")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    arguments = [
        *(
            "--llm=tiny",
            "--slm=tiny",
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
        assert record["total_ms"] > 0 and record["compile_s"] > 0
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
        dtype: unfit("l2s-bfloat16", Setup("llm", "slm", dtype, 1, "folder", False), Case(1, 8, 5))
        for dtype in ("float32", "bfloat16")
    }
    assert reasons == {"float32": "", "bfloat16": "the same as L2S, all of which is in bfloat16"}


def test_the_floor_is_what_a_step_reads_at_the_bandwidth(output):
    report = json.loads((output / "speed.json").read_text())
    records = report["rows"]
    of_llm = next(r for r in records if r["system"] == "llm")
    assert math.isclose(report["floor"]["llm_ms_per_token"], of_llm["floor_ms_per_token"])
    assert report["floor"].keys() == {"gb_per_s", "l2s_ms_per_token", "llm_ms_per_token"}
    config = GEOMETRIES["tiny"]
    slm = LanguageModel("slm", config)
    params = jax.eval_shape(slm.init, jax.random.key(0))
    read = 4 * slm.parameters_read_per_token(params)
    for record in records:
        if record["system"] not in OURS:
            assert "floor_ms_per_token" not in record
            continue
        floor = record["bytes_read_per_token"] / record["gb_per_s"] / 1e6
        assert math.isclose(record["floor_ms_per_token"], floor)
        cache = record["bytes_read_per_token"] - read
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
        (["--peers=hf,ours"], "no 'ours', expected some of hf, ct2, hf-llm"),
        (["--output=folder"], "'folder': expected the name of a .json file"),
        (["--batch_sizes=1,0"], "--batch_sizes"),
        (["--repeats=none"], "--repeats"),
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
