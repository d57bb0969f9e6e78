"""Many requests of all kinds to one server: what it must not do is fail, grow or compile.

    python benchmarks/soak.py --model=RUN/l2s/model --prompts=FILE --requests=20000

Of these requests, 5 % go away in the middle, 5 % are malformed; the others have random prompts,
limits, seeds and settings, half of them stream. At the end, answers that were whole are compared
with those of `generate` for the same prompt, seed and settings. Said are statuses, memory of the
server in the second and last quarter, and the programs that it compiled after it was ready.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import random
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import aiohttp
import psutil
from serve import read_prompts, server

from l2s_jax.arguments import Parser, count
from l2s_jax.bench.machine import cores, cpu
from l2s_jax.files import write_json

_CLIENTS = 24
_GONE, _MALFORMED = 0.05, 0.05
# Choices that answers are compared for; of each, `generate` compiles a program.
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 1.2, "top_p": 0.9},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
)
LIMITS = (1, 4, 16, 64)
BAD: tuple[Any, ...] = (
    b"{",
    b"\xff\xfe",
    b"[]",
    {"prompt": 7},
    {"prompt": "a", "temperature": "warm"},
    {"prompt": "a", "max_tokens": 10**30},
    {"prompt": "a", "unheard_of": 1},
    {"prompt": [2**40]},
    {"prompt": "a", "n": -1},
    {"prompt": "a", "model": "another"},
    b'{"model": "l2s", "prompt": "\\ud800"}',
)


def random_request(chance: random.Random, prompts: Sequence[str], most: int) -> dict[str, Any]:
    """A request that can be answered."""
    limit = chance.choice([one for one in LIMITS if one <= most])
    return {
        "model": "l2s",
        "prompt": chance.choice(prompts),
        "max_tokens": limit,
        "seed": chance.randrange(2**32),
        "stream": chance.random() < 0.5,
        **chance.choice(SETTINGS),
    }


class Soak:
    """What was asked, and what came of it."""

    def __init__(self, options: argparse.Namespace, prompts: list[str], process: psutil.Process):
        self._options, self._prompts, self._process = options, prompts, process
        self._chance = random.Random(options.seed)
        self.statuses: collections.Counter[str] = collections.Counter()
        self.answers: list[tuple[dict[str, Any], str]] = []
        self.memory: list[int] = []
        self._left = options.requests

    async def run(self, address: str) -> None:
        """All requests, by clients beside each other."""
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout()
        async with aiohttp.ClientSession(address, connector=connector, timeout=timeout) as client:
            await asyncio.gather(*(self._client(client) for _ in range(_CLIENTS)))

    async def _client(self, client: aiohttp.ClientSession) -> None:
        while self._left:
            self._left -= 1
            self.memory.append(self._process.memory_info().rss)
            kind = self._chance.random()
            if kind < _MALFORMED:
                await self._malformed(client)
                continue
            asked = random_request(self._chance, self._prompts, self._options.max_new_tokens)
            if kind < _MALFORMED + _GONE:
                await self._gone(client, asked)
            else:
                await self._whole(client, asked)

    async def _malformed(self, client: aiohttp.ClientSession) -> None:
        bad = self._chance.choice(BAD)
        body = bad if isinstance(bad, bytes) else json.dumps({"model": "l2s", **bad}).encode()
        headers = {"Content-Type": "application/json"}
        async with client.post("/v1/completions", data=body, headers=headers) as response:
            self.statuses[f"malformed: {response.status}"] += 1
            await response.read()

    async def _gone(self, client: aiohttp.ClientSession, asked: dict[str, Any]) -> None:
        """A client that does not wait for the end."""
        try:
            async with asyncio.timeout(self._chance.random() * 0.05):
                async with client.post("/v1/completions", json=asked) as response:
                    await response.read()
            self.statuses["gone: too late"] += 1
        except TimeoutError:
            self.statuses["gone"] += 1

    async def _whole(self, client: aiohttp.ClientSession, asked: dict[str, Any]) -> None:
        async with client.post("/v1/completions", json=asked) as response:
            self.statuses[str(response.status)] += 1
            body = await response.text()
        if response.status != 200:
            return
        if asked["stream"]:
            events = [line[6:] for line in body.splitlines() if line.startswith("data: {")]
            text = "".join(json.loads(event)["choices"][0]["text"] for event in events)
        else:
            text = json.loads(body)["choices"][0]["text"]
        self.answers.append((asked, text))


def wrong_answers(
    model: str, answers: Sequence[tuple[dict[str, Any], str]]
) -> list[tuple[dict[str, Any], str, str]]:
    """Requests whose answer is not what `generate` says, with both texts."""
    import l2s_jax
    from l2s_jax.settings.search import Search

    generator = l2s_jax.load(model, batch_size=32)
    groups = collections.defaultdict(list)
    names = {name for one in SETTINGS for name in one}
    for asked, text in answers:
        settings = tuple(sorted((name, asked[name]) for name in names & asked.keys()))
        groups[settings, asked["max_tokens"]].append((asked, text))
    wrong = []
    for (settings, limit), group in groups.items():
        outputs = generator.generate(
            [asked["prompt"] for asked, _ in group],
            search=Search(**dict(settings)),
            max_new_tokens=limit,
            seeds=[asked["seed"] for asked, _ in group],
        )
        for (asked, text), output in zip(group, outputs, strict=True):
            if text != output.text:
                wrong.append((asked, text, output.text))
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it all, writes --output; 1 if the server failed at something, or an answer is wrong."""
    parser = Parser(description="A server under requests of all kinds.", allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="a directory of an L2S model")
    add("--prompts", required=True, help="a text file, a prompt in each line")
    add("--requests", type=count, default=20000)
    add("--max_new_tokens", type=count, default=64, help="that the model gives")
    add("--compilation_cache", default="", help="a folder, as of the server")
    add("--seed", type=int, default=0)
    add("--output", default="soak.json")
    options = parser.parse_args(argv)
    prompts = read_prompts(options.prompts)
    command = ["-m", "l2s_jax.serve", f"--model={options.model}", "--port=0"]
    command += ["--max_waiting=1000"]
    if options.compilation_cache:
        command += [f"--compilation_cache={options.compilation_cache}"]
    log = os.path.splitext(options.output)[0] + ".log"
    environment = {**os.environ, "JAX_LOG_COMPILES": "1"}
    with (
        open(log, "w", encoding="utf-8") as errors,
        server(command, stderr=errors, env=environment) as (address, process),
    ):
        before = os.path.getsize(log)
        soak = Soak(options, prompts, psutil.Process(process))
        asyncio.run(soak.run(address))
        with open(log, encoding="utf-8") as file:
            file.seek(before)
            compiled = [line for line in file if "Finished XLA compilation" in line]
    quarter = len(soak.memory) // 4
    second = statistics.mean(soak.memory[quarter : 2 * quarter])
    last = statistics.mean(soak.memory[3 * quarter :])
    wrong = wrong_answers(options.model, soak.answers)
    result = {
        "machine": {**cpu(), "cores": cores()},
        "statuses": dict(sorted(soak.statuses.items())),
        "compiled": len(compiled),
        "memory_mb": {"second_quarter": second / 1e6, "last_quarter": last / 1e6},
        "memory_growth": last / second - 1,
        "answers": len(soak.answers),
        "wrong": wrong[:20],
        "wrong_answers": len(wrong),
    }
    write_json(options.output, result)
    print(json.dumps({name: value for name, value in result.items() if name != "wrong"}, indent=1))
    failed = wrong or compiled or any(": 5" in name or name[0] == "5" for name in soak.statuses)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
