"""The sides of benchmarks/training.py: one training step of L2S, by us and by PyTorch."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from l2s_jax.data.prompts import random_prompts
from l2s_jax.models.geometries import GEOMETRIES

LEARNING_RATE, DROPOUT, CLIP = 1e-3, 0.1, 1.0
OURS, EAGER, COMPILED = "l2s_jax", "transformers", "transformers, torch.compile"
# Of torch.compile: the whole loss in one of its own modes, or each layer by itself, which takes a
# fraction of the time to compile.
PER_LAYER = "per-layer"
MODES = ("default", "max-autotune-no-cudagraphs", PER_LAYER)


class Step(NamedTuple):
    """A side's training.

    run: makes so many steps, waits for the device, gives the loss of the last one.
    facts: what is known before a step is made.
    peak_bytes: the most memory held on an accelerator; None where there is none.
    """

    run: Callable[[int], float]
    facts: Mapping[str, Any]
    peak_bytes: Callable[[], int | None]


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


def ours(arguments: argparse.Namespace) -> Step:
    """Our step, as `loop.fit` compiles it."""
    import jax

    from l2s_jax.bench.geometry import random_like
    from l2s_jax.checkpoints import pretrained
    from l2s_jax.cluster import sharding
    from l2s_jax.cluster.chips import chip_of
    from l2s_jax.config import compute_dtypes, default
    from l2s_jax.models.serving import to_serve
    from l2s_jax.models.systems import LlmToSlm, parameter_count
    from l2s_jax.training import optim, update

    dtype, of_encoder = compute_dtypes(arguments.dtype, arguments.encoder_dtype)
    scan = {"scan_layers": arguments.scan_layers}
    llm, shapes = pretrained.abstract_encoder(
        dataclasses.replace(GEOMETRIES[arguments.llm], dtype=of_encoder, **scan)
    )
    slm = dataclasses.replace(GEOMETRIES[arguments.slm], dtype=dtype, dropout_rate=DROPOUT, **scan)
    system = LlmToSlm(llm, slm, projector_width=slm.width)
    config = default().l2s.train
    config.update(
        steps=1_000_000,
        learning_rate=LEARNING_RATE,
        clip_norm=CLIP,
        dropout_rate=DROPOUT,
        parameter_scale=False,
        batch_size=arguments.batch_size,
    )
    mesh = sharding.make_mesh(default().mesh)

    held = functools.partial(to_serve, config=llm, weights="float", encodes=True)
    frozen = random_like(jax.eval_shape(held, shapes))
    params = random_like(jax.eval_shape(system.init, jax.random.key(0)))
    optimizer = optim.optimizer(config, params)
    shardings = update.state_shardings(params, optimizer, config, mesh)
    step = update.make_step(system, optimizer, config, 0, shardings)
    batch = sharding.put_batch(random_batch(arguments, llm.vocab_size), mesh)
    flops = update.step_flops(system, params, frozen, batch, config)
    jax.set_mesh(mesh)
    frozen = sharding.put_parameters(frozen, mesh)
    state = jax.jit(lambda p: update.init_state(p, optimizer, config), out_shardings=shardings)(
        params
    )

    def run(steps: int) -> float:
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        return float(metrics["loss"])

    device = mesh.devices.flat[0]
    chip = chip_of(device)
    facts = {
        "device": device.device_kind,
        "parameters": parameter_count(params),
        "llm_parameters": parameter_count(frozen),
        "tflop": flops / 1e12 / mesh.size,
        "peak_flops": chip.flops if chip else 0.0,
    }
    return Step(run, facts, lambda: (device.memory_stats() or {}).get("peak_bytes_in_use"))


class TorchModels:
    """LLM, projector and SLM by PyTorch, random, on `device`."""

    def __init__(self, arguments: argparse.Namespace, device: str):
        import torch
        import transformers

        from l2s_jax.checkpoints import pretrained

        def config_of(name: str) -> Any:
            config = GEOMETRIES[name]
            fields = pretrained.family_of(config).config_to_hf(config)
            return transformers.T5Config(**fields | {"dropout_rate": DROPOUT})

        self._products = getattr(torch, arguments.dtype)
        self._device = device
        # Made where they will be: a billion random numbers take a CPU too long.
        with torch.device(device):
            self.llm = transformers.T5EncoderModel(config_of(arguments.llm)).eval()
            self.slm = transformers.T5ForConditionalGeneration(config_of(arguments.slm)).train()
            width = self.slm.config.d_model
            self.projector = torch.nn.Sequential(
                torch.nn.Linear(self.llm.config.d_model, width, bias=False),
                torch.nn.ReLU(),
                torch.nn.Linear(width, width, bias=False),
            )
        self.llm.requires_grad_(False)
        if "bfloat16" in (arguments.encoder_dtype, arguments.dtype):
            self.llm.to(torch.bfloat16)
        self.layers = [*self.llm.encoder.block, *self.slm.encoder.block, *self.slm.decoder.block]
        self.trained = [*self.projector.parameters(), *self.slm.parameters()]

    def loss(self, ids: Any, mask: Any, labels: Any) -> Any:
        """Mean cross entropy of `labels` [B, S], given the prompt `ids` [B, T] under `mask`."""
        import torch

        with torch.no_grad():
            hidden = self.llm(input_ids=ids, attention_mask=mask).last_hidden_state
        mixed = self._products != torch.float32
        with torch.autocast(self._device, self._products, enabled=mixed):
            fused = self.slm.shared(ids) + self.projector(hidden.float())
            return self.slm(
                inputs_embeds=fused, attention_mask=mask, labels=labels, use_cache=False
            ).loss


def torch_side(arguments: argparse.Namespace, mode: str | None) -> Step:
    """The same by transformers; `mode` is that of torch.compile, None leaves it eager."""
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = TorchModels(arguments, device)
    optimizer = torch.optim.AdamW(models.trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    batch = {
        key: torch.tensor(value).to(device)
        for key, value in random_batch(arguments, models.slm.config.vocab_size).items()
    }
    inputs = (batch["llm_ids"].long(), batch["llm_mask"].long(), batch["response_ids"].long())
    loss_of = models.loss
    if mode:
        # An error, where it would run uncompiled what it has compiled too often.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    if mode == PER_LAYER:
        # One code for all layers: first and others, of LLM, encoder and decoder.
        torch._dynamo.config.recompile_limit = 32
        for layer in models.layers:
            layer.compile(dynamic=False)
    elif mode:
        loss_of = torch.compile(models.loss, mode=mode, dynamic=False)

    def run(steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(*inputs)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(models.trained, CLIP)
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    facts = {
        "attention": models.slm.config._attn_implementation,
        "parameters": sum(parameter.numel() for parameter in models.trained),
        "llm_parameters": sum(parameter.numel() for parameter in models.llm.parameters()),
    }
    return Step(run, facts, torch.cuda.max_memory_allocated if device == "cuda" else lambda: None)


def make(name: str, arguments: argparse.Namespace) -> Step:
    """The side of that name."""
    if name == OURS:
        return ours(arguments)
    if name == EAGER:
        return torch_side(arguments, None)
    return torch_side(arguments, name.removeprefix(COMPILED).strip() or MODES[0])


def names_of(modes: Sequence[str]) -> list[str]:
    """The sides: ours, PyTorch eager, and compiled in each of these modes."""
    return [OURS, EAGER, *(COMPILED if m == MODES[0] else f"{COMPILED} {m}" for m in modes)]
