"""Rows that are refilled, as a plan has them: the programs of a run, as often as it runs them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lane import Numbers
from test_plan import devices, everything, planned, rated, run_of, small_config

from l2s_jax.decoding import slots
from l2s_jax.plan import command, costs, hlo
from l2s_jax.plan.command import make_mesh
from l2s_jax.plan.models import make_plan
from l2s_jax.plan.programs import Compilers
from l2s_jax.plan.slices import open_slice
from l2s_jax.plan.stages import Run, answering_mesh, meshes_of
from l2s_jax.plan.target import Target
from l2s_jax.serving.generator import Generator
from l2s_jax.serving.refilled import Refilled
from l2s_jax.settings.search import Search

__all__ = ["devices"]  # a fixture that every test here has

PROMPTS, NEW = 70, 9


def shapes_of(tree) -> list[tuple]:
    """(shape, dtype, shape of a device's part) of each leaf."""

    def one(leaf):
        at = getattr(leaf, "sharding", None)
        part = at.shard_shape(leaf.shape) if at else np.shape(leaf)
        return np.shape(leaf), jnp.result_type(leaf), part

    return [one(leaf) for leaf in jax.tree.leaves(tree)]


def held(tree) -> int:
    """Bytes on the first device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def test_its_programs_are_those_of_a_run_as_often_as_it_runs_them(monkeypatch):
    config = small_config(data=2, tensor=2)
    config.evaluation.max_examples = PROMPTS
    run = run_of(config, "cpu:4", 100)
    stage = next(one for one in run.stages() if one.name == "evaluation: l2s")
    compiler, made, beside = stage.compiler, [], []
    compile_it, measured = Target.compile, Target.measured

    def compiling(target, function, arguments):
        made.append(arguments)
        return compile_it(target, function, arguments)

    def measuring(target, one, *given, **named):
        beside.append(one.beside)
        return measured(target, one, *given, **named)

    monkeypatch.setattr(Target, "compile", compiling)
    monkeypatch.setattr(Target, "measured", measuring)
    programs = stage.compile()
    planned = dict(zip(programs, made, strict=True))
    assert list(programs) == ["read", "insert", "advance"]
    # Of a row: attention to itself and to the prompt, their keys, the feed-forward part, the head.
    row = 2 * (4 * 32 * 32 + 2 * 32 * 32 + 2 * 32 * (NEW + 16) + 2 * 32 * 64 + 32 * 64)
    assert row * 16 / 4 < programs["advance"].costs.flops < 1.2 * row * 16 / 4

    params = jax.jit(compiler.plan.system.init)(jax.random.key(0))
    frozen = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), compiler.plan.frozen)
    generator = Generator(
        compiler.plan.system, params, frozen, Numbers(), Numbers(), prompt_lengths=(16,),
        max_new_tokens=NEW, batch_size=16, search=Search(min_new_tokens=NEW), mesh=compiler.mesh,
    )  # fmt: skip
    calls, sizes, steps = [], set(), 0
    real = {name: getattr(slots, name) for name in programs}

    def recorded(name):
        def call(*given, **named):
            nonlocal steps
            inputs = given if name == "insert" else given[1:]
            calls.append((name, shapes_of(inputs)))
            if name == "insert":
                sizes.add(held(inputs[0]))
            # The first token of a response takes no step.
            first = name == "advance" and bool(inputs[2].fresh.any())
            found = real[name](*given, **named)
            if name == "advance":
                steps += int(found[1].steps) - first
            return found

        return call

    for name in programs:
        monkeypatch.setattr(slots, name, recorded(name))
    prompts = [str(2 + i % 7) for i in range(PROMPTS)]
    answered = Refilled(generator).generate(prompts)
    assert {output.tokens for output in answered} == {NEW}
    for name, found in calls:
        assert found == shapes_of(planned[name]), name
    names = [name for name, _ in calls]
    assert stage.times == {"read": names.count("read"), "insert": names.count("insert"),
                           "advance": steps}  # fmt: skip
    # While prompts are read, all rows are held; while they are put there, the weights.
    assert beside == [*sizes, held((generator.trained, generator.frozen)), 0]


def test_a_mean_of_tokens_is_what_steps_are_counted_by(tmp_path):
    config = everything(tmp_path)
    config.evaluation.max_examples = 200
    where = open_slice("cpu:4")
    meshes = meshes_of(config, where, make_mesh(config, where), make_mesh)
    compilers = Compilers(make_plan(config, "cpu"), config, where)
    stages = {one.name: one for one in Run(compilers, meshes, 100, 3.5).stages()}
    # 13 times 8 rows of 100 prompts and 2 of 9, of 3.5 tokens after the first of which are 2.5.
    assert stages["labels"].times == {"read": 28, "insert": 28, "advance": 33 + 5}
    # 13 times 16 rows; four are read for together.
    assert stages["evaluation: slm"].times == {"read": 50, "insert": 50, "advance": 33}
    # The control has batches.
    control = stages["evaluation: l2s_mismatched"]
    assert control.times == {"encode": 13, "prefill": 13, "decode": 33}
    # No response is longer than it may be: labels have 5 tokens.
    stages = {one.name: one for one in Run(compilers, meshes, 100, 8.0).stages()}
    assert stages["labels"].times["advance"] == (13 + 2) * 4
    assert stages["evaluation: slm"].times["advance"] == 13 * 7


@pytest.mark.parametrize(
    ("settings", "refilled"),
    [
        ({}, True),
        ({"temperature": 0.5}, True),
        ({"num_beams": 2}, False),
        ({"stop": ("x",)}, False),
    ],
)
def test_a_search_that_a_run_answers_in_batches_is_planned_so(settings, refilled):
    config = small_config(data=4)
    config.evaluation.max_examples = 64
    config.decoding.search.update(settings)
    names = [set(stage.times) for stage in run_of(config, "cpu:4", 9).stages()]
    assert names[-2] == ({"read", "insert", "advance"} if refilled else names[-1])
    config.evaluation.max_examples = 63
    assert set(list(run_of(config, "cpu:4", 9).stages())[-2].times) == names[-1]


def test_one_turn_of_a_loop_without_a_known_end_is_what_a_step_costs():
    def loop(x, w, count, wanted):
        def turn(state):
            i, x = state
            x = jnp.tanh(x @ w)
            return i + 1, jax.lax.cond(wanted, lambda: jnp.sort(jnp.sin(x)), lambda: x)

        before = jnp.sort(x @ w @ w @ w)
        return jax.lax.while_loop(lambda state: state[0] < count, turn, (0, before))

    found = []
    for width in (256, 512):
        shapes = ((64, width), (width, width))
        x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        count, wanted = jnp.int32(3), jnp.bool_(True)
        text = jax.jit(loop).lower(x, w, count, wanted).compile().as_text()
        found.append(hlo.memory_bytes(text, turn=True))
        read = 4 * math.prod(shapes[1])
        some = 4 * math.prod(shapes[0])
        # The weights, and the rows, there and back, as often as they are copied; no sort.
        assert read + 2 * some <= found[-1] <= read + 10 * some
        assert hlo.memory_bytes(text) > found[-1] + 3 * read
    assert found[0] < found[1]


def test_what_is_scattered_counts_and_not_what_it_is_scattered_into():
    text = """HloModule m

%one (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %b = f32[] parameter(1)
}

ENTRY %main (rows: f32[64,128], places: s32[2,1], new: f32[2,128]) -> f32[64,128] {
  %rows = f32[64,128]{1,0} parameter(0)
  %places = s32[2,1]{1,0} parameter(1)
  %new = f32[2,128]{1,0} parameter(2)
  ROOT %all = f32[64,128]{1,0} scatter(%rows, %places, %new), to_apply=%one
}
"""
    assert hlo.memory_bytes(text) == 2 * 2 * 128 * 4


def test_a_sweep_ranks_the_meshes_of_labels_by_their_tokens_per_second(tmp_path, monkeypatch):
    config = small_config(data=2)
    config.labels.source, config.labels.batch_size = "llm", 8
    config.labels.mesh.update(data=2, fsdp=1, tensor=1)

    monkeypatch.setattr(command, "open_slice", rated)
    monkeypatch.setattr(Run, "stages", lambda self: iter(()))
    settings = {"programs": ["run"], "examples": 100, "sweep": True, "response_tokens": 5.0}
    sweep = planned(config, tmp_path, "cpu:2", **settings)["sweep"]
    assert list(sweep) == ["labels"]
    rows = sweep["labels"]
    shapes = {tuple(row["mesh"].values()) for row in rows}
    assert shapes == {(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 1, 2)}
    rates = [row["tokens_per_s"] for row in rows]
    assert rates == sorted(rates, reverse=True) and rates[-1] > 0
    assert all(0 < row["peak"] < 1 << 20 for row in rows)
    # Of 8 rows one is read for at a time on either device; of 5 tokens the first comes of reading.
    where = rated("cpu:2")
    meshes = meshes_of(config, where, make_mesh(config, where), make_mesh)
    run = Run(Compilers(make_plan(config, "cpu"), config, where), meshes, 100, 5.0)
    stage, tokens = run.labels_of_all_rows(meshes.labels, 8)
    assert tokens == 8 * 5
    assert stage.times == {"read": 4, "insert": 4, "advance": 4}
    programs = costs.stage_report(stage, where, None, None)["programs"]
    seconds = (
        sum(programs[name]["roofline_ms"] * times for name, times in stage.times.items()) / 1e3
    )
    (rate,) = [row["tokens_per_s"] for row in rows if row["mesh"]["data"] == 2]
    assert rate == pytest.approx(40 / seconds)
    assert "\n| labels | 2 | 1 | 1 | 1 | 8 | " in (tmp_path / "plan.md").read_text()


def test_hosts_with_whole_copies_label_apart_and_their_tokens_add_up():
    config = small_config(data=16)
    config.labels.source, config.labels.batch_size = "llm", 16
    where = open_slice("v5e:4x4")
    mesh = make_mesh(config, where, "labels")
    own = answering_mesh(where, mesh)
    assert own.size == 4 and own == answering_mesh(where, mesh)  # so that nothing is compiled twice
    meshes = meshes_of(config, where, make_mesh(config, where), make_mesh)
    run = Run(Compilers(make_plan(config, "tpu"), config, where), meshes, 100, 5.0)
    stage, tokens = run.labels_of_all_rows(own, 16)
    assert (stage.groups, stage.rows, tokens) == (4, 16, 4 * 16 * 5)


def test_batches_of_a_sweep_are_those_of_labels_too():
    config = small_config(data=2)
    config.labels.source = "llm"
    assert command.with_rows(config, 24).labels.batch_size == 24
