"""One training step of L2S, ours beside transformers with PyTorch, on the same random batch.

    python benchmarks/training.py --llm=t5-large --slm=t5-small --batch_size=8

The frozen LLM encodes, projector and SLM are updated by AdamW with clipped gradients and dropout.
Weights are random, of the published geometry, float32; products are in --dtype, those of the LLM in
--encoder_dtype, on both sides. Each side has a process of its own, and they take turns. Needs torch
and transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from l2s_jax.data.prompts import random_prompts

LEARNING_RATE, DROPOUT, CLIP = 1e-3, 0.1, 1.0


def random_batch(arguments: argparse.Namespace, vocab_size: int) -> dict[str, np.ndarray]:
    """Full rows, so that both sides have the same tokens to read."""
    tokens = arguments.prompt_tokens + arguments.response_tokens
    ids = random_prompts(arguments.batch_size, tokens, vocab_size)
    batch = {}
    for name, part in zip(
        ("llm", "response"), np.split(ids, [arguments.prompt_tokens], axis=1), strict=True
    ):
        batch |= {f"{name}_ids": part, f"{name}_mask": np.ones(part.shape, bool)}
    return batch


def ours(arguments: argparse.Namespace) -> tuple[Callable[[], float], dict[str, float]]:
    """(a step that gives its loss, facts)."""
    import jax

    from l2s_jax import convert, optim, sharding, train
    from l2s_jax.chips import chip_of
    from l2s_jax.config import compute_dtypes, default, train_config
    from l2s_jax.models.geometries import GEOMETRIES
    from l2s_jax.models.serving import to_serve
    from l2s_jax.models.systems import LlmToSlm

    dtype, of_encoder = compute_dtypes(arguments.dtype, arguments.encoder_dtype)
    llm, shapes = convert.abstract_encoder(
        dataclasses.replace(GEOMETRIES[arguments.llm], dtype=of_encoder)
    )
    slm = dataclasses.replace(GEOMETRIES[arguments.slm], dtype=dtype, dropout_rate=DROPOUT)
    system = LlmToSlm(llm, slm, projector_width=slm.width)
    config = train_config(steps=1_000_000)
    config.update(
        learning_rate=LEARNING_RATE, clip_norm=CLIP, dropout_rate=DROPOUT, parameter_scale=False
    )
    config.batch_size = arguments.batch_size
    mesh = sharding.make_mesh(default().mesh)

    def random(leaf: Any) -> jax.Array:
        return 0.02 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)

    frozen = jax.jit(lambda: to_serve(jax.tree.map(random, shapes), llm, "float"))()
    params = jax.jit(system.init)(jax.random.key(0))
    optimizer = optim.optimizer(config, params)
    shardings = train.state_shardings(params, optimizer, config, mesh)
    step = train.make_step(system, optimizer, config, 0, shardings)
    batch = sharding.put_batch(random_batch(arguments, llm.vocab_size), mesh)
    flops = train.step_flops(system, params, frozen, batch, config)
    jax.set_mesh(mesh)
    frozen = sharding.put_parameters(frozen, mesh)
    state = jax.jit(lambda p: train.init_state(p, optimizer, config), out_shardings=shardings)(
        params
    )

    def run() -> float:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        return float(metrics["loss"])

    chip = chip_of(mesh.devices.flat[0])
    return run, {"tflop": flops / 1e12 / mesh.size, "peak_flops": chip.flops if chip else 0.0}


def torch_side(
    arguments: argparse.Namespace, *, compiled: bool
) -> tuple[Callable[[], float], dict[str, float]]:
    """The same by transformers."""
    import torch
    import transformers
    from torch.nn import functional

    from l2s_jax import convert
    from l2s_jax.models.geometries import GEOMETRIES

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")

    def config_of(name: str) -> Any:
        config = GEOMETRIES[name]
        fields = convert.family_of(config).config_to_hf(config)
        return transformers.T5Config(**fields | {"dropout_rate": DROPOUT})

    llm = transformers.T5EncoderModel(config_of(arguments.llm)).to(device).eval()
    llm.requires_grad_(False)
    slm = transformers.T5ForConditionalGeneration(config_of(arguments.slm)).to(device).train()
    width = slm.config.d_model
    projector = torch.nn.Sequential(
        torch.nn.Linear(llm.config.d_model, width, bias=False),
        torch.nn.ReLU(),
        torch.nn.Linear(width, width, bias=False),
    ).to(device)
    trained = [*projector.parameters(), *slm.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    autocast = torch.autocast(device, torch.bfloat16, enabled=arguments.dtype == "bfloat16")
    if "bfloat16" in (arguments.encoder_dtype, arguments.dtype):
        llm = llm.to(torch.bfloat16)
    batch = {
        key: torch.tensor(value).to(device)
        for key, value in random_batch(arguments, slm.config.vocab_size).items()
    }
    ids, mask = batch["llm_ids"].long(), batch["llm_mask"].long()
    labels = batch["response_ids"].long()

    def loss_of() -> torch.Tensor:
        with autocast:
            with torch.no_grad():
                hidden = llm(input_ids=ids, attention_mask=mask).last_hidden_state
            fused = slm.shared(ids) + projector(hidden.float())
            logits = slm(inputs_embeds=fused, attention_mask=mask, labels=labels).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    if compiled:
        loss_of = torch.compile(loss_of)

    def run() -> float:
        loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        return loss.item()  # waits for the step, as ours does

    return run, {}


SIDES = {
    "l2s_jax": ours,
    "transformers": lambda arguments: torch_side(arguments, compiled=False),
    "transformers, torch.compile": lambda arguments: torch_side(arguments, compiled=True),
}


def serve(name: str, arguments: argparse.Namespace, pipe: Connection) -> None:
    """A side's process: makes its step, then gives the milliseconds of one for each request."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # lest idle threads take cores
    run, facts = SIDES[name](arguments)
    began = time.perf_counter()
    first = run()
    pipe.send({"compile_s": time.perf_counter() - began, "first_loss": first, **facts})
    while pipe.recv():
        began = time.perf_counter()
        run()
        pipe.send((time.perf_counter() - began) * 1e3)


def main(argv: list[str]) -> None:
    """Prints a table; writes --output where it is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llm", default="t5-large")
    parser.add_argument("--slm", default="t5-small")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--response_tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--encoder_dtype", choices=("auto", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch; 0: its own choice")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compiled", action="store_true", help="also torch.compile")
    parser.add_argument("--output", default="", help="a JSON file")
    arguments = parser.parse_args(argv)

    context = multiprocessing.get_context("spawn")
    names = [name for name in SIDES if arguments.compiled or "compile" not in name]
    pipes, rows = {}, []
    facts: dict[str, dict[str, float]] = {}
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        pipes[name], far = context.Pipe()
        context.Process(target=serve, args=(name, arguments, far), daemon=True).start()
        far.close()
        facts[name] = pipes[name].recv()
    for repeat in range(arguments.repeats + 1):
        for name in names:
            pipes[name].send(True)
            milliseconds = pipes[name].recv()
            if repeat:  # the first is one more warm-up
                times[name].append(milliseconds)
    tflop, peak = facts["l2s_jax"]["tflop"], facts["l2s_jax"]["peak_flops"]
    tokens = arguments.batch_size * (arguments.prompt_tokens + arguments.response_tokens)
    reference = statistics.median(times["transformers"])
    print("| | step ms | tokens/s | TFLOP/s | of peak | speedup | compile s |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in names:
        step_ms = statistics.median(times[name])
        rate = tflop / step_ms * 1e3
        row = {
            "name": name,
            "step_ms": step_ms,
            "tokens_per_s": tokens / step_ms * 1e3,
            "tflops": rate,
            "mfu": rate * 1e12 / peak if peak else None,
            "speedup": reference / step_ms,
            **facts[name],
        }
        rows.append(row)
        share = f"{row['mfu']:.0%}" if row["mfu"] else "-"
        print(
            f"| {name} | {step_ms:.0f} | {row['tokens_per_s']:.0f} | {rate:.3g} | {share} | "
            f"{row['speedup']:.2f} | {row['compile_s']:.1f} |"
        )
    for pipe in pipes.values():
        pipe.send(False)
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump({"arguments": vars(arguments), "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main(sys.argv[1:])
