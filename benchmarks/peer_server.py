"""Another library behind the same protocol, for `benchmarks/serve.py`: dynamic batches.

Requests that came while a batch was decoded are the next batch. A batch ends as a whole, and so do
the responses in it: none is streamed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import transformers
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

Generate = Callable[[list[str], int], list[int]]


def ctranslate2_of(checkpoint: str, compute_type: str, threads: int) -> Generate:
    """By CTranslate2; the converted model lies beside the checkpoint."""
    import ctranslate2

    from l2s_jax.bench.ct2 import convert

    target = f"{checkpoint.rstrip('/')}-ctranslate2-{compute_type}"
    if not os.path.isdir(target):
        convert(checkpoint, target, compute_type)
    model = ctranslate2.Translator(target, compute_type=compute_type, intra_threads=threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)

    def generate(prompts: list[str], new_tokens: int) -> list[int]:
        tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(prompts).input_ids]
        found = model.translate_batch(tokens, beam_size=1, max_decoding_length=new_tokens)
        return [len(one.hypotheses[0]) for one in found]

    return generate


def transformers_of(checkpoint: str, dtype: str, threads: int) -> Generate:
    """By transformers' `generate`."""
    import torch

    from l2s_jax.bench.hf import ready

    torch.set_num_threads(threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = ready(
        transformers.AutoModelForSeq2SeqLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    )

    def generate(prompts: list[str], new_tokens: int) -> list[int]:
        batch = tokenizer(prompts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            found = model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
            )
        # Padding follows the token that ends a response; before it, it is a token like others.
        before = (found[:, 1:] == tokenizer.eos_token_id).cumsum(1) == 0
        return before.sum(1).tolist()

    return generate


class Batches:
    """A thread that decodes what waits, `most` requests at a time."""

    def __init__(self, generate: Generate, most: int, new_tokens: int):
        self._generate, self._most, self._new_tokens = generate, most, new_tokens
        self._waiting: queue.SimpleQueue[tuple[str, asyncio.Future[int], Any]]
        self._waiting = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    async def answer(self, prompt: str) -> int:
        """The tokens of the response."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[int] = loop.create_future()
        self._waiting.put((prompt, future, loop))
        return await future

    def _run(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while len(batch) < self._most and not self._waiting.empty():
                batch.append(self._waiting.get())
            counts = self._generate([prompt for prompt, _, _ in batch], self._new_tokens)
            for (_, future, loop), count in zip(batch, counts, strict=True):
                loop.call_soon_threadsafe(future.set_result, count)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves, and writes its address when it is ready."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--library", choices=("ctranslate2", "transformers"), required=True)
    add("--checkpoint", required=True)
    add("--precision", default="float32")
    add("--threads", type=int, required=True)
    add("--batch", type=int, default=32)
    add("--new_tokens", type=int, required=True)
    options = parser.parse_args(argv)
    make = {"ctranslate2": ctranslate2_of, "transformers": transformers_of}[options.library]
    generate = make(options.checkpoint, options.precision, options.threads)
    batches = Batches(generate, options.batch, options.new_tokens)

    async def completions(request: Request) -> JSONResponse:
        asked = await request.json()
        count = await batches.answer(asked["prompt"])
        return JSONResponse({"usage": {"completion_tokens": count}})

    app = Starlette(routes=[Route("/v1/completions", completions, methods=["POST"])])
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    asyncio.run(server.serve(sockets=[listener]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
