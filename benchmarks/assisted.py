"""Requests that a trained LLM answers: alone, drafted for by L2S, and in transformers.

    python benchmarks/assisted.py --workdir=runs/multi30k_en_de --prompts=100
    python benchmarks/assisted.py --workdir=runs/multi30k_en_de --prompts=96 --batch_size=8

`--workdir` is that of a finished run whose LLM and SLM have one tokenizer. Prompts are the first of
its evaluation's split, cut as the run cuts them; a request is text in, text out. transformers
answers them by the same two checkpoints: by the LLM alone, and assisted by the SLM alone, which it
can for one prompt at a time. So it has no part in larger batches. Everybody decodes greedily, in
float32, on CPUs. All prompts are answered once before; then the systems take turns at each request.
Needs the extra `test`, for torch and transformers.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from tqdm import tqdm

from l2s_jax.arguments import Parser, count
from l2s_jax.bench.hf import ready
from l2s_jax.bench.machine import cores, cpu
from l2s_jax.data.fitting import fit
from l2s_jax.experiment.experiment import Experiment
from l2s_jax.experiment.workdir import read_config
from l2s_jax.files import write_json
from l2s_jax.serving.loading import load_generator
from l2s_jax.settings.search import Search
from l2s_jax.tokenizers import Tokenizer

# Prompts -> texts.
Answer = Callable[[Sequence[str]], list[str]]


def ours(config: Any, workdir: str, name: str, batch_size: int, search: Search) -> Answer:
    """A system of a run."""
    generator = load_generator(config, workdir, name, batch_size=batch_size, search=search)
    return lambda prompts: [output.text for output in generator.generate(prompts)]


class Transformers:
    """A folder's model in transformers, with the same tokenizer."""

    def __init__(self, directory: str, tokenizer: Tokenizer, longest: int, most: int):
        transformers.utils.logging.set_verbosity_error()
        config = transformers.AutoConfig.from_pretrained(directory)
        kind: Any = (
            transformers.AutoModelForSeq2SeqLM
            if config.is_encoder_decoder
            else transformers.AutoModelForCausalLM
        )
        self.model = ready(kind.from_pretrained(directory, dtype=torch.float32))
        self._tokenizer, self._longest, self._most = tokenizer, longest, most
        self._continues = not config.is_encoder_decoder

    def answer(self, prompts: Sequence[str], assistant: Any = None) -> list[str]:
        """What it says to one prompt, drafted for by an assistant."""
        ids = torch.tensor(fit(prompts, self._tokenizer, self._longest).ids)
        with torch.inference_mode():
            (found,) = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self._most,
                do_sample=False,
                eos_token_id=list(self._tokenizer.end_ids),
                pad_token_id=self._tokenizer.pad_id,
                assistant_model=assistant,
            )
        return [self._tokenizer.decode(found[ids.shape[1] if self._continues else 1 :].tolist())]


def measured(
    answers: dict[str, Answer], requests: Sequence[Sequence[str]]
) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
    """The milliseconds of each system's requests, and its texts."""
    times: dict[str, list[float]] = {name: [] for name in answers}
    texts: dict[str, list[str]] = {name: [] for name in answers}
    for name, answer in answers.items():
        for request in tqdm(requests, desc=name, file=sys.stderr):
            texts[name] += answer(request)
    for request in tqdm(requests, desc="measuring", file=sys.stderr):
        for name, answer in answers.items():
            began = time.perf_counter()
            answer(request)
            times[name].append(1e3 * (time.perf_counter() - began))
    return times, texts


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table, and writes --output."""
    parser = Parser(description="An LLM alone and drafted for.", allow_abbrev=False)
    parser.add_argument("--workdir", required=True, help="of a finished run")
    parser.add_argument("--prompts", type=count, default=100)
    parser.add_argument("--batch_size", type=count, default=1, help="prompts of a request")
    parser.add_argument("--draft_tokens", type=count, default=Search().draft_tokens)
    parser.add_argument("--output", default="assisted.json")
    flags = parser.parse_args(argv)
    torch.set_num_threads(cores())
    # That a prompt is cut would be said at each request.
    logging.getLogger("l2s_jax.serving").setLevel(logging.ERROR)
    config = read_config(flags.workdir)
    config.dtype = config.llm.encoder_dtype = "float32"
    experiment = Experiment(config, flags.workdir, "find")
    tokenizer = experiment.llm.responses.tokenizer
    prompts = [example.prompt for example in experiment.evaluation_examples()][: flags.prompts]
    limits = config.max_prompt_tokens, config.decoding.max_new_tokens
    rows = flags.batch_size
    exact = dataclasses.replace(Search(), exact=True, draft_tokens=flags.draft_tokens)
    answers: dict[str, Answer] = {
        "LLM": ours(config, flags.workdir, "llm", rows, Search()),
        "LLM, drafted for by L2S": ours(config, flags.workdir, "exact", rows, exact),
        "L2S": ours(config, flags.workdir, "l2s", rows, Search()),
    }
    if rows == 1:
        llm = Transformers(experiment.llm.directory, tokenizer, *limits)
        slm = Transformers(os.path.join(flags.workdir, "slm", "model"), tokenizer, *limits)
        answers["LLM, transformers"] = llm.answer
        answers["LLM, transformers, assisted by the SLM"] = lambda prompts: llm.answer(
            prompts, slm.model
        )
    requests = [prompts[i : i + rows] for i in range(0, len(prompts), rows)]
    times, texts = measured(answers, requests)
    found = {
        name: {
            "ms": statistics.median(times[name]),
            "equal": sum(map(str.__eq__, texts[name], texts["LLM"])),
        }
        for name in answers
    }
    base = found["LLM"]["ms"]
    print("| system | ms a request | times as fast as the LLM | its texts |\n|---|---:|---:|---:|")
    for name, row in found.items():
        print(f"| {name} | {row['ms']:.1f} | {base / row['ms']:.2f} | {row['equal']} |")
    write_json(
        flags.output,
        {
            "prompts": len(prompts),
            "batch_size": rows,
            "machine": {**cpu(), "cores": cores()},
            "systems": found,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
