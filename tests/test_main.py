"""The whole main job by its command: stages, report, generation from a workdir alone."""

import io
import json
import os
import shutil
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from l2s_jax import sealed
from l2s_jax.cluster import sharding
from l2s_jax.evaluation.generators import load
from l2s_jax.evaluation.latency import Stopwatch
from l2s_jax.experiment.experiment import Experiment
from l2s_jax.experiment.workdir import read_config
from l2s_jax.serving.loading import load_generator

# Of what decodes, where all else is on a mesh of data=8.
MESH = ("--config.decoding.mesh.data=2", "--config.decoding.mesh.tensor=4")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(config path, workdir) of a finished run."""
    root = tmp_path_factory.mktemp("job")
    config = tiny.write_task(root / "data")
    one, two = (f"latency.update(\n        batch_size={rows}," for rows in (1, 2))
    config.write_text(config.read_text().replace(one, two))
    assert tiny.run(f"--config={config}", f"--workdir={root / 'run'}") == 0
    return config, root / "run"


def report_of(workdir):
    return json.loads((workdir / "report.json").read_text())


def test_report_has_every_system_with_quality_and_latency(job):
    _, workdir = job
    report = report_of(workdir)
    assert list(report["systems"]) == ["llm", "slm", "l2s", "l2s_mismatched"]
    for system in report["systems"].values():
        assert set(system["quality"]) == {"bleu", "chrf"}
        assert system["latency"]["batch_size"] == 1
        assert system["latency_batch"]["batch_size"] == 2
        assert system["latency"]["total_ms"] > 0
    assert set(report["l2s_vs_llm"]) >= {"quality_ratio", "speedup"}
    assert report["task"]["examples"] == 11
    pairs = ["l2s_vs_llm", "l2s_vs_slm", "l2s_mismatched_vs_l2s"]
    assert list(report["significance"]) == pairs
    assert all(set(found) == {"bleu", "chrf"} for found in report["significance"].values())
    for name in ("report.md", "quality_latency.png", "quality_latency.svg", "config.json"):
        assert (workdir / name).stat().st_size > 0


def test_what_is_remembered_of_files_is_doubted_on_request(job, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("L2S_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sealed, "_LARGE", 1)
    copy = shutil.copytree(job[1], tmp_path / "run")
    generate = ("--mode=generate", f"--workdir={copy}", f"--input={tmp_path / 'in.txt'}")
    (tmp_path / "in.txt").write_text("one two\n")

    def run(*flags):
        sealed._known.clear()  # as in another process
        status = tiny.run(*generate, *flags)
        return status, capsys.readouterr()

    status, (answer, _) = run("--verify")
    assert status == 0 and answer.count("\n") == 1
    # A turned bit that left no other trace.
    for name in ("l2s/model/params.safetensors", "slm/model/model.safetensors"):
        path = copy / name
        age, content = path.stat(), path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(path, ns=(age.st_atime_ns, age.st_mtime_ns))
        assert run()[0] == 0
        status, (_, error) = run("--verify")
        assert status == 2 and f"{path}: damaged" in error.splitlines()[-1]
        assert tiny.run("--mode=status", f"--workdir={copy}", "--verify") == 2
        path.write_bytes(content)
        os.utime(path, ns=(age.st_atime_ns, age.st_mtime_ns))
    assert run("--verify")[0] == 0
    assert tiny.run("--mode=plan", f"--workdir={copy}", "--verify", "--topology=cpu:1") == 2
    assert "--verify=True: expected --mode=train or evaluate or" in capsys.readouterr().err


def test_parameters_of_l2s_are_encoder_projector_and_slm(job):
    _, workdir = job
    systems = report_of(workdir)["systems"]
    assert systems["l2s"]["params"] < systems["llm"]["params"] + systems["slm"]["params"] + 1000
    assert (
        systems["l2s"]["params_read_per_token"]
        == systems["slm"]["params_read_per_token"]
        < systems["slm"]["params"]
    )


def test_predictions_are_in_the_order_of_the_data(job):
    config, workdir = job
    expected = [
        f"reverse: {json.loads(line)['words']}"
        for line in (config.parent / "test.jsonl").read_text().splitlines()
    ]
    for system in ("llm", "slm", "l2s", "l2s_mismatched"):
        lines = (workdir / "predictions" / f"{system}.jsonl").read_text().splitlines()
        assert [json.loads(line)["prompt"] for line in lines] == expected


def test_second_run_trains_nothing_and_changes_no_model(job, capfd):
    config, workdir = job
    models = sorted(workdir.glob("*/model/*")) + sorted(workdir.glob("*/metrics.jsonl"))
    models.remove(workdir / "l2s/model/README.md")  # the card, which has the report's figures
    before = {path: path.stat().st_mtime_ns for path in models}
    assert len(before) >= 9
    predictions = {path: path.read_bytes() for path in workdir.glob("predictions/*.jsonl")}
    assert len(predictions) == 4
    evaluate = (f"--config={config}", f"--workdir={workdir}", "--mode=evaluate")
    with mock.patch("l2s_jax.evaluation.evaluate.Stopwatch", wraps=Stopwatch) as timed:
        assert tiny.run(*evaluate, *MESH) == 0
    assert {path: path.stat().st_mtime_ns for path in models} == before
    assert "training on" not in capfd.readouterr().err
    # Elsewhere they say the same.
    assert {path: path.read_bytes() for path in predictions} == predictions
    meshes = {tuple(call.kwargs["mesh"].shape.values()) for call in timed.call_args_list}
    assert meshes == {(2, 1, 1, 4)}


def test_evaluate_makes_nothing(job, tmp_path, capfd):
    config, workdir = job
    missing = tmp_path / "missing"
    evaluate = (f"--config={config}", "--mode=evaluate")
    assert tiny.run(*evaluate, f"--workdir={missing}") == 2
    assert not missing.exists()
    assert tiny.run(*evaluate, f"--workdir={workdir}", "--config.l2s.train.steps=5") == 2
    assert "other settings of train.steps" in capfd.readouterr().err
    assert not (workdir / "l2s.old1").exists()
    unfinished = tmp_path / "unfinished"
    shutil.copytree(workdir, unfinished)
    shutil.rmtree(unfinished / "l2s/model")
    assert tiny.run(*evaluate, f"--workdir={unfinished}") == 2
    assert "not finished" in capfd.readouterr().err


def test_a_finished_model_may_encode_in_another_dtype(job, tmp_path):
    config, workdir = job
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    evaluate = (f"--config={config}", f"--workdir={copy}", "--mode=evaluate")
    assert tiny.run(*evaluate, "--config.llm.encoder_dtype=bfloat16") == 0
    environment = report_of(copy)["environment"]
    assert (environment["dtype"], environment["encoder_dtype"]) == ("float32", "bfloat16")
    for path in ("report.md", "l2s/model/README.md"):
        assert "in float32, the LLM of L2S in bfloat16." in (copy / path).read_text(), path
        unmixed = (workdir / path).read_text()
        assert "in float32." in unmixed and "bfloat16" not in unmixed
    settings = read_config(str(copy))
    settings.llm.encoder_dtype = "bfloat16"
    with mock.patch("l2s_jax.serving.loading.make_generator") as made:
        load_generator(settings, str(copy), "l2s")
    _, (system, _, frozen), *_ = made.call_args.args
    assert system.llm_config.dtype == jnp.bfloat16 and system.slm_config.dtype == jnp.float32
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(frozen)}
    assert dtypes == {"bfloat16", "float32"}


def test_changed_stage_is_made_anew_and_the_old_one_kept(job, tmp_path):
    config, workdir = job
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    old = (copy / "l2s/model/params.safetensors").read_bytes()
    llm = (copy / "llm/model/model.safetensors").stat().st_mtime_ns
    changed = "--config.l2s.fusion=cross"
    assert tiny.run(f"--config={config}", f"--workdir={copy}", changed) == 0
    assert (copy / "l2s.old1/model/params.safetensors").read_bytes() == old
    assert (copy / "l2s/model/params.safetensors").read_bytes() != old
    assert (copy / "llm/model/model.safetensors").stat().st_mtime_ns == llm
    assert json.loads((copy / "l2s/model/config.json").read_text())["fusion"] == "cross"


def test_llm_labels_a_previous_runs_llm_and_a_cache_of_features(job, tmp_path, capfd):
    config, workdir = job
    cache = tmp_path / "features"
    arguments = (
        f"--config={config}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.llm.path={workdir / 'llm/model'}",
        f"--config.slm.path={workdir / 'slm/model'}",
        "--config.llm.train.steps=0",
        "--config.tokenizer.train_vocab_size=0",
        "--config.labels.source=llm",
        f"--config.features.cache={cache}",
    )
    assert tiny.run(*arguments) == 0
    (shard,) = (tmp_path / "run/labels").glob("train-*.jsonl")
    prompts = {line for line in (config.parent / "train.jsonl").read_text().splitlines()}
    assert len(shard.read_text().splitlines()) == len(prompts) > 50
    assert not (tmp_path / "run/llm").exists()
    assert report_of(tmp_path / "run")["task"]["labels"] == "llm"
    # The same LLM in both runs: the same answers.
    ours, theirs = (
        report_of(path)["systems"]["llm"]["quality"] for path in (tmp_path / "run", workdir)
    )
    assert ours == theirs

    # H of either split lies in the cache, is found again, and is not taken for another LLM's.
    (path,) = cache.glob("*/features.json")
    stage = json.loads((tmp_path / "run/l2s/stage.json").read_text())
    assert stage["features"] == "bfloat16"
    model = tmp_path / "run/l2s/model"
    trained = (model / "params.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run/l2s")
    capfd.readouterr()
    mesh = ("--config.features.mesh.data=2", "--config.features.mesh.fsdp=4")
    assert tiny.run(*arguments, *mesh) == 0
    assert (model / "params.safetensors").read_bytes() == trained
    assert "the LLM encodes" not in capfd.readouterr().err
    path.write_text(path.read_text().replace(stage["llm_hash"], "0" * 64))
    shutil.rmtree(tmp_path / "run/l2s")
    for folder, message in ((cache, "another LLM's features"), (path.parent, "the folder above")):
        assert tiny.run(*arguments[:-1], f"--config.features.cache={folder}") == 2
        (line,) = (x for x in capfd.readouterr().err.splitlines() if x.startswith("error:"))
        assert message in line and str(path.parent) in line


@pytest.mark.parametrize("system", ["llm", "slm", "l2s"])
def test_generate_from_a_workdir_alone_gives_the_reports_answers(job, tmp_path, system):
    config, workdir = job
    moved = tmp_path / "moved"
    shutil.copytree(workdir, moved)
    output = tmp_path / "out.jsonl"
    arguments = (f"--workdir={moved}", "--mode=generate", f"--system={system}")
    if system == "l2s":
        arguments += (f"--config={config}", *MESH)
    source = config.parent / "test.jsonl"
    assert tiny.run(*arguments, f"--input={source}", f"--output={output}") == 0
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    lines = (workdir / "predictions" / f"{system}.jsonl").read_text().splitlines()
    assert [a["response"] for a in answers] == [json.loads(line)["response"] for line in lines]
    assert [a["words"] for a in answers] == [
        json.loads(line)["words"] for line in source.read_text().splitlines()
    ]


@pytest.mark.parametrize("name", ["llm", "slm"])
def test_a_model_alone_is_read_to_where_it_runs(job, name):
    _, workdir = job
    config = read_config(str(workdir))
    config.decoding.mesh.update(data=2, tensor=4)
    mesh = sharding.make_mesh({"data": 2, "tensor": 4})

    def read_for(**settings):
        with mock.patch("l2s_jax.serving.loading.make_generator") as made:
            load_generator(config, str(workdir), name, **settings)
        _, (_, params, _), *_ = made.call_args.args
        return params[name]

    experiment = Experiment(config, str(workdir), "find")
    _, of_report, _ = load(experiment, getattr(experiment, name))
    quantized = read_for(weights="int8")
    for params in (read_for(), of_report[name], quantized):
        expected = sharding.parameter_shardings(params, mesh)
        assert jax.tree.map(lambda leaf: leaf.sharding, params) == expected
    assert any(leaf.dtype == np.int8 for leaf in jax.tree.leaves(quantized))


def test_generate_reads_lines_from_stdin_and_writes_lines_in_order(job, monkeypatch, capsys):
    _, workdir = job
    prompts = ["one two", "three", "four five six seven"]

    def answers(lines):
        stdin = io.TextIOWrapper(io.BytesIO("".join(f"{p}\n" for p in lines).encode()))
        monkeypatch.setattr(sys, "stdin", stdin)
        assert tiny.run(f"--workdir={workdir}", "--mode=generate") == 0
        return capsys.readouterr().out.split("\n")[:-1]

    together = answers(prompts)
    assert len(together) == 3
    assert together == [answers([prompt])[0] for prompt in prompts]


def test_searches_streams_and_stops_from_the_command_line(job, tmp_path, monkeypatch, capsys):
    _, workdir = job
    prompts = ["one two", "three", "four five six seven"]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"words": prompt}) + "\n" for prompt in prompts))

    def answers(*arguments):
        arguments = (f"--workdir={workdir}", "--mode=generate", f"--input={source}", *arguments)
        assert tiny.run(*arguments, f"--output={target}") == 0
        return [json.loads(line) for line in target.read_text().splitlines()]

    def lines(*arguments):
        stdin = io.TextIOWrapper(io.BytesIO("".join(f"{p}\n" for p in prompts).encode()))
        monkeypatch.setattr(sys, "stdin", stdin)
        capsys.readouterr()
        assert tiny.run(f"--workdir={workdir}", "--mode=generate", *arguments) == 0
        return capsys.readouterr().out.split("\n")[:-1]

    greedy = answers()
    beams = answers("--search=num_beams=3,num_return=2", "--warmup")
    for record, beam in zip(greedy, beams, strict=True):
        assert record.keys() == {"words", "response", "cut"}
        assert beam.keys() == {"words", "response", "cut", "score", "others"}
        assert len(beam["others"]) == 1 and beam["others"][0]["score"] <= beam["score"]

    sampled = answers("--search=temperature=1.5,top_k=20", "--seed=7")
    assert sampled == answers("--search=temperature=1.5,top_k=20", "--seed=7")
    assert sampled != answers("--search=temperature=1.5,top_k=20", "--seed=8")
    texts = [record["response"] for record in sampled]
    assert lines("--search=temperature=1.5,top_k=20", "--seed=7", "--stream") == texts

    (first, *_) = (text for text in texts if text.strip())
    stop = first.strip()[1]
    stopped = answers("--search=temperature=1.5,top_k=20", "--seed=7", f"--stop={stop}")
    assert [record["response"] for record in stopped] == [text.split(stop)[0] for text in texts]
    assert [record.keys() for record in answers("--weights=int8")] == [r.keys() for r in greedy]
    short = answers("--max_new_tokens=2")
    assert any(record["cut"] for record in short)


def test_a_second_process_starts_from_the_compilation_cache(job, tmp_path):
    _, workdir = job
    source, cache = tmp_path / "in.txt", tmp_path / "cache"
    source.write_text("one two\n")
    command = [
        *(sys.executable, "-m", "l2s_jax.main", "--mode=generate", f"--workdir={workdir}"),
        *(f"--input={source}", f"--compilation_cache={cache}"),
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}

    def run():
        result = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=True
        )
        return result.stdout

    def programs():
        return {path.name for path in cache.iterdir() if path.name.endswith("-cache")}

    first = run()
    written = programs()
    assert any("decode" in name for name in written)
    assert run() == first
    assert programs() == written


def test_the_command_runs_as_a_module_and_its_help_names_the_modes():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "l2s_jax.main", "--workdir=/nonexistent", "--mode=evaluate"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: /nonexistent/config.json")
