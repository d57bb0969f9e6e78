"""Replicas on Ray: the load brings a second one; one is killed under it, and comes back."""

from __future__ import annotations

import asyncio
import os
import runpy
import signal
import socket
import subprocess
import sys
import time

import httpx
import loads
import psutil
import pytest
import server

from l2s_jax.serve.flags import make_parser, options_of
from l2s_jax.serving.lane import Lane

PROGRAM = "launch/ray_serve.py"
FLAGS = (
    *("--replicas=1", "--max_replicas=2", "--num_cpus=0.1", "--target_ongoing=1", "--upscale_s=0"),
    *("--max_waiting=2", f"--max_new_tokens={loads.TOKENS}"),
)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--replicas=2", "--max_replicas=1"), "--max_replicas=1 with --replicas=2: expected no"),
        (("--replicas=999",), "in all, or --address of a cluster"),
        (("--upscale_s=1",), "--upscale_s=1 with --max_replicas=1: expected more than --repl"),
        (("--model=nowhere",), "nowhere: no such directory"),
        (("--search=top_k=2",), "top_k=2 with temperature=0.0"),
        (("--models=slm",), "expected both or neither"),
    ],
)
def test_bad_input_is_one_line_before_ray_starts(model, flags, said, capsys):
    main = runpy.run_path(str(server.ROOT / PROGRAM))["main"]
    assert main([f"--model={model}", "--port=0", *flags]) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1
    assert "ray" not in sys.modules


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return server.write_model(tmp_path_factory.mktemp("models"))[0]


@pytest.fixture(scope="module")
def running(model):
    # Ray warns of what it does itself.
    with server.serving(model, *FLAGS, program=(PROGRAM,), PYTHONWARNINGS="default") as started:
        yield started


def replicas(running):
    """The processes of replicas."""
    found = psutil.Process(running.process.pid).children(recursive=True)
    return [one for one in found if "".join(one.cmdline()).startswith("ray::ServeReplica:")]


def made_after(address, moment):
    """Whether a replica answers that was made after a moment: each says when it was."""
    # Each waits for its turn in a replica that has all it takes.
    found = [httpx.get(f"{address}/v1/models", timeout=60) for _ in range(4)]
    return any(one.json()["data"][0]["created"] > moment for one in found if one.status_code == 200)


def metric(address, name):
    lines = httpx.get(f"{address}/metrics", timeout=60).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))


def stream(client, address):
    body = {**loads.asked(0), "stream": True}
    return client.stream("POST", f"{address}/v1/completions", json=body)


def test_pieces_come_as_they_are_decoded_and_a_client_that_goes_frees_its_slot(running):
    with httpx.Client() as client, stream(client, running.address) as found:
        assert next(found.iter_lines()).startswith("data: {")
    for _ in range(300):
        if not metric(running.address, "l2s_running"):
            break
        time.sleep(0.01)
    else:
        raise AssertionError("it has its slot still")
    # One that had come to its end is counted.
    assert metric(running.address, "l2s_generated_tokens_total") < loads.TOKENS


def test_under_load_a_replica_comes_and_one_that_is_killed_comes_back(running, model):
    load = loads.Load(running.address, loads.answers(model))
    began = time.time()
    (first,) = replicas(running)
    with load.running(streams=5, officials=3):
        load.wait_for(lambda: made_after(running.address, began))
        load.wait_for_more(8)
        # Of 8 at once, where 4 may wait or run, and 2 more wait in Ray.
        assert load.counts["refused"]
        assert not load.counts["broken"] + load.counts["wrong"]
        # All wait for an answer, more than one replica takes.
        load.pause_s = 0.0
        load.wait_for_more(8)
        killed = time.time()
        first.kill()
        load.wait_for_more(8)
        load.pause_s = 0.3
        load.wait_for(lambda: made_after(running.address, killed))
        load.wait_for_more(8)
    assert not load.counts["wrong"]
    # What the lost one had not answered, another has.
    assert set(load.statuses) == {200, 429}
    assert len(replicas(running)) == 2


def test_at_the_end_running_requests_end(running, model):
    left = psutil.Process(running.process.pid).children(recursive=True)
    with httpx.Client(timeout=60) as client, stream(client, running.address) as found:
        lines = found.iter_lines()
        first = next(lines)
        running.process.send_signal(signal.SIGTERM)
        assert loads.text_of([first, *lines]) == loads.answers(model)[0]
    assert running.end() == 0
    assert not psutil.wait_procs(left, timeout=20)[1]


# A cluster on which Ray Serve listens already; it ends with its stdin.
CLUSTER = """
import sys, ray
from ray import serve
context = ray.init(include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
print("address", context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


def test_on_a_cluster_where_ray_serve_listens_already(model):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    around = {
        "PYTHONWARNINGS": "default",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "of this test",
    }
    cluster = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, str(port)],
        env={**os.environ, "PYTHONPATH": str(server.ROOT), **around},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        line = next(line for line in cluster.stdout if line.startswith("address "))
        address = f"--address={line.split()[1]}"
        # The port is that of the proxy, which is not free.
        flags = (*FLAGS, address, f"--port={port}")
        with server.serving(model, *flags, program=(PROGRAM,), **around) as started:
            assert started.address == "Ray Serve, where it listens already,"
            asked = {"model": "l2s", "prompt": "abc", "max_tokens": 2}
            found = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=asked, timeout=60)
            assert found.status_code == 200
            started.process.send_signal(signal.SIGTERM)
            assert started.end() == 0
        assert cluster.poll() is None
    finally:
        cluster.communicate()


def test_a_replica_whose_device_is_gone_says_so(model, monkeypatch):
    program = runpy.run_path(str(server.ROOT / PROGRAM))
    flags = make_parser("serve", "").parse_args(
        [f"--model={model}", "--slots=2", f"--max_new_tokens={loads.TOKENS}"]
    )

    def fails(lane, pause_s):
        raise RuntimeError("no device")

    async def ask(client):
        body = {"model": "l2s", "prompt": "abc", "max_tokens": 1}
        return (await client.post("/v1/completions", json=body)).status_code

    async def life():
        replica = program["Replica"].__new__(program["Replica"])
        await replica.__init__(options_of(flags))
        transport = httpx.ASGITransport(replica.__serve_build_asgi_app__())
        async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
            assert await ask(client) == 200
            replica.check_health()
            monkeypatch.setattr(Lane, "turn", fails)
            statuses = [await ask(client) for _ in range(4)]
            assert set(statuses) == {500, 503} and statuses[-1] == 503
            # The scheduler's thread says so once it has answered all; Ray asks again and again.
            with pytest.raises(RuntimeError, match="the device is gone: RuntimeError: no device"):
                for _ in range(100):
                    replica.check_health()
                    await asyncio.sleep(0.1)
            assert (await client.get("/health")).status_code == 503

    asyncio.run(life())
