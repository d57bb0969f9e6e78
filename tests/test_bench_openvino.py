"""OpenVINO as a contestant, as far as it goes without OpenVINO: stand-ins are in its place."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import subprocess
import sys

import pytest

from l2s_jax.bench import __main__ as bench
from l2s_jax.bench.contestants import Setup
from l2s_jax.bench.remote import Remote

OPENVINO = """
class Core:
    def get_property(self, device, name):
        return ["FP32", "INT8"]

def Tensor(array):
    return array
"""
# Decodes up to an end of its own making, if it may, and up to what the environment says.
GENAI = """
import json, os

class SchedulerConfig:
    enable_prefix_caching = True

class GenerationConfig:
    ignore_eos = False

class TokenizedInputs:
    def __init__(self, ids, mask):
        assert ids.dtype == "int64" and mask.all() and mask.shape == ids.shape
        self.rows = len(ids)

class LLMPipeline:
    def __init__(self, folder, device, scheduler_config, **properties):
        assert device == "CPU"
        properties["prefix_caching"] = scheduler_config.enable_prefix_caching
        with open(os.path.join(folder, "properties.json"), "w") as file:
            json.dump(properties, file)

    def generate(self, inputs, settings):
        limit = int(os.environ.get("LIMIT", 1000)) if settings.ignore_eos else 2
        self.tokens = [[7] * min(settings.max_new_tokens, limit)] * inputs.rows
        return self
"""
OPTIMUM = """
import torch

class OVModelForSeq2SeqLM:
    @classmethod
    def from_pretrained(cls, folder, device, ov_config):
        assert device == "CPU" and all(isinstance(value, str) for value in ov_config.values())
        model = cls()
        model.generation_config = type("Settings", (), {"eos_token_id": 1})()
        return model

    def get_encoder(self):
        return lambda input_ids, attention_mask: None

    def generate(self, ids, attention_mask, max_new_tokens, do_sample, num_beams):
        assert ids.dtype == torch.int64 and not do_sample and num_beams == 1
        new = max_new_tokens if self.generation_config.eos_token_id is None else 2
        return torch.zeros(len(ids), 1 + new)
"""
# Writes down how it was called beside the checkpoint, and fails at one that says so.
CONVERTER = """
import json, os, sys

source = sys.argv[sys.argv.index("--model") + 1]
with open(os.path.join(source, "calls"), "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
os.makedirs(sys.argv[-1])
with open(os.path.join(source, "config.json")) as file:
    if json.load(file).get("unknown"):
        sys.exit("Traceback\\nValueError: no such family")
"""


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    files = {
        "openvino/__init__.py": OPENVINO,
        "openvino_genai.py": GENAI,
        "optimum/intel.py": OPTIMUM,
        "optimum/commands/optimum_cli.py": CONVERTER,
        "openvino-1.2.3.dist-info/METADATA": "Name: openvino\nVersion: 1.2.3\n",
    }
    for name, text in files.items():
        path = tmp_path / "libraries" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "libraries"))


@pytest.fixture
def setup(tmp_path):
    for name, config in (("llm", {"is_encoder_decoder": True}), ("slm", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "made").mkdir()
    return Setup(
        llm=str(tmp_path / "llm"),
        slm=str(tmp_path / "slm"),
        dtype="float32",
        threads=1,
        folder=str(tmp_path / "made"),
        vocab_size=100,
        real_weights=True,
        accelerator=False,
        fast_bfloat16=True,
    )


@contextlib.contextmanager
def started(name, setup, **environment):
    """A contestant in its process, and what that says of it."""
    remote = Remote(environment)
    try:
        yield remote, remote.ask("start", name, dataclasses.asdict(setup), {})
    finally:
        remote.close()


def calls(folder):
    with open(f"{folder}/calls") as file:
        return [json.loads(line) for line in file]


def test_its_process_holds_no_jax_and_at_first_nothing_that_is_large(stand_ins):
    program = (
        "import sys, l2s_jax.bench.openvino;"
        "held = {'jax', 'flax', 'torch', 'transformers'} & sys.modules.keys();"
        "sys.exit(', '.join(held) or 0)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_a_decoder_only_model_answers_without_a_memory_of_earlier_prompts(stand_ins, setup):
    with started("ov-slm", setup) as (remote, facts):
        assert facts == {"version": "1.2.3"}
        assert remote.ask("prepare", 3, 8, 5)["compile_s"] >= 0
        times = remote.ask("measure")
        assert remote.ask("memory")["peak_bytes"] > 1e6
    assert math.isnan(times["encode_ms"]) and times["total_ms"] > 0
    with open(f"{setup.folder}/openvino-slm-float/properties.json") as file:
        properties = json.load(file)
    assert properties == {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": 1,
        "KV_CACHE_PRECISION": "f32",
        "prefix_caching": False,
    }


def test_an_encoder_decoder_model_decodes_past_an_end(stand_ins, setup):
    with started("ov-llm", setup) as (remote, _):
        remote.ask("prepare", 2, 8, 5)
        times = remote.ask("measure")
    assert times["encode_ms"] >= 0 and times["total_ms"] > 0


def test_a_checkpoint_is_converted_once_for_each_kind_of_weights(stand_ins, setup):
    for name in ("ov-slm", "ov-slm-int8", "ov-slm"):
        with started(name, setup):
            pass
    with started("ov-llm", setup):
        pass
    formats = [call[call.index("--weight-format") + 1] for call in calls(setup.slm)]
    assert formats == ["fp32", "int8"]
    tasks = {
        call[call.index("--task") + 1]
        for folder in (setup.llm, setup.slm)
        for call in calls(folder)
    }
    assert tasks == {"text-generation-with-past", "text2text-generation-with-past"}


def test_what_cannot_be_converted_leaves_nothing(stand_ins, setup, tmp_path):
    (tmp_path / "slm" / "config.json").write_text(json.dumps({"unknown": True}))
    with (
        pytest.raises(RuntimeError, match=r"cannot be converted: ValueError: no such family$"),
        started("ov-slm", setup),
    ):
        pass
    assert not list((tmp_path / "made").iterdir())


def test_another_number_of_tokens_is_not_measured(stand_ins, setup):
    with (
        started("ov-slm", setup, LIMIT="3") as (remote, _),
        pytest.raises(RuntimeError, match=r"decoded \[3\] tokens, expected 5"),
    ):
        remote.ask("prepare", 2, 8, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat16"}, "this CPU has no products in bfloat16"),
        ({"accelerator": True}, "runs on the CPU, the others on an accelerator"),
    ],
)
def test_what_would_be_no_comparison_is_not_measured(changes, message, stand_ins, setup):
    with (
        pytest.raises(RuntimeError, match=message),
        started("ov-slm", dataclasses.replace(setup, **changes)),
    ):
        pass


def test_a_python_without_openvino_is_named_in_one_line(tmp_path, capsys):
    arguments = [
        *("--llm=tiny", "--slm=tiny", "--ours=", "--peers=ov-slm", "--batch_sizes=1"),
        *("--prompt_tokens=8", "--new_tokens=5", f"--peer_python={sys.executable}"),
    ]
    assert bench.main([*arguments, f"--output={tmp_path / 'speed.json'}"]) == 2
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("error:"))
    assert f"ov-slm: ModuleNotFoundError: no openvino in {sys.executable}, expected a" in line
    assert "--peer_python" in line
