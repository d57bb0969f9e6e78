"""benchmarks/kernels.py: counts that follow from a geometry, on one that takes seconds."""

from __future__ import annotations

import importlib.util
import json
import pathlib

import jax.numpy as jnp
import pytest
from small import t5_config

from l2s_jax.cluster.chips import CHIPS
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.models.systems import LanguageModel

PATH = pathlib.Path(__file__).resolve().parent.parent / "benchmarks" / "kernels.py"
specification = importlib.util.spec_from_file_location("kernels", PATH)
kernels = importlib.util.module_from_spec(specification)
specification.loader.exec_module(kernels)

# A step of two layers, compiled, cut down to what is counted.
COMPILED = """HloModule jit_loop
%fused_dot (p: bf16[8,4]) -> f32[8,4] {
  ROOT %d = f32[8,4]{1,0} dot(%p, %p), lhs_contracting_dims={1}
}
%fused_write (p: bf16[8,4]) -> bf16[8,4] {
  %r = f32[8]{0} reduce(%p, %zero), dimensions={1}, to_apply=%add
  ROOT %u = bf16[8,4]{1,0} dynamic-update-slice(%p, %r, %i)
}
%fused_norm (p: bf16[8,4]) -> f32[8] {
  ROOT %r = f32[8]{0} reduce(%p, %zero), dimensions={1}, to_apply=%add
}
%fused_add (p: bf16[8,4]) -> f32[8,4] {
  ROOT %a = f32[8,4]{1,0} add(%p, %p)
}
%step (state: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %state = (s32[], bf16[8,4]{1,0}) parameter(0)
  %x = bf16[8,4]{1,0} get-tuple-element(%state), index=1
  %norm.1 = f32[8]{0} fusion(%x), kind=kCustom, calls=%fused_norm
  %dot.1 = f32[8,4]{1,0} fusion(%x), kind=kCustom, calls=%fused_dot
  %blas = (bf16[8,4]{1,0}, s8[9]{0}) custom-call(%x), custom_call_target="__cublas$lt$matmul"
  %write = bf16[8,4]{1,0} fusion(%x), kind=kLoop, calls=%fused_write
  %add = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%fused_add
  %copy = bf16[8,4]{0,1} copy(%x)
  ROOT %next = (s32[], bf16[8,4]{1,0}) tuple(%i, %write)
}
%chunk (state: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %other = f32[8]{0} fusion(%x), kind=kCustom, calls=%fused_norm
  ROOT %w = (s32[], bf16[8,4]{1,0}) while(%state), condition=%c, body=%step, backend_config={"known_trip_count":{"n":"8"}}
}
ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %w = (s32[], bf16[8,4]{1,0}) while(%t), condition=%c, body=%chunk
}
"""  # noqa: E501


def decoding(config, rows=1, prompt_tokens=7, new_tokens=9):
    return kernels.Decoding(LanguageModel("slm", config), rows, prompt_tokens, new_tokens)


@pytest.mark.parametrize("activation, feed_forward", [("relu", 2), ("gated_gelu", 3)])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("rows", [1, 4])
def test_counts_of_an_encoder_decoder(layers, activation, feed_forward, rows):
    config = t5_config(num_decoder_layers=layers, activation=activation, dtype=jnp.bfloat16)
    found = kernels.operations(decoding(config, rows).stablehlo())
    # Queries, keys, values and output of one attention, queries and output of the other, and two
    # products of each with its cache; the head.
    assert found["products"] == layers * (4 + 2 + feed_forward + 4) + 1
    assert found["attention"] == layers * 4
    assert found["writes"] == layers * 2
    # A sum per norm, a maximum and a sum per softmax, the choice of the token.
    assert found["reductions"] == layers * (3 + 4) + 1 + 1
    assert found["cast_bytes"] == 0
    low, high = kernels.bounds(found)
    # Three norms, one product of queries, keys and values, two writes, two attentions.
    assert low == layers * (3 + 1 + 2 + 2 + 3 + feed_forward) + 3
    assert high > 2 * found["products"]


def test_a_tied_head_is_held_as_its_products_take_it():
    # No step casts the table, and a step reads two bytes of each of its entries.
    tied = t5_config(tied_head=True, dtype=jnp.bfloat16)
    assert kernels.operations(decoding(tied).stablehlo())["cast_bytes"] == 0
    whole = t5_config(tied_head=True)
    half, full = (kernels.counted(decoding(c), compile_it=False) for c in (tied, whole))
    assert 2 * half["weights_bytes"] == full["weights_bytes"]


def test_counts_of_a_decoder_alone():
    config = GPT2Config(vocab_size=48, width=16, num_heads=2, num_layers=2, max_positions=32)
    found = kernels.operations(decoding(config).stablehlo())
    assert found["writes"] == found["attention"] == 2 * 2
    assert found["products"] == 2 * (4 + 2 + 2) + 1


def test_bytes_that_a_step_reads():
    config = t5_config(num_decoder_layers=2, dtype=jnp.bfloat16)
    shape = decoding(config, rows=3, prompt_tokens=7, new_tokens=9)
    row = kernels.counted(shape, compile_it=False)
    inner, width = 2 * 6, 16
    layer = (4 + 2) * width * inner + 2 * width * 32 + 3 * width
    weights = 2 * layer + config.num_buckets * 2 + width + width * config.vocab_size
    assert row["weights_bytes"] == 2 * weights
    # Room for the tokens of whole chunks, and one more; the mask, and how many there are.
    cached = 2 * 2 * 3 * inner * (8 + 1 + 7) * 2
    assert row["cache_bytes"] == cached + 3 * 7 + 4
    for chip in ("h100", "h200"):
        seconds = (row["weights_bytes"] + row["cache_bytes"]) / CHIPS[chip].hbm
        assert row[f"{chip}_floor_us"] == pytest.approx(seconds * 1e6)
    low, high = row["kernels_low"], row["kernels_high"]
    assert row["in_graph_us"] == [low * kernels.IN_GRAPH, high * kernels.IN_GRAPH]


def test_kernels_of_a_compiled_loop():
    assert kernels.launched(COMPILED) == {
        "products": 2,
        "writes": 1,
        "reductions": 1,
        "copies": 1,
        "others": 1,
    }
    with pytest.raises(ValueError, match="no loop of 8 turns"):
        kernels.launched(COMPILED.replace('"n":"8"', '"n":"3"'))


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "has_compiler", lambda: False)
    path = tmp_path / "kernels.json"
    kernels.main(["--slm=tiny", "--batch_sizes=1,2", "--new_tokens=9", f"--output={path}"])
    table = capsys.readouterr().out.splitlines()
    rows = json.loads(path.read_text())["rows"]
    assert [row["batch_size"] for row in rows] == [1, 2]
    assert len(table) == 2 + len(rows) and len({line.count("|") for line in table}) == 1
    assert rows[1]["cache_bytes"] > rows[0]["cache_bytes"]


@pytest.mark.parametrize(
    "flags, said",
    [("--new_tokens=1", "takes no step"), ("--batch_sizes=0", "'0'"), ("--slm=x", "x")],
)
def test_bad_input(flags, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        kernels.main([flags])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line
