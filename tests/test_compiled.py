"""Training steps that a plan leaves for a run: taken as they are, or refused in one line."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tiny
from emulator import AT
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from l2s_jax import files, sealed
from l2s_jax.cluster import libtpu, sharding
from l2s_jax.config import buckets_of
from l2s_jax.experiment.workdir import read_config
from l2s_jax.models import serving
from l2s_jax.models.families import make_config
from l2s_jax.models.products import Transposed
from l2s_jax.models.systems import LanguageModel
from l2s_jax.plan import kept
from l2s_jax.plan.command import make_mesh
from l2s_jax.plan.models import make_plan
from l2s_jax.plan.programs import Compilers
from l2s_jax.plan.slices import open_slice
from l2s_jax.plan.stages import trainings_of
from l2s_jax.training.compiled import INDEX, CompiledSteps, Writer, surroundings
from l2s_jax.training.update import batch_loss
from tests.test_plan import small_config

CHILD = Path(__file__).with_name("compiled_child.py")
# Two devices, for which programs compile sooner than for the eight that other tests have.
ENVIRONMENT = os.environ | {
    "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
}
MESH = "--config.mesh.fsdp=2"
SMALL = """
    for section in (config.llm, config.slm, config.l2s):
        section.train.update(clip_norm=0.0, parameter_scale=False)
        section.train.trainable = (".*/decoder/.*norm/scale",)
    config.l2s.train.trainable = ("projector/.*",)
    config.evaluation.samples = 0
    return config
"""


def model(workdir: Path) -> dict[str, str]:
    """The hash of each file with weights of L2S, of which there is one at least."""
    paths = list((workdir / "l2s" / "model").glob("*.safetensors"))
    assert paths
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module", autouse=True)
def _all_devices():
    """A plan that came first would leave JAX with no more devices than it is for."""
    assert jax.device_count() == 8


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """(arguments of a run, the folder with its steps)."""
    root = tmp_path_factory.mktemp("planned")
    config = tiny.write_task(root / "data")
    # Of few parameters and one bucket there is little to compile; `_steps` has the others.
    text = config.read_text()
    config.write_text(text.replace("    return config", SMALL))
    arguments = (f"--config={config}", MESH)
    flags = ("--mode=plan", "--topology=cpu:2", "--programs=encode", f"--compiled={root / 'steps'}")
    assert tiny.run(*arguments, *flags, f"--workdir={root / 'plan'}") == 0
    return arguments, root / "steps"


def run_apart(root: Path, *arguments: str) -> tuple[subprocess.CompletedProcess, dict]:
    """A run in another process, whose workdir is root/run; what it compiled and loaded."""
    command = [sys.executable, str(CHILD), str(root / "counts.json"), *arguments]
    command += [f"--workdir={root / 'run'}", "--until=l2s"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    return done, json.loads((root / "counts.json").read_text())


@pytest.fixture(scope="module")
def run(planned, tmp_path_factory):
    """(workdir, what was compiled and loaded) of a run with the steps of the plan."""
    arguments, steps = planned
    root = tmp_path_factory.mktemp("run")
    done, counts = run_apart(root, *arguments, f"--compiled={steps}")
    assert done.returncode == 0, done.stderr
    return root / "run", counts


def test_a_run_in_another_process_compiles_no_training_step(planned, run):
    _, steps = planned
    _, counts = run
    assert any("all_finite" in name for name in counts["compiled"])
    assert not any("train_step" in name for name in counts["compiled"])
    sizes = [path.stat().st_size for path in steps.glob("*.step")]
    assert sorted(counts["loaded"]) == sorted(sizes)
    assert len(sizes) == 3


def test_its_model_is_that_of_a_run_that_compiles_bit_for_bit(planned, run, tmp_path):
    arguments, _ = planned
    shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "l2s")
    done, counts = run_apart(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert sum("train_step" in name for name in counts["compiled"]) == 1
    assert model(tmp_path / "run") == model(run[0])


def test_another_config_is_refused_before_any_work(planned, tmp_path):
    arguments, steps = planned
    changed = (*arguments, f"--compiled={steps}", "--config.l2s.train.adam_b2=0.9")
    done, counts = run_apart(tmp_path, *changed)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: {steps}/{INDEX}: compiled for another run: train.adam_b2 of l2s is 0.98, "
        "expected 0.9; make the plan again, or leave out --compiled"
    )
    assert counts["loaded"] == []
    assert not (tmp_path / "run").exists()


def test_what_does_not_change_a_step_may_differ(planned, run):
    _, steps = planned
    config = read_config(str(run[0]))
    for section in (config.llm, config.slm, config.l2s):
        section.train.update(evaluate_every=3, log_every=2, save_minutes=1.0)
    config.decoding.max_new_tokens = 5
    kept.find(str(steps), config, jax.devices()[:2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"buckets": ((16, 24), (32, 32))}, ("no step of llm for the bucket 16x24",)),
        ({"train_seed": 3}, ("seed of slm is 0, expected 3;",)),
        ({"l2s.fusion": "replace"}, ("system.fusion of l2s is 'add', expected 'replace';",)),
        ({"slm.vocabulary": "responses"}, ("config.slm.vocabulary='responses'", "'all'")),
        (
            {"mesh.data": 2, "mesh.fsdp": 1},
            ("is data=1, fsdp=2, tensor=1, expected data=2, fsdp=1,",),
        ),
    ],
)
def test_other_programs_are_refused(planned, run, change, words):
    _, steps = planned
    config = read_config(str(run[0]))
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError) as error:
        kept.find(str(steps), config, jax.devices()[:2])
    assert all(word in str(error.value) for word in words), error.value


def test_every_bucket_of_every_training_is_kept():
    config = small_config()
    config.buckets = ((8, 8), (16, 16))
    config.llm.tune.update(rank=2, learning_rate=0.5)
    config.train_seed = 7
    where = open_slice("cpu:1")
    mesh = make_mesh(config, where)
    compilers = Compilers(make_plan(config, "cpu"), config, where)
    steps = list(kept._steps(compilers, mesh))
    stages = ("llm", "slm", "l2s_frozen", "l2s")
    assert [(stage, bucket) for stage, bucket, _ in steps] == [
        (stage, bucket) for stage in stages for bucket in config.buckets
    ]
    for stage, bucket, compiler in steps:
        step = compiler.training_step(bucket)
        batch, facts = step.arguments[2], step.facts
        assert batch["response_ids"].shape == (step.arguments[2]["response_mask"].shape)
        assert batch["response_ids"].shape[1] == bucket[1]
        assert facts["seed"] == ("0" if stage == "llm" else "7")
        assert (facts["train.learning_rate"] == "0.5") == (stage == "l2s")


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("devices", [1, 2])
def test_what_encodes_is_planned_as_a_run_reads_it(devices, scan_layers, monkeypatch):
    monkeypatch.setattr(serving, "LEAST_TRANSPOSED", 1)
    config = small_config(fsdp=devices)
    config.scan_layers = scan_layers
    where = open_slice(f"cpu:{devices}")
    compilers = Compilers(make_plan(config, "cpu"), config, where)
    (compiler,) = [
        compiler
        for stage, _, compiler in kept._steps(compilers, make_mesh(config, where))
        if stage == "l2s"
    ]
    step, _ = compiler.compiled_step(config.buckets[-1])
    frozen = step.arguments[1]
    kernels = [
        leaf for path, leaf in flatten_dict(frozen, sep="/").items() if path.endswith("/kernel")
    ]
    assert kernels
    assert all(isinstance(leaf, Transposed) == (devices == 1) for leaf in kernels)


def test_a_step_is_not_loaded_for_another_system_than_the_plan_knew(planned, run):
    """What the data decide, such as a tokenizer's ids, is known when a stage begins."""
    _, steps = planned
    config = read_config(str(run[0]))
    where = open_slice("cpu:2")
    mesh = make_mesh(config, where)
    found = CompiledSteps(str(steps), mesh)
    training = next(one for one in trainings_of(config) if one.stage == "slm")
    compilers = Compilers(make_plan(config, "cpu"), config, where)
    compiler = compilers.of("slm", mesh, training.work)
    plan = compiler.plan
    arguments = compiler.training_step(buckets_of(config)[0]).arguments
    other = dataclasses.replace(plan.system.config, decoder_start_id=3)
    system = dataclasses.replace(plan.system, config=other)
    step = found.step("slm", system, config.slm.train, 0, None)
    begun_before = found.step("slm", plan.system, config.slm.train, 0, None, prng="rbg")
    with pytest.raises(ValueError, match="prng of slm is 'threefry2x32', expected 'rbg'"):
        begun_before(*arguments)
    with pytest.raises(ValueError, match=r"\.decoder_start_id of slm is 0, expected 3"):
        step(*arguments)


@pytest.mark.parametrize("family", ["t5", "gpt2", "gpt_neox", "llama"])
def test_where_responses_end_is_in_no_step(family):
    """A tokenizer says it, which a plan need not have."""
    geometry = {"num_layers": 1} if family != "t5" else {}
    geometry |= {"head_width": 16, "num_kv_heads": 1} if family == "llama" else {}
    if family == "t5":
        geometry |= {"num_encoder_layers": 1, "num_decoder_layers": 1, "head_width": 8}
    whole = make_config(
        family, vocab_size=8, width=16, num_heads=1, feed_forward_width=16, pad_id=0, eos_id=1,
        **geometry,
    )  # fmt: skip
    other = dataclasses.replace(whole, pad_id=2, eos_id=3)
    assert program(LanguageModel("slm", whole)) == program(LanguageModel("slm", other))


def test_an_llm_that_only_encodes_has_no_dropout_in_a_step():
    """A checkpoint of one that was trained before says what it was trained with."""
    system = small.make_system("add")
    llm = dataclasses.replace(system.llm_config, dropout_rate=0.5)
    assert program(system) == program(dataclasses.replace(system, llm_config=llm))


def program(system) -> str:
    """The text of the gradient of a system's loss, with dropout."""
    params, frozen = small.make_params(system)
    batch = {
        f"{name}_{kind}": jax.ShapeDtypeStruct((2, 4), dtype)
        for name in (system.prompt_name, "response")
        for kind, dtype in (("ids", jnp.int32), ("mask", jnp.bool_))
    }

    def loss(params, frozen, batch):
        return batch_loss(system, params, frozen, batch, jax.random.key(0), 0.0)[0]

    return jax.jit(jax.grad(loss)).lower(params, frozen, batch).as_text()


@pytest.fixture
def folder(tmp_path):
    """A folder with one step, and the mesh that it is for."""
    mesh = sharding.make_mesh({"data": -1})
    with Writer(str(tmp_path), mesh) as writer:
        add(writer, mesh, 1.0)
    return tmp_path, mesh


def add(writer: Writer, mesh, number: float) -> int:
    function = jax.jit(lambda state, _, batch: (state + number, {"loss": batch["x"].sum()}))
    placed = NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=placed)
    with kept._without_cache():
        compiled = function.lower(x, {}, {"x": x}).compile()
    return writer.add("s", {"a": "1"}, "4x4", {"x": x}, compiled)


def change(directory: Path, *path: str, value: object) -> None:
    """Changes what compiled.json says, as whoever wrote it would have."""
    index = files.read_json(str(directory / INDEX))
    del index["sha256"]
    place = index
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    files.write_json(str(directory / INDEX), sealed.with_hash(index))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("the version of jax", "0.0.1"),
        ("the version of jaxlib", "0.0.1"),
        ("the code of l2s_jax", "0123456789abcdef"),
        ("the number and kind of devices", "4 x TPU v5 lite"),
        ("device 3 of the mesh", "7"),
        ("XLA_FLAGS", "--xla_x=1"),
        ("jax_default_matmul_precision", "highest"),
        ("the processor", "x86_64, 0123456789abcdef"),
    ],
)
def test_other_surroundings_are_refused_by_name(folder, name, value):
    directory, mesh = folder
    mine = files.read_json(str(directory / INDEX))["surroundings"][name]
    change(directory, "surroundings", name, value=value)
    with pytest.raises(ValueError) as error:
        CompiledSteps(str(directory), mesh)
    assert str(error.value).startswith(f"{directory}/{INDEX}: compiled for another run: {name} is ")
    assert f" is {value}, expected {mine or 'nothing'};" in str(error.value)


def test_damaged_and_foreign_files_are_refused(folder):
    directory, mesh = folder

    def refused() -> str:
        with pytest.raises(ValueError) as error:
            CompiledSteps(str(directory), mesh)
        assert "\n" not in str(error.value)
        return str(error.value)

    CompiledSteps(str(directory), mesh)
    (step,) = directory.glob("*.step")
    content = step.read_bytes()
    step.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert refused().startswith(f"{step}: damaged")
    step.unlink()
    assert refused() == f"{step}: no such file, which {INDEX} names"
    step.write_bytes(content)
    index = directory / INDEX
    text = index.read_text()
    index.write_text(text.replace('"a": "1"', '"a": "2"'))
    assert refused().startswith(f"{index}: damaged")
    for other in ("{}", '{"kind": "training steps compiled by l2s_jax"}'):
        index.write_text(other)
        assert refused().startswith(f"{index}: ")
    with pytest.raises(ValueError, match="damaged"):
        Writer(str(directory), mesh)
    index.write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="not ours"):
        Writer(str(directory), mesh)
    index.unlink()
    assert refused() == f"{index}: no such file"


def test_a_file_that_is_no_step_is_one_line(folder):
    directory, mesh = folder
    (step,) = directory.glob("*.step")
    step.write_bytes(b"no pickle")
    hash = hashlib.sha256(b"no pickle").hexdigest()
    change(directory, "stages", "s", "buckets", "4x4", "sha256", value=hash)
    found = CompiledSteps(str(directory), mesh)
    x = jax.device_put(np.ones(4, np.float32), NamedSharding(mesh, P()))
    with pytest.raises(ValueError, match=rf"^{step}: cannot be loaded: "):
        found._load("s", "4x4", x, {}, {"x": x})


def test_a_second_plan_takes_the_place_of_the_first(folder):
    directory, mesh = folder
    (before,) = directory.glob("*.step")
    (directory / "mine.txt").write_text("mine")
    index = (directory / INDEX).read_bytes()
    with pytest.raises(KeyboardInterrupt), Writer(str(directory), mesh) as writer:
        add(writer, mesh, 2.0)
        raise KeyboardInterrupt
    assert list(directory.glob("*.step")) == [before]
    assert (directory / INDEX).read_bytes() == index
    with Writer(str(directory), mesh) as writer:
        add(writer, mesh, 2.0)
    (after,) = directory.glob("*.step")
    assert after != before
    assert (directory / "mine.txt").read_text() == "mine"
    x = jax.device_put(np.ones(4, np.float32), NamedSharding(mesh, P()))
    step = CompiledSteps(str(directory), mesh)._load("s", "4x4", x, {}, {"x": x})
    state, metrics = step(x, {}, {"x": x})
    assert (np.asarray(state).tolist(), float(metrics["loss"])) == ([3.0] * 4, 4.0)


def test_a_bucket_keeps_them_as_a_disk_does(store):
    directory, mesh = f"{AT}/steps", sharding.make_mesh({"data": -1})
    for number in (1.0, 2.0):
        with Writer(directory, mesh) as writer:
            add(writer, mesh, number)
    (path,) = files.matching_names(directory, "*.step")
    x = jax.device_put(np.ones(4, np.float32), NamedSharding(mesh, P()))
    step = CompiledSteps(directory, mesh)._load("s", "4x4", x, {}, {"x": x})
    assert np.asarray(step(x, {}, {"x": x})[0]).tolist() == [3.0] * 4
    files.write_bytes(path, b"damaged")
    with pytest.raises(ValueError, match=rf"^{path}: damaged"):
        CompiledSteps(directory, mesh)


def test_the_flag_is_of_plans_and_of_training(tmp_path, capfd):
    assert tiny.run("--mode=evaluate", f"--workdir={tmp_path}", "--compiled=steps") == 2
    assert "--compiled=steps: expected --mode=plan or train" in capfd.readouterr().err


def test_steps_of_a_tpu_are_written_without_one(tmp_path):
    mesh = make_mesh(small_config(data=2, fsdp=2), open_slice("v5e:2x2"))
    with Writer(str(tmp_path), mesh) as writer:
        size = add(writer, mesh, 1.0)
    (path,) = tmp_path.glob("*.step")
    assert path.stat().st_size == size
    assert b"TPU v5 lite" in path.read_bytes()
    facts = files.read_json(str(tmp_path / INDEX))["surroundings"]
    assert facts["the number and kind of devices"] == "4 x TPU v5 lite"
    assert facts["device 1 of the mesh"] == "1 at (1, 0, 0), core 0 of slice 0"
    assert facts["the version of libtpu"] == importlib.metadata.version("libtpu")
    with pytest.raises(ValueError, match=r"is 4 x TPU v5 lite, expected 8 x cpu"):
        CompiledSteps(str(tmp_path), sharding.make_mesh({"data": -1}))


def test_what_libtpu_is_told_is_a_fact_of_tpus_alone(monkeypatch):
    assert "LIBTPU_INIT_ARGS" not in surroundings(sharding.one_device())
    told = []
    # JAX adds a flag on a TPU's host, where it may be before or after us.
    for flags in ("", "--xla_tpu_use_enhanced_launch_barrier=true"):
        monkeypatch.setenv("LIBTPU_INIT_ARGS", flags)
        libtpu.prepare()
        mesh = sharding.make_mesh({"data": -1}, open_slice("v5e:2x2").devices)
        told.append(surroundings(mesh)["LIBTPU_INIT_ARGS"])
    assert told[0] == told[1] != ""
