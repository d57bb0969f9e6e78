"""What a server refuses, whom it lets go, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
import time
from http.client import HTTPConnection

import httpx
import pytest
import server
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

KEY = {"Authorization": "Bearer secret"}
LONG = 2000
ENDLESS = {"model": "l2s", "prompt": "abc", "max_tokens": LONG, "min_tokens": LONG, "stream": True}
BODY_BYTES = 20_000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return server.write_model(tmp_path_factory.mktemp("models"))[0]


@pytest.fixture(scope="module")
def running(model):
    flags = ("--max_waiting=2", f"--body_bytes={BODY_BYTES}", f"--max_new_tokens={LONG}")
    with server.serving(model, *flags, L2S_API_KEY="secret") as started:
        yield started


@pytest.fixture(scope="module")
def http(running):
    with httpx.Client(base_url=running.address, headers=KEY, timeout=60) as client:
        yield client


def metric(http, name):
    lines = http.get("/metrics").text.splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith((f"{name}{{", f"{name} "))
    )


def wait_for(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def refused(found, status, *fragments):
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for fragment in fragments:
        assert fragment in error["message"]
    return error


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": ""},
        {"Authorization": "Bearer other"},
        {"Authorization": "Basic secret"},
        {"Authorization": "Bearer sécret".encode()},
    ],
)
def test_without_the_key_nothing_is_answered(http, headers):
    body = {"model": "l2s", "prompt": "abc", "max_tokens": 1}
    refused(http.post("/v1/completions", json=body, headers=headers), 401, "Bearer KEY")
    refused(http.get("/v1/models", headers=headers), 401)
    assert http.get("/health", headers=headers).status_code == 200
    assert http.post("/v1/completions", json=body).status_code == 200


SMALL = {"model": "l2s", "prompt": "abc", "max_tokens": 2}
CHAT = {"model": "l2s", "messages": [{"role": "user", "content": "abc"}]}


@pytest.mark.parametrize(
    ("changes", "param", "fragment"),
    [
        ({"prompt": "a b c d " * 20}, "prompt", f"expected at most {server.PROMPT_TOKENS}"),
        ({"prompt": [3] * 13}, "prompt", "a prompt of 13 tokens, expected at most 12"),
        ({"prompt": [99]}, "prompt", "token id 99, expected 0 to 14"),
        ({"prompt": []}, "prompt", "prompt=[]"),
        ({"prompt": [[]]}, "prompt", "prompt"),
        ({"prompt": ["a", 3]}, "prompt", "prompt"),
        ({"prompt": {"text": "a"}}, "prompt", "prompt"),
        ({"prompt": None}, "prompt", "prompt=None"),
        ({"prompt": [True]}, "prompt", "prompt"),
        ({"max_tokens": LONG + 1}, "max_tokens", f"max_tokens={LONG + 1}: expected at most {LONG}"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens=0: expected"),
        ({"max_tokens": 10**400}, "max_tokens", "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens", "max_tokens=2.5: expected a valid integer"),
        ({"max_tokens": "2"}, "max_tokens", "max_tokens='2'"),
        ({"max_tokens": True}, "max_tokens", "max_tokens=True"),
        ({"temperature": 1e-9}, "temperature", "temperature=1e-09"),
        ({"temperature": -1}, "temperature", "temperature=-1"),
        ({"temperature": 1e300}, "temperature", "temperature=1e+300"),
        ({"top_p": 0.5}, "top_p", "top_p=0.5 with temperature=0.0"),
        ({"top_p": 0, "temperature": 1}, "top_p", "top_p=0"),
        ({"top_k": -2, "temperature": 1}, "top_k", "top_k=-2"),
        ({"n": 0}, "n", "n=0"),
        ({"n": 100}, "n", "100 choices in all: expected at most 4"),
        ({"seed": 2**32}, "seed", "seed=4294967296"),
        ({"seed": -1}, "seed", "seed=-1"),
        ({"stop": ""}, "stop", "stop=''"),
        ({"stop": ["a"] * 5}, "stop", "stop="),
        ({"logprobs": 6}, "logprobs", "logprobs=6"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"best_of": 2}, "best_of", "best_of=2: this server has no such thing; expected 1"),
        ({"echo": True}, "echo", "echo=True: this server has no such thing"),
        ({"suffix": "a"}, "suffix", "suffix='a': this server has no such thing"),
        ({"logit_bias": {"3": 1}}, "logit_bias", "this server has no such thing"),
        ({"presence_penalty": 2.1}, "presence_penalty", "presence_penalty=2.1"),
        ({"frequency_penalty": -3}, "frequency_penalty", "frequency_penalty=-3"),
        ({"beams": 2}, "beams", "beams: no such field"),
        ({"model": 3}, "model", "model=3"),
    ],
)
def test_a_field_that_does_not_fit_is_named(http, changes, param, fragment):
    error = refused(http.post("/v1/completions", json={**SMALL, **changes}), 400, fragment)
    assert error["param"].split(".")[0] == param
    assert "\n" not in error["message"] and len(error["message"]) < 400


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_a_chat_that_does_not_fit_is_refused(http, changes, param):
    assert (
        refused(http.post("/v1/chat/completions", json={**CHAT, **changes}), 400)["param"] == param
    )


def test_a_tokenizer_without_a_template_takes_no_chat(http):
    error = refused(http.post("/v1/chat/completions", json=CHAT), 400, "has no chat template")
    assert (error["param"], error["code"]) == ("model", "no_chat_template")


def test_side_by_side_all_are_answered_as_if_alone(http):
    asked = {"model": "l2s", "prompt": "cab abba", "temperature": 1.3, "max_tokens": 40}
    together = http.post("/v1/completions", json={**asked, "n": 4, "seed": 7}).json()
    alone = [http.post("/v1/completions", json={**asked, "seed": s}).json() for s in range(7, 11)]
    texts = [choice["text"] for choice in together["choices"]]
    assert texts == [one["choices"][0]["text"] for one in alone] and len(set(texts)) == 4


def test_what_is_not_offered_may_be_sent_as_such(http):
    neutral = {
        **{"best_of": 1, "echo": False, "suffix": None, "logit_bias": {}, "user": "someone"},
        **{"presence_penalty": 0, "frequency_penalty": 0.0, "n": None, "stop": None, "top_k": -1},
    }
    plain = http.post("/v1/completions", json=SMALL).json()
    found = http.post("/v1/completions", json={**SMALL, **neutral}).json()
    assert found["choices"] == plain["choices"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model": "l2s", "prompt": "\\ud83d"}',
        b'{"model": "l2s", "prompt": "a", "temperature": NaN}',
        b'{"model": "l2s", "prompt": "a", "temperature": 1e999}',
        b'{"model": "l2s", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "l2s", "prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}",
        b'{"model": "l2s", "prompt": "a"} x',
    ],
)
def test_what_is_no_json_is_refused(http, body):
    headers = {"Content-Type": "application/json"}
    refused(http.post("/v1/completions", content=body, headers=headers), 400)


def test_other_refusals(http):
    refused(http.post("/v1/completions", json={**SMALL, "model": "gpt"}), 404, "one of l2s")
    refused(http.post("/v1/completions", content=b"{}"), 415, "application/json")
    refused(http.get("/v1/completions"), 405)
    refused(http.get("/nothing"), 404)
    large = {**SMALL, "prompt": "a" * BODY_BYTES}
    refused(http.post("/v1/completions", json=large), 413, f"more than {BODY_BYTES} bytes")

    def parts():
        for _ in range(100):
            yield b" " * 1000

    headers = {"Content-Type": "application/json"}
    refused(http.post("/v1/completions", content=parts(), headers=headers), 413)


FIELDS = [
    *("model", "prompt", "n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("stop", "stream", "stream_options", "logprobs", "echo", "messages", "min_tokens"),
    *("repetition_penalty", "no_repeat_ngram_size", "logit_bias", "top_logprobs", "user"),
    *("frequency_penalty", "presence_penalty"),
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["/v1/completions", "/v1/chat/completions"]),
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
)
@example("/v1/completions", {"no_repeat_ngram_size": 2**31 - 1, "min_tokens": 2**31 - 1})
@example("/v1/completions", {"prompt": "\0", "repetition_penalty": 0.01, "temperature": 100})
def test_no_body_is_too_strange(http, path, changes):
    body = {**(SMALL if path == "/v1/completions" else CHAT), **changes}
    found = http.post(path, json=body)
    assert found.status_code == 200 or 400 <= found.status_code < 500
    if found.status_code != 200:
        refused(found, found.status_code)


def test_a_full_queue_says_so_and_a_client_that_goes_frees_its_slot(http, running):
    before = metric(http, "l2s_generated_tokens_total")
    streams = []
    try:
        for _ in range(4):
            stream = http.stream("POST", "/v1/completions", json=ENDLESS)
            streams.append((stream, stream.__enter__()))
            wait_for(lambda: metric(http, "l2s_running") >= min(2, len(streams)))
        wait_for(lambda: metric(http, "l2s_waiting") == 2)
        found = http.post("/v1/completions", json=SMALL)
        refused(found, 429, "2 requests are waiting")
        assert int(found.headers["Retry-After"]) >= 1
    finally:
        for stream, _ in streams:
            stream.__exit__(None, None, None)
    wait_for(lambda: metric(http, "l2s_running") + metric(http, "l2s_waiting") == 0)
    assert metric(http, "l2s_generated_tokens_total") - before < 2 * LONG
    assert http.post("/v1/completions", json=SMALL).status_code == 200


def test_a_client_that_waits_for_the_whole_may_go_too(http, running):
    host, port = running.address.removeprefix("http://").split(":")
    body = json.dumps({**ENDLESS, "stream": False}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer secret\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        wait_for(lambda: metric(http, "l2s_running") == 1)
    wait_for(lambda: metric(http, "l2s_running") == 0)
    assert http.post("/v1/completions", json=SMALL).status_code == 200


def test_a_connection_without_a_request_is_kept(running):
    connection = HTTPConnection(running.address.removeprefix("http://"), timeout=60)
    for wait_s in (6, 0):  # uvicorn's own limit is five seconds
        connection.request("GET", "/health")
        assert connection.getresponse().read()
        time.sleep(wait_s)
    connection.close()


def test_a_head_that_never_ends_is_not_kept(running):
    host, port = running.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.settimeout(20)
        try:
            connection.sendall(b"GET / HTTP/1.1\r\n")
            for _ in range(100):
                connection.sendall(b"X: " + b"a" * 100_000)
            said = connection.recv(100)
        except ConnectionError:
            return
    assert said.startswith(b"HTTP/1.1 400")


def events(lines):
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def test_sigterm_lets_running_responses_end(model):
    flags = (f"--max_new_tokens={LONG}", "--drain_s=60")
    with server.serving(model, *flags) as started, httpx.Client(timeout=60) as client:
        address = started.address
        host, port = address.removeprefix("http://").split(":")
        with (
            socket.create_connection((host, int(port)), timeout=60) as kept,
            client.stream("POST", f"{address}/v1/completions", json=ENDLESS) as stream,
        ):
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert kept.recv(1000).startswith(b"HTTP/1.1 200")
            lines = stream.iter_lines()
            first = next(lines)
            started.process.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx.get(f"{address}/health").status_code == 503)
            # Clients that come again shall come to another server.
            while kept.recv(1000):
                pass
            found = httpx.post(f"{address}/v1/completions", json=SMALL)
            refused(found, 503, "stopping")
            assert found.headers["Connection"] == "close" and found.headers["Retry-After"]
            said = [first, *lines]
        assert said[-2:] == ["data: [DONE]", ""]
        assert events(said)[-1]["choices"][0]["finish_reason"] == "length"
        assert started.end() == 0
    assert not any("Traceback" in line for line in started.said)


def test_the_drain_and_the_time_of_a_request_are_bounded(model):
    flags = (f"--max_new_tokens={LONG}", "--drain_s=0.01", "--time_s=0.2")
    with server.serving(model, *flags) as started, httpx.Client(timeout=60) as client:
        url = f"{started.address}/v1/completions"
        refused(client.post(url, json={**ENDLESS, "stream": False}), 504, "within 0.2 seconds")
        with client.stream("POST", url, json=ENDLESS) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            started.process.send_signal(signal.SIGTERM)
            said = [first, *lines]
        assert events(said)[-1]["error"]["type"] == "server_error"
        assert started.end() == 0
