"""Clients in a closed loop, and what becomes of their requests when servers are lost."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import httpx
import openai

import l2s_jax
from l2s_jax.settings.search import Search

# Of each response.
TOKENS = 400
# The place of each is its seed.
PROMPTS = ("abc bca", "cab 22", "abba abc", "1", "dabc 333 bcad")


def asked(index: int) -> dict[str, object]:
    return {
        **{"model": "l2s", "prompt": PROMPTS[index], "seed": index, "temperature": 1.0},
        **{"min_tokens": TOKENS, "max_tokens": TOKENS},
    }


def answers(model: str) -> list[str]:
    """What is answered to each prompt: what `generate` gives."""
    generate = l2s_jax.load(model, batch_size=1, max_new_tokens=TOKENS).generate
    search = Search(temperature=1.0, min_new_tokens=TOKENS)
    outputs = generate(list(PROMPTS), search=search, seeds=list(range(len(PROMPTS))))
    assert {output.tokens for output in outputs} == {TOKENS}
    return [output.text for output in outputs]


def text_of(lines: list[str]) -> str | None:
    """Of a stream's lines; None: it ends with an error."""
    events = [line.removeprefix("data: ") for line in lines if line]
    pieces = [json.loads(event) for event in events if event != "[DONE]"]
    if "error" in pieces[-1]:
        return None
    assert events[-1] == "[DONE]", events
    return "".join(piece["choices"][0]["text"] for piece in pieces)


class Load:
    """Some clients that read streams, and some official ones, which repeat what is not answered.

    counts: of answers that are "right" and "wrong"; of requests that were "refused" (by a status,
    or without a word) and "broken" (a stream began, and the client sees that it has no end); of
    those that were "repeated" by the official client.
    statuses: of all answers to all clients.
    pause_s: between an answer and the client's next request; servers may start beside them, on the
    same processor.
    """

    def __init__(self, address: str, expected: list[str]):
        self._url, self._expected = f"{address}/v1", expected
        self.counts: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.pause_s = 0.3
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._clients: list[concurrent.futures.Future[None]] = []

    @contextlib.contextmanager
    def running(self, streams: int, officials: int) -> Iterator[None]:
        with concurrent.futures.ThreadPoolExecutor(streams + officials) as pool:
            try:
                self._clients = [pool.submit(self._stream_all, one) for one in range(streams)]
                self._clients += [pool.submit(self._ask_all, one) for one in range(officials)]
                yield
            finally:
                self._ended.set()
        self._check()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        for _ in range(900):
            if condition():
                return
            self._check()
            time.sleep(0.1)
        raise AssertionError(f"it never came: {self.counts}")

    def wait_for_more(self, number: int) -> None:
        """Until so many more answers were right."""
        most = self.counts["right"] + number
        self.wait_for(lambda: self.counts["right"] >= most)

    def _check(self) -> None:
        """Raises what a client has raised."""
        for client in self._clients:
            if client.done():
                client.result()

    def _note(self, found: httpx.Response) -> None:
        with self._lock:
            self.statuses[found.status_code] += 1
        assert found.status_code == 200 or found.headers["Retry-After"], found.status_code

    def _client(self) -> httpx.Client:
        return httpx.Client(timeout=120, event_hooks={"response": [self._note]})

    def _add(self, what: str, number: int = 1) -> None:
        with self._lock:
            self.counts[what] += number

    def _answered(self, index: int, text: str) -> None:
        self._add("right" if text == self._expected[index] else "wrong")
        time.sleep(self.pause_s)

    def _stream_all(self, number: int) -> None:
        with self._client() as client:
            while not self._ended.is_set():
                number = (number + 1) % len(PROMPTS)
                text, failed = self._stream(client, number)
                if failed:
                    self._add(failed)
                    time.sleep(0.3)
                else:
                    self._answered(number, text)

    def _stream(self, client: httpx.Client, index: int) -> tuple[str, str]:
        body, begun = {**asked(index), "stream": True}, False
        try:
            with client.stream("POST", f"{self._url}/completions", json=body) as found:
                if found.status_code != 200:
                    assert json.loads(found.read())["error"]["code"]
                    return "", "refused"
                begun = True
                text = text_of(list(found.iter_lines()))
        except httpx.TransportError:
            return "", "broken" if begun else "refused"
        return ("", "broken") if text is None else (text, "")

    def _ask_all(self, number: int) -> None:
        with openai.OpenAI(
            base_url=self._url, api_key="none", max_retries=99, http_client=self._client()
        ) as client:
            create = client.completions.with_raw_response.create
            while not self._ended.is_set():
                number = (number + 1) % len(PROMPTS)
                body = asked(number)
                found = create(extra_body={"min_tokens": body.pop("min_tokens")}, **body)
                self._add("repeated", found.retries_taken)
                self._answered(number, found.parse().choices[0].text)
