"""Two replicas on Ray: the load brings the second one; one is killed, and comes back."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import signal
import threading
import time

import httpx
import openai
import psutil
import pytest
import server

import l2s_jax
from l2s_jax.settings.search import Search

LONG = 400
PROMPTS = ["abc bca", "cab 22", "abba abc", "1", "dabc 333 bcad"]
FLAGS = (
    *("--replicas=1", "--max_replicas=2", "--num_cpus=0.1", "--target_ongoing=1", "--upscale_s=0"),
    *("--max_waiting=2", f"--max_new_tokens={LONG}"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return server.write_model(tmp_path_factory.mktemp("models"))[0]


@pytest.fixture(scope="module")
def running(model):
    # Ray itself warns of this and that.
    started = server.serving(
        model, *FLAGS, program=("launch/ray_serve.py",), PYTHONWARNINGS="default"
    )
    with started as found:
        yield found


@pytest.fixture(scope="module")
def expected(model):
    """The texts of PROMPTS, of LONG tokens each, with the place of each as its seed."""
    generate = l2s_jax.load(model, batch_size=1, max_new_tokens=LONG).generate
    search = Search(temperature=1.0, min_new_tokens=LONG)
    outputs = generate(PROMPTS, search=search, seeds=list(range(len(PROMPTS))))
    return [output.text for output in outputs]


def asked(index):
    return {
        **{"model": "l2s", "prompt": PROMPTS[index], "seed": index, "temperature": 1.0},
        **{"min_tokens": LONG, "max_tokens": LONG},
    }


def created_after(address, moment):
    """Whether a replica answers that was made after a moment; each says when that was."""
    found = [httpx.get(f"{address}/v1/models") for _ in range(4)]
    return any(
        one.json()["data"][0]["created"] > moment for one in found if one.status_code == 200
    )


def replicas(running):
    """The processes of replicas."""
    found = psutil.Process(running.process.pid).children(recursive=True)
    return [one for one in found if "".join(one.cmdline()).startswith("ray::ServeReplica:")]


@dataclasses.dataclass
class Load:
    """Clients in a closed loop, and what became of their requests."""

    address: str
    expected: list[str]
    whole: int = 0
    cut: int = 0  # it was told that there is no answer, or that it is not whole
    wrong: list[object] = dataclasses.field(default_factory=list)
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def count(self, index, text):
        with self.lock:
            if text is None:
                self.cut += 1
            elif text == self.expected[index]:
                self.whole += 1
            else:
                self.wrong.append((index, text))

    def stream(self, client, index):
        """The text of a stream that ended as it should; None: the client sees that it did not."""
        body = {**asked(index), "stream": True}
        try:
            with client.stream("POST", f"{self.address}/v1/completions", json=body) as found:
                if found.status_code != 200:
                    assert found.status_code == 429 or found.status_code >= 500
                    return None
                events = [line[6:] for line in found.iter_lines() if line]
        except httpx.RemoteProtocolError:
            return None
        assert events[-1] == "[DONE]", events
        events = [json.loads(event) for event in events[:-1]]
        if "error" in events[-1]:
            return None
        return "".join(event["choices"][0]["text"] for event in events)

    def streams(self, number):
        with httpx.Client(timeout=120) as client:
            while not self.ended.is_set():
                text = self.stream(client, number % len(PROMPTS))
                self.count(number % len(PROMPTS), text)
                if text is None:
                    time.sleep(0.2)
                number += 1

    def official(self, number):
        """The official client, which repeats what was not answered."""
        url = f"{self.address}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=99) as client:
            create = client.completions.with_raw_response.create
            while not self.ended.is_set():
                index = number % len(PROMPTS)
                body = asked(index)
                found = create(extra_body={"min_tokens": body.pop("min_tokens")}, **body)
                self.cut += found.retries_taken
                self.count(index, found.parse().choices[0].text)
                number += 1


def test_under_load_replicas_come_and_come_back(running, expected):
    def wait_for(condition):
        for _ in range(900):
            if condition():
                return
            for one in clients:
                if one.done():
                    one.result()
            time.sleep(0.1)
        raise AssertionError(f"it never came: {load}")

    load = Load(running.address, expected)
    start = time.time()
    print("start", time.time())
    (first,) = replicas(running)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(load.streams, number) for number in range(5)]
        clients += [pool.submit(load.official, number) for number in range(3)]
        try:
            wait_for(lambda: created_after(running.address, start))
            print("second", time.time(), load.whole, load.cut)
            seen, cut = load.whole, load.cut
            wait_for(lambda: load.whole > seen + 8)
            killed = time.time()
            first.kill()
            wait_for(lambda: load.cut > cut)
            seen = load.whole
            wait_for(lambda: load.whole > seen)
            print("killed", time.time(), load.whole, load.cut)
            wait_for(lambda: created_after(running.address, killed))
            print("back", time.time(), load.whole, load.cut)
            seen = load.whole
            wait_for(lambda: load.whole > seen + 8)
        finally:
            load.ended.set()
    for one in clients:
        one.result()
    assert not load.wrong
    assert len(replicas(running)) == 2
    print("end", time.time(), load.whole, load.cut)
