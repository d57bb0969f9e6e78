"""A server under load, beside what the same model does without one.

    python benchmarks/serve.py --model=RUN/l2s/model --prompts=FILE --clients=1,8,32 --rates=5,50

The prompts, a line each, are answered three times, by processes of their own:

- offline, by `generate`, in batches of as many as the server has slots: what the server's
  throughput is a share of; and one by one: what a client who is alone is compared with;
- by a server whose clients each send their next request as soon as they have their answer
  (closed loop), for each number of --clients;
- by a server to which requests come at random times, --rates of them a second (Poisson).

Clients stream. Times of a request: to the first token, of each token after it, and whole. The
processor time that the clients take is said too: on a small machine the server lacks it.

With `--peers`, other libraries answer the same clients with --checkpoint, the LLM: CTranslate2 and
transformers, in dynamic batches (`benchmarks/peer_server.py`). `benchmarks/serving_models.py` makes
models of a published geometry for that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import aiohttp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from l2s_jax.arguments import Parser, count, integers
from l2s_jax.bench.machine import cores, cpu
from l2s_jax.files import finite, write_json, write_text

PERCENTILES = (50, 90, 99)
_ALONE = 200  # prompts that are answered one by one
_TAIL = 1000  # bytes of a stream that its last event may have


class Answer(NamedTuple):
    """Times of a request in seconds, and the tokens of its response."""

    first: float
    whole: float
    tokens: int


class Load(NamedTuple):
    """What a load did: answers, and the seconds from the first request to the last answer."""

    server: str
    name: str
    answers: list[Answer]
    seconds: float
    client_seconds: float  # of processor time


def offline(options: argparse.Namespace, prompts: list[str]) -> dict[str, float | None]:
    """Tokens per second in batches, and milliseconds of a prompt alone, if a client is; run in a
    process.
    """
    import l2s_jax

    model = l2s_jax.load(options.model, batch_size=options.slots)
    alone = prompts[:_ALONE] if 1 in options.clients else []
    limit = options.max_new_tokens or model.max_new_tokens

    def whole() -> float:
        began = time.perf_counter()
        tokens = sum(output.tokens for output in model.generate(prompts, max_new_tokens=limit))
        return tokens / (time.perf_counter() - began)

    def one(prompt: str) -> float:
        began = time.perf_counter()
        model.generate([prompt], max_new_tokens=limit)
        return (time.perf_counter() - began) * 1e3

    whole()
    for prompt in alone:
        one(prompt)
    return {
        "tokens_per_second": statistics.median(whole() for _ in range(options.repeats)),
        "ms_alone": statistics.median(
            one(prompt) for _ in range(options.repeats) for prompt in alone
        )
        if alone
        else None,
    }


@contextmanager
def server(command: Sequence[str], **options: Any) -> Iterator[tuple[str, int]]:
    """A server that is ready: its address, and its process; options as of subprocess.Popen."""
    command = [sys.executable, *command]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        found = re.search(r"http://\S+", ready)
        if not found:
            raise SystemExit(f"the server did not start: {ready!r}")
        yield found[0], process.pid
    finally:
        process.terminate()
        process.wait()


def read_prompts(path: str) -> list[str]:
    """The lines of a file that have text."""
    with open(path, encoding="utf-8") as file:
        return [line.rstrip("\n") for line in file if line.strip()]


def servers(options: argparse.Namespace) -> dict[str, list[str]]:
    """Commands of the servers that are measured, by name."""
    ours = ["-m", "l2s_jax.serve", f"--model={options.model}", "--port=0"]
    ours += [f"--slots={options.slots}", f"--max_waiting={10**6}"]
    found = {"l2s_jax": ours}
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "peer_server.py")
    for peer in options.peers:
        library, precision = peer.split(":")
        found[f"{library} {precision}"] = [
            script,
            f"--library={library}",
            f"--precision={precision}",
            f"--checkpoint={options.checkpoint}",
            f"--threads={cores()}",
            f"--batch={options.slots}",
            f"--new_tokens={options.max_new_tokens}",
        ]
    return found


async def ask(client: aiohttp.ClientSession, options: argparse.Namespace, prompt: str) -> Answer:
    """One request, to its end."""
    asked = {
        "model": options.name,
        "prompt": prompt,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"max_tokens": options.max_new_tokens} if options.max_new_tokens else {}),
    }
    began, first, last = time.perf_counter(), None, b""
    async with client.post("/v1/completions", json=asked) as response:
        if response.status != 200:
            raise SystemExit(await response.text())
        async for part in response.content.iter_any():
            if first is None:
                first = time.perf_counter() - began
            last = last[-_TAIL:] + part
    found = re.findall(rb'"completion_tokens": ?([0-9]+)', last)
    if not found:
        raise SystemExit(f"an answer without an end: {last!r}")
    return Answer(first or 0.0, time.perf_counter() - began, int(found[-1]))


async def closed(
    ask_one: Callable[[str], Awaitable[Answer]], prompts: Sequence[str], clients: int
) -> list[Answer]:
    """So many clients, each of which sends its next request when it has its answer."""
    left, answers = iter(prompts), []

    async def client() -> None:
        for prompt in left:
            answers.append(await ask_one(prompt))

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def poisson(
    ask_one: Callable[[str], Awaitable[Answer]], prompts: Sequence[str], rate: float
) -> list[Answer]:
    """Requests that come at random, `rate` of them a second."""
    chance, began, due = random.Random(0), time.perf_counter(), 0.0

    async def at(prompt: str, due: float) -> Answer:
        await asyncio.sleep(max(began + due - time.perf_counter(), 0))
        return await ask_one(prompt)

    waiting = []
    for prompt in prompts:
        due += chance.expovariate(rate)
        waiting.append(at(prompt, due))
    return await asyncio.gather(*waiting)


async def loads(
    options: argparse.Namespace, name: str, address: str, prompts: list[str]
) -> list[Load]:
    """Every load, one after the other, after as many requests as make the server warm."""
    found = []
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout()
    async with aiohttp.ClientSession(address, connector=connector, timeout=timeout) as client:

        async def ask_one(prompt: str) -> Answer:
            return await ask(client, options, prompt)

        async def run(load: str, work: Awaitable[list[Answer]]) -> None:
            began, used = time.perf_counter(), time.process_time()
            answers = await work
            seconds = time.perf_counter() - began
            found.append(Load(name, load, answers, seconds, time.process_time() - used))

        await closed(ask_one, prompts[: 2 * options.slots], options.slots)
        for clients in options.clients:
            chosen = prompts if clients > 1 else prompts[:_ALONE]
            await run(f"{clients} client{'s' * (clients > 1)}", closed(ask_one, chosen, clients))
        for rate in options.rates:
            await run(f"{rate} a second", poisson(ask_one, prompts, rate))
    return found


def row_of(load: Load) -> dict[str, Any]:
    """The figures of a load; times in milliseconds."""
    each = [
        (answer.whole - answer.first) / (answer.tokens - 1)
        for answer in load.answers
        if answer.tokens > 1
    ]
    times = {
        "first": [answer.first for answer in load.answers],
        "token": each,
        "whole": [answer.whole for answer in load.answers],
    }
    tokens = sum(answer.tokens for answer in load.answers)
    return {
        "server": load.server,
        "load": load.name,
        "requests": len(load.answers),
        "requests_per_second": len(load.answers) / load.seconds,
        "tokens_per_second": tokens / load.seconds,
        "client_cores": load.client_seconds / load.seconds,
        **{
            f"{name}_ms": {
                str(share): 1e3 * float(np.percentile(values, share)) for share in PERCENTILES
            }
            for name, values in times.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """The report, in Markdown."""
    ceiling, alone = result["offline"]["tokens_per_second"], result["offline"]["ms_alone"]
    lines = [
        f"Without a server: {ceiling:.0f} tokens/s in batches of {result['slots']}"
        + ("" if alone is None else f"; {alone:.1f} ms for a prompt alone (median)")
        + f". {result['machine']['cpu']}, {result['machine']['instruction_set']}, "
        f"{result['machine']['cores']} cores. Times: 50 / 90 / 99 % of the requests.",
        "",
        "| server | load | requests/s | tokens/s | of offline "
        "| first token, ms | per token, ms | whole, ms | cores of the clients |",
        "| --- | --- | ---: | ---: | ---: | --- | --- | --- | ---: |",
    ]
    for row in result["rows"]:
        cells = [
            row["server"],
            row["load"],
            f"{row['requests_per_second']:.1f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['tokens_per_second'] / ceiling:.0%}",
            *(
                " / ".join(f"{value:.1f}" for value in row[f"{name}_ms"].values())
                for name in ("first", "token", "whole")
            ),
            f"{row['client_cores']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Time of a whole response against the load, of each server: median and 99 of 100."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (name, kind) in enumerate(dict.fromkeys(map(_line_of, rows))):
        own = sorted(
            (row for row in rows if _line_of(row) == (name, kind)),
            key=lambda row: row["tokens_per_second"],
        )
        for percentile, style in (("50", "-o"), ("99", "--^")):
            axes.plot(
                [row["tokens_per_second"] for row in own],
                [row["whole_ms"][percentile] for row in own],
                style,
                color=f"C{place}",
                label=f"{name}, {kind}, {percentile} %",
            )
    axes.set(xlabel="tokens per second", ylabel="whole response, milliseconds", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _line_of(row: dict[str, Any]) -> tuple[str, str]:
    """The server of a row, and how requests came."""
    return row["server"], "closed loops" if "client" in row["load"] else "at random"


def peers(text: str) -> list[str]:
    """Of a flag: libraries and precisions, or none."""
    found = [part for part in text.split(",") if part]
    for part in found:
        if not re.fullmatch(r"(ctranslate2|transformers):\w+", part):
            raise argparse.ArgumentTypeError(
                f"{part!r}: expected ctranslate2:PRECISION or transformers:PRECISION"
            )
    return found


def numbers(text: str) -> tuple[float, ...]:
    """Of a flag: positive numbers, or none."""
    try:
        values = tuple(float(part) for part in text.split(",") if part)
    except ValueError:
        values = (0.0,)
    if any(not 0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: expected positive numbers, as in 5,20")
    return values


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes --output, its table beside it as .md, and a plot as .png."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="a directory of an L2S model")
    add("--name", default="l2s", help="the server's name of it")
    add("--prompts", required=True, help="a text file, a prompt in each line")
    add("--requests", type=count, default=500, help="prompts that are read of it")
    add("--slots", type=count, default=32)
    add("--clients", type=integers, default="1,8,32", help="of closed loops")
    add("--rates", type=numbers, default="", help="requests a second, at random times")
    add("--max_new_tokens", type=int, default=0, help="of a response; 0: as the model says")
    add("--peers", type=peers, default="", help="as in ctranslate2:int8,transformers:float32")
    add("--checkpoint", help="what peers answer with, in Hugging Face's format")
    add("--repeats", type=count, default=3, help="of what is measured without a server")
    add("--output", default="serve.json")
    add("--offline", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    prompts = read_prompts(options.prompts)[: options.requests]
    if options.peers and not (options.checkpoint and options.max_new_tokens):
        parser.error("--peers: expected --checkpoint and --max_new_tokens beside it")
    if not prompts:
        parser.error(f"{options.prompts}: no prompt in it")
    if options.offline:
        print(json.dumps(offline(options, prompts)))
        return 0
    command = [sys.executable, os.path.abspath(__file__), *(argv or sys.argv[1:]), "--offline"]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        return finished.returncode
    result: dict[str, Any] = {
        "machine": {**cpu(), "cores": cores()},
        "slots": options.slots,
        "offline": json.loads(finished.stdout.splitlines()[-1]),
    }
    result["rows"] = []
    stem = options.output.removesuffix(".json")
    for name, start in servers(options).items():
        with server(start) as (address, _):
            found = asyncio.run(loads(options, name, address, prompts))
        result["rows"] += map(row_of, found)
        # After each server, so that none is lost with the next.
        write_json(options.output, finite(result))
        write_text(f"{stem}.md", table(result))
        plot(result["rows"], f"{stem}.png")
    print(table(result), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
