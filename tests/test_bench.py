"""The benchmark's command, on a geometry so small that all of it takes seconds."""

from __future__ import annotations

import json
import math

import jax
import pytest

from l2s_jax.bench import __main__ as bench
from l2s_jax.bench.geometry import GEOMETRIES
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
    "gpt2": 124.4,
    "pythia-160m": 162.3,
    "qwen3-0.6b": 596.0,
}


@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name != "tiny"])
def test_geometries_have_the_published_size(name):
    system = LanguageModel("llm", GEOMETRIES[name])
    count = parameter_count(jax.eval_shape(system.init, jax.random.key(0)))
    assert round(count / 1e6, 1) == PUBLISHED[name]


SYSTEMS = ("l2s", "llm", "slm", "hf_slm", "hf_assisted", "ct2_slm_int8")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    arguments = [
        *("--llm=tiny", "--slm=tiny", f"--systems={','.join(SYSTEMS)}", f"--output={folder}"),
        *("--batch-sizes=2", "--prompt-tokens=8", "--new-tokens=5", "--repeats=2", "--profile"),
    ]
    assert bench.main(arguments) == 0
    return folder


def test_everyone_is_measured_on_every_case(output):
    report = json.loads((output / "bench.json").read_text())
    measured = {(r["system"], r["batch_size"]) for r in report["results"]}
    expected = {(name, 2) for name in SYSTEMS if name != "hf_assisted"}
    assert measured == expected
    assert report["weights"] == "random, of real geometry"
    assert "expected checkpoints" in report["not_measured"]["hf_assisted"]
    assert {"jax", "torch", "transformers", "ctranslate2"} <= report["environment"].keys()
    for record in report["results"]:
        assert record["total_ms"] > 0 and record["compile_s"] > 0
        rate = record["batch_size"] * record["new_tokens"] / record["total_ms"] * 1e3
        assert math.isclose(record["tokens_per_s"], rate)
        assert report["peak_bytes"][record["system"]] > 1e6


def test_the_floor_is_what_a_step_reads_at_the_bandwidth(output):
    records = json.loads((output / "bench.json").read_text())["results"]
    config = GEOMETRIES["tiny"]
    slm = LanguageModel("slm", config)
    params = jax.eval_shape(slm.init, jax.random.key(0))
    read = 4 * slm.parameters_read_per_token(params)
    for record in records:
        if record["system"] not in ("l2s", "llm", "slm"):
            assert "floor_ms" not in record
            continue
        floor = record["bytes_read_per_token"] / record["bandwidth_gb_per_s"] / 1e6
        assert math.isclose(record["floor_ms"], floor)
        cache = record["bytes_read_per_token"] - read
        heads = config.num_heads * config.head_width * 4 * 2 * config.num_decoder_layers
        positions = 8 + 1 + 8  # the prompt, the first token, a chunk
        assert record["batch_size"] * heads * positions <= cache < 1.2 * heads * positions * 2


def test_the_report_can_be_read(output):
    text = (output / "bench.md").read_text()
    assert "## Batch 2, 8 prompt tokens, 5 new tokens" in text
    assert "| SLM, CTranslate2, int8 |" in text
    for name in ("latency.png", "speedup.png", "shares.png"):
        assert (output / name).stat().st_size > 10_000
    assert list((output / "trace").rglob("*perfetto*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--llm=t6-large"], "'t6-large': neither a folder nor a geometry, expected one of tiny"),
        (["--systems=l2s,ours"], "no 'ours', expected some of l2s"),
        (["--batch-sizes=1,0"], "--batch-sizes"),
        (["--repeats=none"], "--repeats"),
        (["--dtype=float16"], "--dtype"),
        (["everything"], "everything"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path, capsys):
    try:
        status = bench.main([f"--output={tmp_path}", *arguments])
    except SystemExit as error:
        status = error.code
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("error:"))
    assert status == 2 and message in line
    assert not list(tmp_path.iterdir())
