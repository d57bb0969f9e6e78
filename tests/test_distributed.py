"""Jobs of several processes: the same results as of one, and an end of all when one ends."""

import contextlib
import importlib.util
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import features_child
import jax
import job_child
import label_child
import numpy as np
import pytest
import small
import tiny
import train_child
import xla
from safetensors.numpy import load_file

from l2s_jax.checkpoints import pretrained
from l2s_jax.cluster import paths
from l2s_jax.cluster.job import described
from l2s_jax.experiment import feature_cache, toy
from l2s_jax.training import meter

TESTS = Path(__file__).parent
LAUNCH = TESTS.parent / "launch" / "local_multiprocess.sh"
SECONDS = 600  # far more than anything here takes


def environment():
    """That of a process with one device."""
    return {
        **os.environ,
        "XLA_FLAGS": xla.flags(),
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path]),
        "PYTHON": sys.executable,
    }


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(command, **variables):
    return subprocess.Popen(
        command,
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(processes):
    """(exit status, last line of stderr) of each."""
    errors = [process.communicate(timeout=SECONDS)[1] for process in processes]
    return [
        (process.returncode, (error.strip().splitlines() or [""])[-1])
        for process, error in zip(processes, errors, strict=True)
    ]


def lines_of(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in meter.TIMES} for line in lines]


def assert_same_lines(directory, expected):
    for line, other in zip(lines_of(directory), expected, strict=True):
        assert line == pytest.approx(other, rel=1e-5)


def launch(config, runs, *flags):
    command = [str(LAUNCH), "--processes=2", f"--port={free_port()}", f"--runs={runs}", str(config)]
    result = subprocess.run(
        [*command, "--", *flags], env=environment(), capture_output=True, text=True, timeout=600
    )
    return result, [
        (runs / config.stem / "logs" / f"process-{i}.log").read_text().splitlines() for i in (0, 1)
    ]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """(config, workdir of one process, runs of two, what their launch gave).

    Neither of the two has the whole model.
    """
    root = tmp_path_factory.mktemp("jobs")
    config = tiny.write_task(root / "data")
    texts = toy.write_task(str(root / "toy"))
    llm = toy.write_checkpoint(str(root / "llm"), family="t5", texts=texts)
    flags = (
        *(f"--config.llm.path={llm}", "--config.llm.train.steps=0", "--config.labels.source=llm"),
        *("--config.tokenizer.train_vocab_size=0", "--config.slm.tokenizer.train_vocab_size=30"),
    )
    with ThreadPoolExecutor() as pool:
        mesh = ("--config.mesh.data=1", "--config.mesh.tensor=2")
        two = pool.submit(launch, config, root / "two", *flags, *mesh)
        assert tiny.run(f"--config={config}", f"--workdir={root / 'one'}", *flags) == 0
    return config, root / "one", root / "two", two.result()


def test_two_processes_train_and_evaluate_as_one(jobs):
    config, one, runs, (result, logs) = jobs
    two = runs / config.stem
    assert result.returncode == 0, result.stderr
    assert "training on 64 examples" in result.stdout
    # One writes and reports; the other has nothing to say.
    assert any("L2S, mismatched" in line for line in logs[0])
    assert not [line for line in logs[1] if "[Gloo]" not in line]
    for stage in ("slm", "l2s"):
        assert_same_lines(two / stage, lines_of(one / stage))
        assert len(list((two / stage).glob("events.out.tfevents.*"))) == 1
        (ours,) = (two / stage / "model").glob("*.safetensors")
        (theirs,) = (one / stage / "model").glob("*.safetensors")
        small.assert_same(load_file(ours), load_file(theirs), rtol=1e-4, atol=1e-6)
    same = [f"predictions/{name}.jsonl" for name in ("llm", "slm", "l2s", "l2s_mismatched")]
    labels = [f"labels/{split}-00000.jsonl" for split in ("train", "validation")]
    for name in (*same, *labels, "slm_tokenizer/spiece.model"):
        assert (two / name).read_bytes() == (one / name).read_bytes()
    reports = [json.loads((path / "report.json").read_text()) for path in (one, two)]
    for name, system in reports[0]["systems"].items():
        assert reports[1]["systems"][name]["quality"] == system["quality"]


def test_two_processes_with_the_whole_model_each_answer_as_one(jobs, tmp_path):
    config, one, runs, _ = jobs
    source, target = config.parent / "test.jsonl", tmp_path / "answers.jsonl"
    generate = ("--mode=generate", f"--input={source}", "--search=temperature=1.5,top_k=20")
    # They could not train together on a mesh of seven; but they only answer.
    mesh = ("--config.mesh.tensor=7", "--config.decoding.mesh.tensor=1")
    result, logs = launch(config, runs, *generate, *mesh, f"--output={target}")
    assert result.returncode == 0, logs
    expected = tmp_path / "expected.jsonl"
    assert tiny.run(f"--workdir={one}", *generate, f"--output={expected}") == 0
    assert target.read_text() == expected.read_text()
    # Nothing was trained again by reading the workdir.
    assert not list((runs / config.stem).glob("*.old*"))


def test_two_processes_adapt_checkpoints_that_neither_holds_as_one(tmp_path):
    config = tiny.write_task(tmp_path / "data")
    texts = toy.write_task(str(tmp_path / "toy"))
    start = toy.write_checkpoint(str(tmp_path / "start"), family="t5", texts=texts)
    flags = [
        *(f"--config.{name}.path={start}" for name in ("llm", "slm")),
        *(f"--config.{name}.train.parameter_scale=False" for name in ("llm", "slm", "l2s")),
        *("--config.tokenizer.train_vocab_size=0", "--config.llm.train.steps=3"),
        *("--config.slm.lora.rank=2", "--config.llm.tune.rank=2", "--config.llm.tune.steps=3"),
        "--until=l2s",
    ]
    assert tiny.run(f"--config={config}", f"--workdir={tmp_path / 'one'}", *flags) == 0
    mesh = ("--config.mesh.data=1", "--config.mesh.tensor=2")
    result, logs = launch(config, tmp_path / "two", *flags, *mesh)
    assert result.returncode == 0, logs
    models = sorted((tmp_path / "one").glob("**/model/**/*.safetensors"))
    # Those of LLM, SLM, and the L2S before and after its LLM was adapted, whose LLM is beside it.
    assert len(models) == 5
    for model in models:
        of_two = tmp_path / "two" / config.stem / model.relative_to(tmp_path / "one")
        # Adam's first updates are of one size, whatever that of a gradient: rounding shows.
        small.assert_same(load_file(of_two), load_file(model), rtol=1e-3, atol=5e-4)


def test_a_process_without_a_part_of_what_the_llm_makes_waits_for_the_others(tmp_path):
    config = tiny.write_task(tmp_path / "data")
    # The LLM is made here. Both answer prompts, but one validates with a single one; and one batch
    # holds all that the LLM reads.
    flags = (
        *("--config.labels.source=llm", "--config.labels.max_new_tokens=8"),
        *("--config.distillation.weight=0.5", "--config.distillation.top_k=4", "--until=logits"),
        *("--config.distillation.batch_size=64", "--config.evaluation.validation_examples=1"),
    )
    result, logs = launch(config, tmp_path / "two", *flags)
    assert result.returncode == 0, logs
    run = tmp_path / "two" / config.stem
    assert len(list((run / "labels").glob("train-*.jsonl"))) == 2
    assert len(list((run / "labels").glob("validation-*.jsonl"))) == 1
    assert len(list((run / "logits").glob("*.array_record"))) == 1
    assert any("4 likeliest tokens leave out" in line for line in logs[0])
    assert not [line for line in logs[1] if "[Gloo]" not in line]


def start_children(directory, seconds, count):
    where = f"127.0.0.1:{free_port()}"
    child = [sys.executable, str(TESTS / "job_child.py"), str(directory), str(seconds), where]
    return [start([*child, str(count), str(i)]) for i in range(count)]


def assert_part_of_encoder(directory, process, facts):
    """A process of two holds its half of what is split, and read nothing else."""
    _, whole = pretrained.load_encoder(str(directory / "llm"))
    with np.load(directory / f"encoder-{process}.npz") as part:
        for path, leaf in jax.tree_util.tree_leaves_with_path(whole):
            name = paths.path_name(path)
            starts = part[f"{name} from"]
            assert (starts.max() > 0) == (part[name].size < leaf.size and process == 1), name
            index = tuple(map(slice, starts, starts + part[name].shape))
            np.testing.assert_array_equal(part[name], leaf[index], err_msg=name)
    assert facts["read"] == facts["held"]
    # The first hashes config.json and the weights for both.
    assert facts["hashed"] == (0 if process else 2)
    assert facts["held"] < 0.6 * sum(leaf.nbytes for leaf in jax.tree.leaves(whole))


def test_killed_the_others_end_and_all_continue_exactly(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    expected = train_child.run(str(whole))
    directory = tmp_path / "killed"
    directory.mkdir()
    config = small.t5_config()
    pretrained.save_native(config, small.t5_params(config), str(directory / "llm"))
    children = start_children(directory, 0.05, 4)
    metrics = directory / "metrics.jsonl"
    while all(child.poll() is None for child in children) and not (
        metrics.exists() and metrics.stat().st_size
    ):
        time.sleep(0.01)
    delay, victim = random.uniform(0, 0.8), random.randrange(4)
    time.sleep(delay)
    children[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    results = ended(children)
    where = f"process {victim} killed after {delay} s: {results}"
    assert time.monotonic() - killed < 30, where
    assert results.pop(victim)[0] == -signal.SIGKILL, where
    for status, error in results:
        assert status == 1, where
        assert error.startswith(f"error: process {victim} of the job"), where
        assert "lost; the same command on all processes continues" in error, where

    # Half as many continue what four began.
    results = ended(start_children(directory, 0.0, 2))
    assert [status for status, _ in results] == [0, 0], (where, results)
    for process in range(2):
        facts = json.loads((directory / f"facts-{process}.json").read_text())
        assert (facts["devices"], facts["own"]) == (2, 1)
        assert_part_of_encoder(directory, process, facts)
        with np.load(directory / f"weights-{process}.npz") as saved:
            weights = list(saved.values())
        # What was trained is given to the process that saves it, and to no other.
        given = [] if process else jax.tree.leaves(expected)
        small.assert_same(weights, given, rtol=1e-4, atol=1e-5)
    assert_same_lines(directory, lines_of(whole))
    # Each label was asked for once, those of one generator for all once by each of the four.
    prompts = sorted(example.prompt for example in label_child.EXAMPLES)
    for place in ("labels", *(f"together/{process}" for process in range(4))):
        asked = (directory / place / "asked.txt").read_text().splitlines()
        assert sorted(asked) == prompts
    # Files have what their process answered, or all in one order.
    alone, together = (
        [path.read_text().splitlines() for path in (directory / place).glob("train-*")]
        for place in ("labels", "together")
    )
    assert sorted(itertools.chain(*alone)) == sorted(itertools.chain(*together))
    for files in (alone, together):
        assert sorted(map(len, files))[-20:] == [label_child.SHARD] * 20

    # So were the tokens made, a file by each in turn, and found by the two.
    sizes = [line.split() for line in (directory / "tokenized.txt").read_text().splitlines()]
    assert sum(int(size) for _, size in sizes) == len(job_child.TEXTS)
    assert {process for process, _ in sizes} == set("0123")

    # The four encoded together what one process makes alone.
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 0)
    alone = job_child.encode(str(tmp_path), (1, 1, 1))
    together = job_child.encode(str(directory), (1, 1, 1))
    for index in range(len(features_child.DATA)):
        small.assert_same(
            together[index].astype(np.float32),
            alone[index].astype(np.float32),
            rtol=2**-7,
            atol=1e-5,
        )


def test_processes_that_slurm_describes_end_when_one_is_killed(tmp_path):
    config = tiny.write_task(tmp_path / "data")
    command = [
        *(sys.executable, "-m", "l2s_jax.main", f"--config={config}"),
        *(f"--workdir={tmp_path / 'run'}", "--config.llm.train.steps=100000"),
        "--heartbeat_timeout=10",
    ]
    job = {
        "SLURM_JOB_ID": str(random.randrange(1 << 30)),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "2",
    }
    children = [start(command, SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **job) for i in range(2)]
    metrics = tmp_path / "run" / "llm" / "metrics.jsonl"
    while all(child.poll() is None for child in children) and not metrics.exists():
        time.sleep(0.05)
    children[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    (status, line), _ = ended(children)
    assert time.monotonic() - killed < 30
    assert (status, line[:41]) == (1, "error: process 1 of the job was lost; the")


def test_an_interrupt_ends_all(tmp_path):
    config = tiny.write_task(tmp_path / "data")
    flags = ["--", "--config.llm.train.steps=100000"]
    command = [str(LAUNCH), "--processes=2", f"--runs={tmp_path}", str(config), *flags]
    process = start(command)
    log = tmp_path / config.stem / "logs" / "process-0.log"
    while process.poll() is None and not (log.exists() and "training on" in log.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()
    assert process.returncode == 130
    for i in range(2):
        text = log.with_name(f"process-{i}.log").read_text()
        assert text.splitlines()[-1].startswith("error: ") and "interrupted" in text


def peers(*numbers, action="meet", limits=(60,), where=None):
    """Processes of a job that has no devices; of each, (how many there are, which it is)."""
    where = where or f"127.0.0.1:{free_port()}"
    child = [sys.executable, str(TESTS / "peer_child.py"), where]
    return [start([*child, *map(str, (*pair, action, *limits))]) for pair in numbers]


def test_who_is_missing_or_wrong_is_told_to_all():
    missing = peers((4, 0), (4, 1), limits=(20,))
    other_size = peers((2, 0), (3, 1), (3, 2))
    same_place = peers((3, 0), (3, 1), (3, 1), limits=(20,))
    (status, line), other = ended(missing)
    assert (status, line) == other
    assert status == 2
    assert line.startswith("error: cannot join the job: 127.0.0.1:")
    assert line.endswith(": of 4 processes, 2 and 3 did not come within 20 s")

    *both, (status, line) = ended(other_size)
    words = "--num_processes: 3 in process 1, 2 in process 0; expected the same on all processes"
    for own in both:
        assert own[0] == 2
        assert re.fullmatch(f"error: (process [01]: )?{words}", own[1])
    assert status == 2
    assert line.endswith(": --process_id=2 of --num_processes=3: process 0 expects fewer processes")

    (status, line), *rivals = ended(same_place)
    assert {status, *(status for status, _ in rivals)} == {2}
    assert line.endswith(": of 3 processes, 2 did not come within 20 s")
    assert any("--process_id=1 of --num_processes=3: another" in line for _, line in rivals)


STRANGERS = (
    b"GET / HTTP/1.1\r\n\r\n",
    b'{"process": 1, "processes": 2}\n{"error": "any text", "status": 0}\n',
    b"[" * 60000 + b"\n",
    *[b""] * 3,
)


def test_processes_find_each_other_in_any_order_and_strangers_take_no_place():
    port = free_port()
    where = f"127.0.0.1:{port}"
    with contextlib.ExitStack() as stack:
        processes = peers((3, 2), (3, 0), where=where)
        while True:
            assert processes[1].poll() is None
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 5).close()
                break
            time.sleep(0.05)
        for text in STRANGERS:
            stranger = stack.enter_context(socket.create_connection(("127.0.0.1", port), 5))
            stranger.sendall(text)
        time.sleep(1)
        assert [process.poll() for process in processes] == [None, None]
        processes += peers((3, 1), where=where)
        told = [[["from", i] for i in range(3)], {"by": 0}]
        for process in processes:
            output, errors = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, errors
            assert json.loads(output) == told


def test_a_port_in_use_is_one_line():
    with socket.create_server(("", free_port())) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        ((status, line),) = ended(peers((2, 0), where=where))
    assert status == 2
    assert line.startswith(f"error: cannot join the job: {where}: process 0 cannot listen there: ")


def test_what_one_process_finds_wrong_ends_all_with_its_words():
    differ, refuse, fail = (
        peers((3, 0), (3, 1), (3, 2), action=action) for action in ("differ", "refuse", "fail")
    )
    for processes, words in (
        (differ, "config.seed: 1 in process 2, 0 in process 0; expected the same on all processes"),
        (refuse, "[Errno 2] No such file or directory: '/nonexistent/folder'"),
        (fail, "no such thing"),
    ):
        for status, line in ended(processes):
            assert status == 2
            assert re.fullmatch(f"error: (process [012]: )?{re.escape(words)}", line)


def test_what_a_job_cannot_use_ends_all_processes_before_any_work(tmp_path):
    config, steps = tiny.write_task(tmp_path / "data"), tmp_path / "steps"
    steps.mkdir()
    (steps / "compiled.json").write_text('{"kind": "other"}')
    cases = {
        "config.buckets: prompts of ": ["--config.mesh.data=1", "--config.mesh.sequence=2"],
        "config.decoding.mesh: ": ["--config.decoding.mesh.data=3"],
        f"{steps}/compiled.json: not ours: ": [f"--compiled={steps}"],
    }
    odd = "--config.buckets=((9, 16), (16, 16), (32, 32))"
    jobs = {}
    for i, (words, flags) in enumerate(cases.items()):
        where = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
        command = [sys.executable, "-m", "l2s_jax.main", f"--config={config}", *where, *flags, odd]
        command.append(f"--workdir={tmp_path / f'run{i}'}")
        jobs[words] = [start([*command, f"--process_id={process}"]) for process in (0, 1)]
    for i, (words, processes) in enumerate(jobs.items()):
        for status, line in ended(processes):
            assert (status, words in line) == (2, True), line
        assert not list((tmp_path / f"run{i}").glob("*"))


def test_processes_with_other_flags_end_before_any_work(tmp_path):
    config, workdir = tiny.write_task(tmp_path / "data"), tmp_path / "run"
    command = [sys.executable, "-m", "l2s_jax.main", f"--config={config}", f"--workdir={workdir}"]
    job = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    others = (["--config.seed=7"], [])
    processes = [start([*command, *job, f"--process_id={i}", *others[i]]) for i in (0, 1)]
    for status, line in ended(processes):
        assert status == 2
        assert line.endswith(
            "config.seed: 0 in process 1, 7 in process 0; expected the same on all processes"
        )
    assert not workdir.exists()


def test_a_process_that_gives_no_sign_of_life_is_lost():
    jobs = [peers((2, 0), (2, 1), action="wait") for _ in range(2)]
    for process in (*jobs[0], *jobs[1]):
        assert process.stdout.readline() == "waiting\n"
    for victim, job in enumerate(jobs):
        job[victim].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    for victim, job in enumerate(jobs):
        ((status, line),) = ended([job[1 - victim]])
        assert time.monotonic() - stopped < 30
        assert status == 1
        assert line.startswith(f"error: process {victim} of the job")
        assert "lost; the same command on all processes continues" in line
        job[victim].send_signal(signal.SIGCONT)
        assert ended([job[victim]])[0][0] == 1


def test_who_is_late_at_a_barrier_ends_all():
    results = ended(peers((2, 0), (2, 1), action="wait", limits=(60, 5)))
    assert [status for status, _ in results] == [1, 1]
    assert results[1][1] == "error: process 0 did not come within 5 s"
    assert results[0][1] == "error: process 1: process 0 did not come within 5 s"


def test_a_coordinator_that_does_not_answer_is_one_line_and_status_2(tmp_path):
    command = [sys.executable, "-m", "l2s_jax.main", "--mode=evaluate", f"--workdir={tmp_path}"]
    job = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", "--process_id=1"]
    ((status, line),) = ended([start([*command, *job, "--join_timeout=1"])])
    assert status == 2
    assert line.startswith("error: cannot join the job: 127.0.0.1:")
    assert line.endswith(": process 0 does not answer within 2 s")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2"], "expected all three, or none"),
        (["--coordinator=host"], "expected all three"),
        (["--coordinator=host", "--num_processes=2", "--process_id=0"], "expected HOST:PORT"),
        (["--coordinator=h:1", "--num_processes=2", "--process_id=2"], "expected a number from 0"),
        (["--coordinator=h:1", "--num_processes=0", "--process_id=0"], "expected a number from 0"),
    ],
)
def test_impossible_jobs_are_refused(flags, message, capsys):
    assert tiny.run("--workdir=/nonexistent", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("variables", "finder"),
    [
        ({}, ""),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, ""),  # a batch script, outside srun
        ({"SLURM_STEP_NUM_TASKS": "1"}, ""),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "jax"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, ""),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://a:1"}, "jax"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "0"}, "mpi4py"),  # Open MPI 5
        ({"OMPI_COMM_WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2"}, "mpi4py"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "mpi4py"),  # MPICH, Intel MPI
        ({"PMI_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2"}, "jax"),  # srun --mpi=pmi2
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
        ({"TPU_WORKER_HOSTNAMES": "a-0.b,a-1.b"}, "jax"),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "jax"),
    ],
)
def test_what_describes_a_job_of_several(variables, finder):
    assert described(variables) == finder


def test_no_job_to_be_found_is_one_line(tmp_path):
    command = [sys.executable, "-m", "l2s_jax.main", "--mode=evaluate", f"--workdir={tmp_path}"]
    ((status, line),) = ended([start([*command, "--distributed"])])
    assert status == 2
    assert line.startswith(
        "error: cannot join the job: JAX finds none here; expected --coordinator"
    )


def test_a_job_of_mpi_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tiny.run("--workdir=/nonexistent", "--mode=evaluate") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: mpirun started several processes: expected the package mpi4py")
