"""Plans: real TPU programs compiled without a TPU, against figures worked out here."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from l2s_jax.cluster import libtpu, sharding
from l2s_jax.cluster.chips import CHIPS, chip_of
from l2s_jax.config import default
from l2s_jax.models.geometries import GEOMETRIES
from l2s_jax.plan import command, hlo
from l2s_jax.plan.command import make_mesh, plan
from l2s_jax.plan.models import make_plan
from l2s_jax.plan.program import Costs
from l2s_jax.plan.programs import PROGRAMS, Compilers
from l2s_jax.plan.slices import Slice, open_slice, parse_size
from l2s_jax.plan.stages import Run, examples_of, meshes_of
from l2s_jax.training import optim, update
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
GIB = 1 << 30


def small_config(**mesh: int) -> ConfigDict:
    config = default()
    config.tokenizer.train_vocab_size = 64
    config.task.splits = ConfigDict({split: split for split in ("train", "validation", "test")})
    for section in (config.llm, config.slm):
        section.model.update(
            width=32,
            num_heads=2,
            head_width=16,
            feed_forward_width=64,
            num_encoder_layers=1,
            num_decoder_layers=1,
        )
    config.llm.train.steps = 1
    config.max_prompt_tokens = config.max_response_tokens = 16
    config.buckets = ((16, 16),)
    config.l2s.train.batch_size = 16
    config.decoding.update(batch_size=16, max_new_tokens=9)
    config.mesh.update(**{"data": 1, "fsdp": 1, "tensor": 1, **mesh})
    return config


def rated(topology: str) -> Slice:
    """Devices that compile in no time, with a chip's rates."""
    return dataclasses.replace(open_slice(topology), chip=CHIPS["v5e"])


def planned(config: ConfigDict, directory: Path, topology: str, **settings) -> dict:
    plan(config, str(directory), topology, **settings)
    return json.loads((directory / "plan.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def devices() -> None:
    """JAX runs, and has its devices, before a plan asks for some of its own."""
    assert len(jax.devices()) == 8


@pytest.fixture(scope="module")
def v5e(tmp_path_factory) -> tuple[ConfigDict, dict, str]:
    config = small_config(data=2, fsdp=2)
    directory = tmp_path_factory.mktemp("v5e")
    report = planned(config, directory, "v5e:2x2", programs=PROGRAMS, price=1.2)
    return config, report, (directory / "plan.md").read_text()


def test_all_programs_compile_for_v5e_and_fit(v5e):
    _, report, text = v5e
    assert (report["topology"], report["chips"]) == ("v5e:2x2", 4)
    assert report["mesh"] == {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 1}
    assert list(report["programs"]) == ["train", "encode", "prefill", "decode"]
    for name, program in report["programs"].items():
        size = program["bytes_per_chip"]
        assert program["fits"], name
        assert size["arguments"] < size["peak"] < size["capacity"] == int(15.75 * GIB)
        assert program["flops"] > 0 and program["roofline_ms"] > 0 and program["compile_s"] > 0
        assert f"| {name} | 16 | yes |" in text
    cost, rate = (
        report["throughput"]["generate"][key]
        for key in ("dollars_per_million_tokens", "tokens_per_s")
    )
    assert cost == pytest.approx(1.2 * 4 / 3600 / rate * 1e6)


def test_argument_bytes_are_the_sum_of_the_shards(v5e):
    config, report, _ = v5e
    models = make_plan(config, "tpu")
    settings = config.l2s.train
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:4])
    trained, frozen = models.trained, models.frozen

    def held(tree, shardings):
        leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
        return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in leaves)

    optimizer = optim.optimizer(settings, trained)
    shardings = update.state_shardings(trained, optimizer, settings, mesh)
    state = jax.eval_shape(lambda p: update.init_state(p, optimizer, settings), trained)
    batch = 4 * 16 * (2 * 4 + 2)  # rows here, tokens, two int32 ids and two masks
    expected = held(state, shardings) + batch
    expected += held(frozen, sharding.parameter_shardings(frozen, mesh))
    found = report["programs"]["train"]["bytes_per_chip"]["arguments"]
    # On a TPU small arrays are padded to whole tiles; nothing is smaller than it is.
    assert expected <= found


def test_the_llm_may_have_a_dtype_of_its_own():
    config = small_config()
    config.dtype = "float32"
    plain = make_plan(config, "cpu")
    config.llm.encoder_dtype = "bfloat16"
    mixed = make_plan(config, "cpu")
    kernels = [x for x in jax.tree.leaves(mixed.frozen) if x.dtype == jnp.bfloat16]
    assert kernels and {x.dtype for x in jax.tree.leaves(plain.frozen)} == {jnp.dtype("float32")}
    assert mixed.trained == plain.trained
    dtypes = mixed.description()["dtype"], mixed.description()["encoder_dtype"]
    assert dtypes == ("float32", "bfloat16")


def test_distillation_adds_the_llms_likeliest_tokens_to_a_batch(tmp_path):
    config = small_config(data=4)
    sizes = []
    for weight, top_k in ((0.0, 32), (0.5, 6), (0.5, 1000)):
        config.distillation.update(weight=weight, top_k=top_k)
        report = planned(config, tmp_path / f"{top_k}", "cpu:4", programs=["train"])
        sizes.append(report["programs"]["train"]["bytes_per_chip"]["arguments"])
    tokens = 4 * 16  # on each device; an id in int32 and a float32 for each of k, or all of 64
    assert [size - sizes[0] for size in sizes[1:]] == [tokens * 6 * 8, tokens * 64 * 8]


def test_training_from_a_cache_holds_no_llm(tmp_path):
    config = small_config(data=4)
    config.features.cache = "features"
    report = planned(config, tmp_path, "cpu:4", programs=["train"])
    models = make_plan(config, "cpu")
    assert models.adapted[2] == {} and models.frozen
    settings = config.l2s.train
    optimizer = optim.optimizer(settings, models.trained)
    state = jax.eval_shape(lambda p: update.init_state(p, optimizer, settings), models.trained)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    batch = 4 * 16 * (2 * 4 + 2) + 4 * 16 * 32 * 2  # and H, 32 wide, in bfloat16
    assert report["programs"]["train"]["bytes_per_chip"]["arguments"] == held + batch

    config.slm.tokenizer.train_vocab_size = 32
    config.l2s.lora.rank = 2
    assert set(make_plan(config, "cpu").adapted[2]["inner"]) == {"token_embedding"}


def test_flops_and_collectives_of_a_known_matrix_product():
    where = open_slice("v5e:2x2")
    mesh = sharding.make_mesh(ConfigDict({"data": 1, "fsdp": 1, "tensor": 4}), where.devices)

    def array(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*axes)))

    x, w = array((512, 2048), None, "tensor"), array((2048, 1024), "tensor", None)
    product = jax.jit(jnp.matmul, out_shardings=NamedSharding(mesh, P()))
    compiled = product.lower(x, w).compile()
    assert compiled.cost_analysis()["flops"] == pytest.approx(2 * 512 * 2048 * 1024 / 4, rel=0.05)
    found = hlo.collectives(compiled.as_text())
    # Each device has a part of every sum: all are added up, in one operation or two.
    sent = sum(one.sent * one.times for one in found)
    assert {one.kind for one in found} <= {"all-reduce", "reduce-scatter", "all-gather"}
    # In bfloat16 or, before it is rounded, in float32.
    assert sent in [2 * 3 / 4 * 512 * 1024 * width for width in (2, 4)]
    times = Costs(197e12, 819e9, tuple(found)).roofline(CHIPS["v5e"], where.sent_per_s)
    assert times["compute_ms"] == times["memory_ms"] == 1000
    # Of four links of 50 GB/s in each direction a chip of 2x2 has two.
    assert times["network_ms"] == pytest.approx(sent / 100e9 * 1e3)
    assert times["latency_ms"] == pytest.approx(1e-3 * sum(one.times for one in found))


@pytest.mark.parametrize(("topology", "gib"), [("v5p:2x2x1", 95.74), ("v6e:2x2", 31.25)])
def test_other_chips(topology, gib, tmp_path):
    report = planned(small_config(data=4), tmp_path, topology, programs=["encode"])
    assert list(report["programs"]) == ["encode"]
    assert report["programs"]["encode"]["fits"]
    assert report["programs"]["encode"]["bytes_per_chip"]["capacity"] == int(gib * GIB)
    assert report["chip"]["source"].startswith("https://docs.cloud.google.com/tpu/docs/v")
    assert chip_of(open_slice(topology).devices[0]) is CHIPS[topology.split(":")[0]]


STACK, BARRIER = "fibers_default_thread_stack_size", "xla_tpu_use_enhanced_launch_barrier"


def told(flags: str) -> list[str]:
    """What LIBTPU_INIT_ARGS has after it had these flags; a second time changes nothing."""
    environment = {"LIBTPU_INIT_ARGS": flags} if flags else {}
    libtpu.prepare(environment)
    found = environment["LIBTPU_INIT_ARGS"]
    libtpu.prepare(environment)
    assert environment == {"LIBTPU_INIT_ARGS": found}
    return found.split()


def test_libtpu_has_larger_stacks_and_what_jax_tells_it_on_a_tpus_host():
    ours = [f"--{STACK}=16777216", f"--{BARRIER}=true"]
    names = f"{STACK},{BARRIER}"
    undefined = f"--undefok={names}"
    assert told("") == [*ours, undefined]
    assert told("--other=1") == ["--other=1", *ours, undefined]
    # JAX was first.
    assert sorted(told(f"--{BARRIER}=true")) == sorted(told(""))
    # What the user lets it ignore, and another size.
    assert told("--undefok=mine --mine=1") == [
        "--mine=1",
        *ours,
        f"--undefok=mine,{undefined[10:]}",
    ]
    assert told(f"--{STACK}=99") == [f"--{STACK}=99", ours[1], undefined]
    assert told(f"--undefok={STACK}") == [*ours, undefined]


def test_libtpu_ignores_what_it_does_not_know(monkeypatch):
    """As `prepare` takes for granted of another libtpu; without `undefok` it ends the process."""
    opening = "from l2s_jax.plan.slices import open_slice; print(open_slice('v5e:2x2').chips)"

    def opened(flags: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "LIBTPU_INIT_ARGS": flags}
        command = [sys.executable, "-c", opening]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert opened("--no_such_flag=1 --undefok=no_such_flag").stdout == "4\n"
    ended = opened("--no_such_flag=1")
    assert ended.returncode and "no_such_flag" in ended.stderr


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_long_prompt_fits_and_all_its_operations_count(family, topology, tmp_path, monkeypatch):
    """Scores of all pairs of 4,096 tokens of 8 rows a chip would be 4 GiB, of each layer."""
    config = small_config(data=4)
    length, rows = 4096, 32
    if family == "llama":
        of_llm = dataclasses.replace(GEOMETRIES["llama-3-8b"], vocab_size=512, num_layers=2)
        small = {"width": 256, "num_heads": 2, "num_kv_heads": 1, "feed_forward_width": 64}
        monkeypatch.setitem(GEOMETRIES, "long", dataclasses.replace(of_llm, **small))
        for section in (config.llm, config.slm):
            section.path = "long"
            section.model.update(default().llm.model)
    config.max_prompt_tokens, config.buckets = length, ((length, 16),)
    config.l2s.train.batch_size = config.decoding.batch_size = rows
    config.dtype = "bfloat16"
    report = planned(config, tmp_path, topology, programs=["encode"])
    program = report["programs"]["encode"]
    assert program["fits"] and program["bytes_per_chip"]["temporaries"] < GIB
    # Queries by keys, and weights by values, of all heads.
    width, layers = (32, 1) if family == "t5" else (256, 2)
    assert program["flops"] > layers * 4 * rows / 4 * length**2 * width


def test_a_model_too_large_does_not_fit_and_the_plan_says_what_would(tmp_path):
    config = small_config(data=4)
    config.llm.model.update(width=8192, feed_forward_width=65536, num_encoder_layers=8)
    config.features.cache = "features"  # which training alone reads
    report = planned(config, tmp_path, "v5e:2x2", programs=["encode"])
    program = report["programs"]["encode"]
    size = program["bytes_per_chip"]
    assert not program["fits"] and size["arguments"] > size["capacity"]
    assert program["flops"] is None and program["roofline_ms"] is None
    weights = 8 * 2 * 8192 * 65536 * 2  # in bfloat16
    assert size["arguments"] > weights
    assert list(report["meshes_with_room"]) == ["generate"]
    (meshes,) = report["meshes_with_room"].values()
    assert any("tensor=4" in mesh for mesh in meshes)
    assert not any("data=4" in mesh for mesh in meshes)
    text = (tmp_path / "plan.md").read_text()
    assert "**no**" in text and f"\n- generate: {meshes[0]}\n" in text


def test_each_program_is_compiled_for_the_mesh_of_its_stage(tmp_path):
    config = small_config(data=4)
    config.decoding.mesh.update(data=1, tensor=4)
    report = planned(config, tmp_path, "cpu:4", programs=["train", "encode"])
    alone = small_config(data=1, tensor=4)
    expected = planned(small_config(data=4), tmp_path / "train", "cpu:4", programs=["train"])
    expected["programs"] |= planned(alone, tmp_path / "a", "cpu:4", programs=["encode"])["programs"]
    common = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
    one, other = {**common, "data": 4}, {**common, "tensor": 4}
    assert report["mesh"] == one
    for name, mesh in (("train", one), ("encode", other)):
        found = report["programs"][name]
        assert found["mesh"] == mesh
        same = ("bytes_per_chip", "flops", "collectives", "batch_size")
        assert all(found[key] == expected["programs"][name][key] for key in same)
    text = (tmp_path / "plan.md").read_text()
    assert "mesh data=4, fsdp=1, tensor=1; encode on mesh data=1, fsdp=1, tensor=4." in text


def test_cpu_devices_and_the_sweep(tmp_path):
    config = small_config(data=4)
    report = planned(
        config, tmp_path, "cpu:4", programs=["encode"], sweep=True, batch_sizes=[8, 16]
    )
    program = report["programs"]["encode"]
    models = make_plan(config, "cpu")
    weights = sum(x.size * 4 for x in jax.tree.leaves(models.frozen))
    # Rows over four devices, weights on each; jit leaves out what a program does not read.
    assert program["bytes_per_chip"]["arguments"] == weights + 4 * 16 * (4 + 1)
    assert program["roofline_ms"] is None  # no published rates
    rows = report["sweep"]["generate"]
    assert {row["batch_size"] for row in rows} == {8, 16}
    # tensor=4 does not divide two heads of 16, but the kernels it does: 4 = d * f * t in 6 ways.
    assert len({tuple(row["mesh"].values()) for row in rows}) == 6


def test_each_collective_of_a_shard_map_counts():
    def mirrored(x):
        there = jax.lax.ppermute(x, "data", [(i, 3 - i) for i in range(4)])
        return jax.lax.ppermute(jnp.tanh(there), "data", [(i, 3 - i) for i in range(4)])

    with jax.set_mesh(sharding.make_mesh({"data": 4}, jax.devices()[:4])):
        split = jax.shard_map(mirrored, in_specs=P("data"), out_specs=P("data"))
        text = jax.jit(split).lower(jnp.ones((8, 5))).compile().as_text()
    found = hlo.collectives(text)
    assert [(one.kind, one.bytes) for one in found] == [("collective-permute", 40)] * 2


def test_collectives_in_a_loop_count_as_often_as_it_turns():
    mesh = sharding.make_mesh(ConfigDict({"data": 1, "fsdp": 1, "tensor": 4}), jax.devices()[:4])
    w = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, P("tensor")))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "tensor")))

    def loop(w, x):
        spread = NamedSharding(mesh, P(None, "tensor"))
        body = lambda x, _: (jax.lax.with_sharding_constraint(jnp.tanh(x @ w), spread), None)  # noqa: E731
        return jax.lax.scan(body, x, length=7)[0]

    found = hlo.collectives(jax.jit(loop).lower(w, x).compile().as_text())
    assert sum(one.times for one in found) == 7
    assert {one.group for one in found} == {4}


def test_a_product_that_overlaps_with_its_gathering_gathers_all():
    where = open_slice("v5e:4x4")
    mesh = sharding.make_mesh(ConfigDict({"data": 1, "fsdp": -1, "tensor": 1}), where.devices)
    rows, columns = (NamedSharding(mesh, P(*axes)) for axes in (["fsdp"], [None, "fsdp"]))
    x = jax.ShapeDtypeStruct((256, 256, 4096), jnp.bfloat16, sharding=rows)
    w = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=columns)
    product = jax.jit(jnp.matmul, out_shardings=rows)
    text = product.lower(x, w).compile().as_text()
    assert "windowed_dot_general" in text  # a loop over parts of the product
    sent = sum(one.sent * one.times for one in hlo.collectives(text))
    # Each device gets the other 15 of 16 parts. By two directions and two at a time that takes one
    # before the loop and four turns of four, of which the last send on what nobody needs.
    assert sent / (4096 * 4096 * 2 / 16) == 1 + 4 * 4
    assert hlo.loop_turns(text) == [4]


def test_layers_in_a_loop_cost_what_they_do_one_by_one(tmp_path):
    found = []
    for scan_layers in (False, True):
        config = small_config(fsdp=4)
        config.llm.model.update(width=64, feed_forward_width=256, num_encoder_layers=6)
        config.scan_layers = scan_layers
        directory = tmp_path / str(scan_layers)
        found.append(planned(config, directory, "cpu:4", programs=["encode"])["programs"]["encode"])
    plain, scanned = found
    assert scanned["flops"] == pytest.approx(plain["flops"], rel=0.01)
    assert scanned["bytes_accessed"] == pytest.approx(plain["bytes_accessed"], rel=0.1)
    assert scanned["collectives"].keys() == plain["collectives"].keys()
    for kind, one in scanned["collectives"].items():
        assert one["bytes"] == pytest.approx(plain["collectives"][kind]["bytes"], rel=0.02)
    sizes = [one["bytes_per_chip"]["arguments"] for one in found]
    assert sizes[0] == sizes[1]


def test_what_a_loop_reads_and_writes_counts_as_often_as_it_turns():
    def loss(ws, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0].sum()

    turned = []
    for turns in (4, 8, 12):
        ws, x = (jax.ShapeDtypeStruct(shape, "f") for shape in ((turns, 256, 256), (512, 256)))
        compiled = jax.jit(jax.grad(loss)).lower(ws, x).compile()
        turned.append(hlo.memory_bytes(compiled.as_text()))
    # Each turn reads x and w, there and back, and writes x and the gradient of w.
    assert turned[2] - turned[1] == turned[1] - turned[0] > 4 * 4 * (4 * 512 * 256 + 3 * 256 * 256)
    assert turned[1] == pytest.approx(2 * turned[0], rel=0.05)


def test_what_a_program_without_loops_reads_and_writes_is_what_the_compiler_counts():
    def loss(w, x):
        return jnp.tanh(jnp.tanh(x @ w) @ w.T)[:, :8].sum()

    w, x = (jax.ShapeDtypeStruct((size, 256), "f") for size in (256, 512))
    compiled = jax.jit(jax.grad(loss)).lower(w, x).compile()
    counted = compiled.cost_analysis()["bytes accessed"]
    assert hlo.memory_bytes(compiled.as_text()) == pytest.approx(counted, rel=1e-3)


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        # To the chip's own memory, whole and a part; from it; within it; in main memory.
        ("%b = (f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%main)", 32),
        ("%b = ((f32[8]{0}), f32[2]{0:S(1)}, s32[]{:S(2)}) slice-start(%main)", 8),
        ("%b = (f32[8]{0}, f32[8]{0:S(1)}, u32[]{:S(2)}) copy-start(%own)", 32),
        ("%b = f32[8]{0:S(1)} copy(%main)", 32),
        ("%b = f32[8]{0} all-reduce-start(%main)", 64),
        ("%b = ((f32[8]{0}), f32[8]{0}, s32[]) dynamic-update-slice-start(%main, %part, %i)", 16),
        ("%b = f32[8]{0:S(1)} add(%own, %own)", 0),
        ("%b = f32[8]{0} add(%own, %main)", 64),
        ("%b = f32[2]{0} slice(%main), slice={[0:2]}", 16),
        ("%b = f32[2]{0} slice(%own), slice={[0:2]}", 8),
        ("%b = f32[8]{0} dynamic-update-slice(%main, %part, %i)", 16),
        ("%b = f32[8]{0} fusion(%main, %own), kind=kLoop, calls=%sum", 64),
        ("%b = f32[8]{0:S(1)} fusion(%own, %own), kind=kLoop, calls=%sum", 0),
        ("%b = (f32[8]{0}, f32[8]{0:S(1)}) fusion(%own, %own), kind=kLoop, calls=%both", 32),
        # A fusion within it only gives the argument another shape.
        ("%b = f32[8]{0:S(1)} fusion(%main, %own), kind=kOutput, calls=%reshaped_sum", 32),
        # Two of the fusions that carry a collective on: its result, and their sums.
        (
            "%b = (f32[8]{0}, f32[2]{0}, f32[8]{0}) fusion(%part, %main), kind=kOutput, "
            "calls=%carry\n  %c = (f32[8]{0}, f32[2]{0}, f32[8]{0}) fusion(%part, %main), "
            "kind=kOutput, calls=%carry",
            32 + 2 * 64,
        ),
        # Whole tiles, of the axes in the order of the layout.
        (
            "%b = bf16[2,3,64,5]{2,0,1,3:T(8,128)(2,1)} iota(), iota_dimension=0",
            5 * 3 * 8 * 128 * 2,
        ),
        ("%b = f32[130]{0:T(128)} iota(), iota_dimension=0", 2 * 128 * 4),
    ],
)
def test_what_stays_on_the_chip_is_not_counted(line, moved):
    text = f"""HloModule m

%sum (p0: f32[8], p1: f32[8]) -> f32[8] {{
  %p0 = f32[8]{{0}} parameter(0)
  %p1 = f32[8]{{0}} parameter(1)
  ROOT %s = f32[8]{{0}} add(%p0, %p1)
}}

%reshaped (u0: f32[8]) -> f32[8] {{
  %u0 = f32[8]{{0}} parameter(0)
  ROOT %u = f32[8]{{0}} bitcast(%u0)
}}

%reshaped_sum (v0: f32[8], v1: f32[8]) -> f32[8] {{
  %v0 = f32[8]{{0}} parameter(0)
  %v1 = f32[8]{{0}} parameter(1)
  %v2 = f32[8]{{0}} fusion(%v0), kind=kLoop, calls=%reshaped
  ROOT %v = f32[8]{{0:S(1)}} add(%v2, %v1)
}}

%both (q0: f32[8], q1: f32[8]) -> (f32[8], f32[8]) {{
  %q0 = f32[8]{{0}} parameter(0)
  %q1 = f32[8]{{0}} parameter(1)
  %s0 = f32[8]{{0}} add(%q0, %q1)
  %s1 = f32[8]{{0}} subtract(%q0, %q1)
  ROOT %t = (f32[8]{{0}}, f32[8]{{0}}) tuple(%s0, %s1)
}}

%carry (r0: f32[2], r1: f32[8]) -> (f32[8], f32[2], f32[8]) {{
  %r0 = f32[2]{{0}} parameter(0)
  %r1 = f32[8]{{0}} parameter(1)
  %twice = f32[8]{{0}} add(%r1, %r1)
  %all = f32[8]{{0}} all-gather(%r0), channel_id=3, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
  ROOT %t = (f32[8]{{0}}, f32[2]{{0}}, f32[8]{{0}}) tuple(%twice, %r0, %all)
}}

ENTRY %main_spmd (main: f32[8], own: f32[8], part: f32[2], i: s32[]) -> f32[8] {{
  %main = f32[8]{{0}} parameter(0)
  %own = f32[8]{{0:S(1)}} parameter(1)
  %part = f32[2]{{0}} parameter(2)
  %i = s32[]{{:S(2)}} parameter(3)
  {line}
}}
"""
    assert hlo.memory_bytes(text) == moved


@pytest.mark.parametrize(
    ("line", "kind", "size", "group"),
    [
        ("%a = bf16[256,1024]{1,0} all-gather(%x), replica_groups=[4,4]<=[16]", 0, 524288, 4),
        ("%a = f32[8]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}", 1, 32, 2),
        ("%a = f32[8]{0} reduce-scatter(%x), replica_groups={{0,1,2}}", 2, 96, 3),
        (
            "%a = f32[8]{0} all-reduce(%x), replica_groups=mesh['a'=4,'b'=1,'c'=2], "
            "device_ids=([2,4]T(1,0)) {'c'}",
            1,
            32,
            2,
        ),
        (
            "%a = bf16[] all-reduce(%x), replica_groups=mesh['a'=4,'b'=2] {'a','b'}",
            1,
            2,
            8,
        ),
        (
            "%a = (f32[4]{0}, f32[16]{0}) all-gather-start(%x), replica_groups={{0,1,2,3}}",
            0,
            64,
            4,
        ),
        (
            "%a = (bf16[2,1]{1,0}, bf16[2,1]{1,0}, u32[]) collective-permute-start(%x), "
            "source_target_pairs={{0,1}}",
            4,
            4,
            2,
        ),
    ],
)
def test_collectives_are_read_from_text(line, kind, size, group):
    found = hlo.collectives(f"ENTRY %main (x: f32[1]) -> f32[1] {{\n  {line}\n}}\n")
    assert found == [hlo.Collective(hlo.KINDS[kind], size, group, 1)]


def test_sizes():
    assert parse_size("15.75G") == 15.75 * GIB
    assert parse_size("512") == 512


def test_a_folder_with_only_its_config_is_enough(tmp_path):
    folder = tmp_path / "any"
    folder.mkdir()
    fields = {"model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_layer": 3, "vocab_size": 64}
    (folder / "config.json").write_text(json.dumps(fields))
    config = small_config()
    config.llm.path, config.llm.layer = str(folder), 2.0
    config.slm.path = "checkpoints/t5-small"  # not there: the published geometry
    models = make_plan(config, "cpu")
    assert set(models.frozen) >= {"layers_0", "layers_1"} and "layers_2" not in models.frozen
    assert models.system.slm_config.width == 512
    assert not models.system.shared_vocabulary


def test_published_geometries_have_their_published_sizes():
    config = default()
    config.llm.path, config.slm.path = "flan-t5-xxl", "t5-base"
    models = make_plan(config, "tpu")
    count = sum(x.size for x in jax.tree.leaves(models.frozen))
    # Of the 11.3B parameters (arXiv 2210.11416, table 1: 11B) the encoder and the embedding.
    assert 4.5e9 < count < 5e9 and models.system.shared_vocabulary
    config.llm.path, config.slm.path = "llama-3-70b", "qwen3-0.6b"
    models = make_plan(config, "tpu")
    head = 128256 * 8192
    assert sum(x.size for x in jax.tree.leaves(models.frozen)) + head == pytest.approx(
        70.55e9, 1e-3
    )
    assert "prompt_map" in models.trained and not models.system.shared_vocabulary


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "expected --topology"),
        (["--topology=v9:2x2"], "libtpu has no such slice (Invalid TPU external name: TPU v9)"),
        (["--topology=v5e:3x5"], "larger ones in whole hosts of 2x2"),
        (["--topology=v5e"], "expected KIND:SHAPE, such as v5e:4x4"),
        (["--topology=cpu:8*3"], "3 slices do not split 8 devices; expected a multiple"),
        (["--topology=cpu:8*0"], "expected KIND:SHAPE"),
        (["--topology=cpu:8*2"], "config.mesh.slices=1: --topology=cpu:8*2 has 2; expected the"),
        (
            ["--topology=cpu:8*2", "--config.mesh.slices=2", "--config.mesh.data=1",
             "--config.mesh.fsdp=8"],
            "2 slices split data, expected a multiple of 2 there, as in data=2, fsdp=4, tensor=1",
        ),
        (["--topology=cpu:999"], "8 CPU devices already; expected at most cpu:8"),
        (["--topology=v5e:2x2", "--config.mesh.data=3"], "must be the number of devices, 4"),
        (["--topology=cpu:8", "--config.decoding.batch_size=12"], "expected a multiple of 8"),
        (["--topology=cpu:8", "--config.slm.train.batch_size=12"], "config.slm.train.batch_size"),
        (
            ["--topology=cpu:8", "--config.labels.source=llm", "--config.labels.batch_size=9"],
            "config.labels.batch_size=9: mesh data=8",
        ),
        (
            ["--topology=cpu:8", "--config.decoding.mesh.tensor=3"],
            "error: config.decoding.mesh: mesh data=-1, fsdp=1, tensor=3: the product must be",
        ),
        (
            ["--topology=cpu:8", "--config.features.cache=x", "--config.features.mesh.data=2",
             "--config.features.mesh.fsdp=2"],
            "error: config.features.mesh: mesh data=2, fsdp=2, tensor=1: the product must be",
        ),
        (
            ["--topology=cpu:8", "--config.decoding.mesh.data=1", "--config.decoding.mesh.tensor=8",
             "--config.slm.model.feed_forward_width=36"],
            "error: config.decoding.mesh: mesh data=1, fsdp=1, tensor=8: slm/decoder/layers_0",
        ),
        *(
            (
                ["--topology=cpu:8", *(f"--config.{flag}" for flag in (
                    of_section, f"{section}.mesh.data=1", f"{section}.mesh.tensor=8",
                    "llm.model.feed_forward_width=36",
                ))],
                f"error: config.{section}.mesh: mesh data=1, fsdp=1, tensor=8: encoder/layers_0",
            )
            for section, of_section in (
                ("features", "features.cache=x"), ("labels", "labels.source=llm"),
            )
        ),
        (["--topology=cpu:8", "--programs=fly"], "some of train,encode,prefill,decode,run"),
        (["--topology=cpu:8", "--mfu=0"], "--mfu=0: expected a share of the peak, above 0"),
        (["--topology=cpu:8", "--mfu=1.5"], "--mfu=1.5: expected a share of the peak"),
        (["--topology=cpu:8", "--mfu=nan"], "--mfu=nan: expected a share of the peak"),
        (["--topology=cpu:8", "--examples=0"], "--examples=0: expected a number above 0"),
        *(
            (
                ["--topology=cpu:8", f"--response_tokens={mean}"],
                f"--response_tokens={mean}: expected a mean from 1 to 8, the most that a response",
            )
            for mean in ("0.5", "9", "nan")
        ),
        (["--topology=cpu:8", "--config.decoding.weights=int8"], "expected 'float', for which"),
        (["--topology=cpu:8", "--price=-1"], "expected dollars per chip-hour"),
        (["--topology=cpu:8", "--batch_sizes=a"], "expected numbers above 0"),
        (
            ["--topology=cpu:8", "--batch_sizes=6", "--config.l2s.train.accumulation=4"],
            "--batch_sizes: 6: config.l2s.train",
        ),
        (["--topology=cpu:8", "--config.llm.layer=99"], "config.llm.layer"),
        (
            ["--topology=cpu:8", "--config.llm.path=gpt2", "--config.max_prompt_tokens=2048",
             "--config.buckets=((2048,32),)", "--config.llm.train.steps=0"],
            "gpt2: ",
        ),
        (
            ["--topology=cpu:8", "--config.llm.path=nowhere", "--config.llm.train.steps=0"],
            "neither a folder with a config.json nor the name of a published geometry",
        ),
        (
            ["--topology=cpu:3", "--config.decoding.batch_size=9", "--config.mesh.data=1",
             "--config.mesh.tensor=3", "--config.l2s.train.batch_size=9"],
            "does not divide into tensor=3",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(flags, message, tmp_path, capsys):
    config = tiny.write_task(tmp_path / "task")
    workdir = tmp_path / "work"
    assert tiny.run("--mode=plan", f"--config={config}", f"--workdir={workdir}", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("topology", "links"),
    [
        ("v5e:1x1", 0),
        ("v5e:2x2", 2),
        ("v5e:4x4", 2),
        ("v5e:8x8", 2),
        ("v6e:8x16", 3),
        ("v5e:16x16", 4),
        ("v5p:2x2x1", 2),
        ("v5p:2x4x4", 3),
        ("v5p:4x4x4", 6),
        ("v5p:4x4x8", 6),
    ],
)
def test_a_chip_in_a_corner_has_the_links_of_its_neighbours(topology, links):
    kind, _, text = topology.partition(":")
    shape, chip = tuple(map(int, text.split("x"))), CHIPS[kind]
    assert chip.least_links(shape) == links
    assert chip.sent_per_s(shape) == pytest.approx(chip.links / 2 * links / chip.ports)


def test_a_gpu_has_all_its_links_to_a_switch():
    assert CHIPS["h100"].sent_per_s((8,)) == 450e9


def everything(folder: Path) -> ConfigDict:
    """A run that has every stage."""
    config = small_config(data=4)
    config.llm.train.update(steps=5, batch_size=8)
    config.labels.update(source="llm", batch_size=8, max_new_tokens=5)
    config.labels.search.temperature = 0.5
    config.slm.train.update(steps=7, batch_size=8)
    config.features.cache = str(folder / "features")
    config.distillation.update(weight=0.5, batch_size=12)
    config.l2s.train.update(steps=11, parameter_scale=False)
    config.llm.tune.update(rank=2, steps=3)
    config.evaluation.update(max_examples=20, validation_examples=9)
    return config


def run_of(config: ConfigDict, topology: str, examples: int) -> Run:
    where = open_slice(topology)
    meshes = meshes_of(config, where, make_mesh(config, where), make_mesh)
    compilers = Compilers(make_plan(config, where.platform), config, where)
    return Run(compilers, meshes, examples)


def test_a_whole_run_has_all_its_stages_as_often_as_they_run(tmp_path):
    stages = list(run_of(everything(tmp_path), "cpu:4", 100).stages())
    answers = {"encode": 2, "prefill": 2, "decode": 16}
    assert {stage.name: (stage.rows, stage.times) for stage in stages} == {
        "llm": (8, {"train": 5}),
        # Of the 8 rows, which the mesh has four at least of, those are read for together; all are
        # filled 13 times by 100 examples and twice by 9 to validate with.
        "labels": (8, {"read": 28, "insert": 28, "advance": 60}),
        "logits": (12, {"score": 9}),
        "slm": (8, {"train": 7}),
        "features": (16, {"encode_for_cache": 8}),
        "l2s": (16, {"train": 11}),
        "l2s tuned": (16, {"train": 3}),
        **{
            f"evaluation: {name}": (16, answers) for name in ("llm", "slm", "l2s", "l2s_mismatched")
        },
    }
    assert {(stage.mesh.size, stage.groups) for stage in stages} == {(4, 1)}


def test_a_stage_of_a_run_has_its_mesh(tmp_path):
    config = everything(tmp_path)
    config.labels.mesh.update(data=2, fsdp=2)
    config.features.mesh.update(data=1, fsdp=4)
    config.decoding.mesh.update(data=1, tensor=4)
    meshes = {"labels": (2, 2, 1, 1), "logits": (2, 2, 1, 1), "features": (1, 4, 1, 1)}
    for stage in run_of(config, "cpu:4", 100).stages():
        default = (1, 1, 1, 4) if stage.name.startswith("evaluation") else (4, 1, 1, 1)
        assert tuple(stage.mesh.shape.values()) == meshes.get(stage.name, default), stage.name
        if stage.name == "features":
            (program,) = stage.compile().values()
            weights = sum(x.size * 4 for x in jax.tree.leaves(make_plan(config, "cpu").frozen))
            rows = config.l2s.train.batch_size // 4 * 16 * (4 + 1)
            # A fourth of what is split, and the norms and the bias whole.
            assert weights / 4 < program.arguments - rows < weights / 3


def test_what_the_llm_makes_of_rows_stays_with_their_devices(tmp_path):
    for stage in run_of(everything(tmp_path), "cpu:4", 100).stages():
        if stage.name in ("features", "logits"):
            (program,) = stage.compile().values()
            assert program.costs.flops and not program.costs.collectives


def test_what_a_run_costs_is_the_sum_of_its_stages(tmp_path, monkeypatch):
    compiled = ("labels", "logits", "slm", "features", "l2s tuned")
    every = Run.stages

    monkeypatch.setattr(command, "open_slice", rated)
    monkeypatch.setattr(
        Run, "stages", lambda self: (one for one in every(self) if one.name in compiled)
    )
    settings = {"programs": ["run"], "price": 2.0, "mfu": 0.01, "examples": 100}
    settings["response_tokens"] = 3.5
    run = planned(everything(tmp_path), tmp_path, "cpu:4", **settings)["run"]
    assert [stage["name"] for stage in run["stages"]] == list(compiled)
    for stage in run["stages"]:
        hours = real = 0.0
        for name, one in stage["programs"].items():
            assert one["roofline_ms"] == max(v for k, v in one.items() if k[-3:] == "_ms")
            hours += one["roofline_ms"] * stage["times"][name] / 3_600_000
            at_share = max(one["roofline_ms"], one["compute_ms"] * 100)
            real += at_share * stage["times"][name] / 3_600_000
        assert stage["fits"] and stage["hours"] == pytest.approx(hours) and hours > 0
        assert stage["estimated_hours"] == pytest.approx(real)
        assert stage["dollars"] == pytest.approx(hours * 4 * 2.0)
    for name in ("hours", "dollars", "estimated_hours", "estimated_dollars"):
        assert run["total"][name] == pytest.approx(sum(stage[name] for stage in run["stages"]))
    text = (tmp_path / "plan.md").read_text()
    assert "| labels | data=4, fsdp=1, tensor=1 | 8 | read 28 x " in text
    assert run["response_tokens"] == 3.5 and "has 3.5 tokens on average" in text
    assert "hours at 1% of the FLOPs" in text and "\n| total |" in text


def test_where_there_are_no_rates_the_plan_says_so(tmp_path):
    planned(small_config(data=4), tmp_path, "cpu:4", programs=["encode"])
    text = (tmp_path / "plan.md").read_text()
    assert "There are no rates of cpu here, so no times: of slices v5e, v5p, v6e have them." in text


def test_each_host_with_whole_copies_answers_other_prompts():
    config = small_config(data=16)
    config.evaluation.max_examples = 100
    last = list(run_of(config, "v5e:4x4", 9).stages())[-1]
    # Four hosts of four chips, each with 16 prompts at a time: two batches.
    assert (last.mesh.size, last.groups, last.times["encode"]) == (4, 4, 2)


def test_a_host_that_splits_the_model_between_its_chips_has_a_slice_of_its_own():
    config = small_config(data=16)
    config.decoding.mesh.update(data=-1, tensor=2)
    last = list(run_of(config, "v5e:4x4", 9).stages())[-1]
    assert (last.name, last.mesh.size, last.groups) == ("evaluation: l2s_mismatched", 4, 4)
    # Of the slice's chips, the first host has the numbers 0, 1, 4 and 5.
    assert sorted(device.id for device in last.mesh.devices.flat) == [0, 1, 2, 3]
    programs = last.compile()
    assert programs.keys() == {"encode", "prefill", "decode"}
    assert sum(one.times for one in programs["decode"].costs.collectives)


def test_the_train_split_is_counted_where_it_is_at_hand(tmp_path):
    tiny.write_task(tmp_path / "task")
    config = default()
    config.task.update(name="reverse", source="jsonl", data_dir=str(tmp_path / "task"))
    config.task.response = "reversed"
    config.task.prompt = "reverse: {words}"
    config.task.splits = ConfigDict({"train": "train.jsonl", "test": "test.jsonl"})
    assert examples_of(config, "train") == 64
    config.task.data_dir = str(tmp_path / "nowhere")
    assert examples_of(config, "train") is None


def test_without_libtpu_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"libtpu.*not installed.*l2s-jax\[tpu\]"):
        open_slice("v5e:2x2")


def test_the_command_makes_its_own_cpu_devices(tmp_path):
    """In a process that was started with one."""
    config = tiny.write_task(tmp_path / "task")
    command = [sys.executable, "-m", "l2s_jax.main", "--mode=plan", f"--config={config}"]
    command += [f"--workdir={tmp_path}", "--topology=cpu:16", "--programs=encode"]
    command += ["--config.decoding.batch_size=16"]
    command += [f"--config.{name}.train.batch_size=16" for name in ("llm", "slm", "l2s")]
    result = subprocess.run(
        command, cwd=ROOT, env={"PATH": "", "HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "plan.json").read_text())
    assert report["chips"] == 16 and report["mesh"]["data"] == 16
    assert np.isfinite(report["programs"]["encode"]["flops"])


def test_a_beam_search_is_planned_as_greedy_decoding(tmp_path):
    config = small_config(data=8)
    config.decoding.search.update(num_beams=4, num_return=2, length_penalty=0.6)
    config.decoding.search.early_stopping = True
    report = planned(config, tmp_path, "cpu:8", programs=("prefill",))
    assert list(report["programs"]) == ["prefill"]
