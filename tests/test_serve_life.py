"""How a server begins and ends: where it listens, where its LLM lies, and what signals do."""

from __future__ import annotations

import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
import server

import l2s_jax
from l2s_jax.serve.run import listen
from l2s_jax.serve.signals import NOT_READY

COMMAND = [sys.executable, "-m", "l2s_jax.serve"]
NEW = 400
BODY = {"model": "l2s", "prompt": "abc bca", "max_tokens": NEW, "min_tokens": NEW}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An L2S model whose LLM is not where it says, but in `elsewhere`."""
    root = tmp_path_factory.mktemp("models")
    path = server.write_model(root)[0]
    shutil.move(root / "llm", root / "elsewhere")
    return path


def beside(model, name):
    return str(pathlib.Path(model).parent / name)


def refused(model, *flags):
    """The one line that a server ends with that does not begin."""
    found = subprocess.run(
        [*COMMAND, f"--model={model}", *flags],
        cwd=server.ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (found.returncode, found.stdout) == (2, "")
    (line,) = found.stderr.splitlines()
    return line


def test_an_llm_that_lies_elsewhere_answers_and_ctrl_c_lets_it_end(model):
    place = beside(model, "elsewhere")
    flags = (f"--llm={place}", f"--max_new_tokens={NEW}")
    with server.serving(model, *flags) as started, httpx.Client(timeout=60) as client:
        url = f"{started.address}/v1/completions"
        with client.stream("POST", url, json={**BODY, "stream": True}) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            started.process.send_signal(signal.SIGINT)
            events = [line[6:] for line in [first, *lines] if line.startswith("data: {")]
        assert started.end() == 130
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events)
    assert json.loads(events[-1])["choices"][0]["finish_reason"] == "length"
    assert started.said[-1] == "stopping: what is being answered has 30 s to end\n"
    assert not any("Traceback" in line for line in started.said)
    shutil.copytree(place, beside(model, "llm"))
    search = {"min_new_tokens": NEW}
    alone = l2s_jax.load(model, max_new_tokens=NEW, search=search).generate([BODY["prompt"]])
    shutil.rmtree(beside(model, "llm"))
    assert text == alone[0].text


@pytest.mark.parametrize(
    ("llm", "said"),
    [
        ("slm", "this LLM is not the one that"),
        ("", "llm: no such directory"),
    ],
)
def test_an_llm_that_is_another_or_gone_is_one_line(model, llm, said):
    line = refused(model, "--port=0", *([f"--llm={beside(model, llm)}"] if llm else []))
    assert line.startswith("error: ") and said in line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--port=65536",), "argument --port: '65536': expected an integer, 0 to 65535"),
        (("--port=-1",), "argument --port: '-1': expected an integer, 0 to 65535"),
        (("--port=0", "--host=203.0.113.1"), "--host=203.0.113.1 --port=0: cannot listen there: "),
    ],
)
def test_an_address_that_there_is_not_is_one_line(flags, said):
    # No model is looked for.
    assert said in refused("nowhere", *flags)


def test_a_port_in_use_is_named_before_a_model_is_looked_for():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = refused("nowhere", f"--port={port}")
    place = f"--host=127.0.0.1 --port={port}"
    assert line == f"error: {place}: cannot listen there: Address already in use"


def test_of_two_that_start_one_has_the_port():
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port={port}: cannot listen there: Address alr"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b", "::zz"])
def test_a_host_that_is_none_is_named(host):
    with pytest.raises(ValueError, match=f"--host={host} --port=80: cannot listen there: "):
        listen(host, 80)


def catches(process, number):
    """Whether a process has a handler for a signal that Python has none for."""
    lines = pathlib.Path(f"/proc/{process.pid}/status").read_text().splitlines()
    (mask,) = [line.split()[1] for line in lines if line.startswith("SigCgt:")]
    return bool(int(mask, 16) >> (number - 1) & 1)


def is_starting(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").json() == {"status": "starting"}
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)], ids=["INT", "TERM"]
)
@pytest.mark.parametrize("moment", ["before it listens", "while it loads"])
def test_a_signal_before_it_is_ready_is_one_line(model, moment, number, status):
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [*COMMAND, f"--model={model}", f"--llm={beside(model, 'elsewhere')}", f"--port={port}"],
        cwd=server.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        early = moment == "before it listens"
        while not (catches(process, signal.SIGTERM) if early else is_starting(port)):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        said, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, said) == (status, "")
    # Beside it there may be a progress bar.
    lines = [line for line in errors.splitlines() if line and not line.startswith("compiling")]
    assert lines == [NOT_READY]
