"""One update of a system: the state that training changes, the loss, the compiled step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, Key
from ml_collections import ConfigDict

from l2s_jax.cluster import sharding
from l2s_jax.models.families import ModelConfig
from l2s_jax.models.scored import Scored
from l2s_jax.models.systems import Batch, Params
from l2s_jax.training import PRNG, chunks, losses, optim
from l2s_jax.training.distillation import Distillation, divergence
from l2s_jax.training.finite import all_finite
from l2s_jax.training.flops import training_flops
from l2s_jax.training.on_policy import own_loss
from l2s_jax.training.parts import in_parts


@runtime_checkable
class Trainable(Protocol):
    """What training asks of a system, LoRA's among them."""

    @property
    def prompt_name(self) -> str:
        """Prefix of the batch keys that hold the prompt."""
        ...

    def scored(
        self,
        trained: Params,
        frozen: Params,
        batch: Batch,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Scored:
        """The response, teacher-forced."""
        ...


class TrainState(struct.PyTreeNode):
    """All that training changes, in arrays or their shapes or shardings; the frozen LLM is not.

    average: exponential moving average of params, which is what a run returns; None without one.
    """

    step: Any
    params: Params
    opt_state: optax.OptState
    average: Params | None


def init_state(
    params: Params, optimizer: optax.GradientTransformation, config: ConfigDict
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        average=jax.tree.map(jnp.copy, params) if config.ema_decay else None,
    )


def place_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    shardings: TrainState,
) -> TrainState:
    """`init_state` on a mesh; parameters that lie there already are given up for it."""

    def init(params: Params) -> TrainState:
        return init_state(params, optimizer, config)

    state = jax.jit(init, out_shardings=shardings)(sharding.put(params, shardings.params))
    sharding.free(params, shardings.params)
    return state


def state_shardings(
    params: Params, optimizer: optax.GradientTransformation, config: ConfigDict, mesh: Mesh
) -> TrainState:
    """Shardings of `init_state(params, ...)`, in its shape."""
    of_params = sharding.parameter_shardings(params, mesh)
    return TrainState(
        step=NamedSharding(mesh, P()),
        params=of_params,
        opt_state=sharding.optimizer_shardings(optimizer, params, of_params, mesh),
        average=of_params if config.ema_decay else None,
    )


def batch_loss(
    system: Trainable,
    params: Params,
    frozen: Params,
    batch: Batch,
    dropout_key: Key[Array, ""] | None,
    label_smoothing: float,
    distillation: Distillation | None = None,
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """Sum of the loss over a batch's response tokens, and sums of what is reported.

    With `distillation` the batch holds "teacher_ids" and "teacher_log_probs" [B, S, k].
    """

    def read(logits: jax.Array, _: Any, tokens: Batch) -> tuple[jax.Array, chunks.Sums]:
        targets, mask = tokens["response_ids"], tokens["response_mask"]
        loss, number = losses.cross_entropy(logits, targets, mask, label_smoothing)
        correct = losses.correct_tokens(logits, targets, mask)
        if distillation is None:
            return loss, {"loss": loss, "tokens": number, "correct": correct}
        weight, temperature = distillation
        teacher = tokens["teacher_ids"], tokens["teacher_log_probs"]
        apart = divergence(logits, mask, *teacher, temperature)
        loss = (1 - weight) * loss + weight * temperature**2 * apart
        return loss, {"loss": loss, "tokens": number, "correct": correct, "divergence": apart}

    names = ("response_ids", "response_mask", "teacher_ids", "teacher_log_probs")
    tokens = {name: batch[name] for name in names if name in batch}
    return chunks.summed(read, system.scored(params, frozen, batch, dropout_key), tokens)


def train_step(
    state: TrainState,
    frozen: Any,
    batch: Batch,
    *,
    system: Trainable,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    seed: int,
    prng: str = PRNG,
    distillation: Distillation | None = None,
    llm: ModelConfig | None = None,
) -> tuple[TrainState, dict[str, Float32[Array, ""]]]:
    """One update. The gradient is that of the mean loss over the whole batch's response tokens.

    With `accumulation` A the batch is taken in A parts of every A-th row, one after another. With
    `llm` the system wrote the batch, and the loss and `frozen` are those of `on_policy.own_loss`.
    Where the loss or the gradient is not finite, the update is left out, and the metric `skipped`
    is 1. `prng` names what masks of dropout are drawn by, as `jax.random.key` has it.
    """
    key = jax.random.fold_in(jax.random.key(seed, impl=prng), state.step)
    trained = optim.trained_mask(config, state.params)

    def loss(
        params: Params, frozen: Any, rows: Batch, dropout_key: Key[Array, ""] | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        fixed = jax.lax.stop_gradient(params)
        params = optim.keep_fixed(trained, params, fixed)
        if llm is not None:
            return own_loss(system, params, frozen, rows, dropout_key, llm)
        smoothing = config.label_smoothing
        return batch_loss(system, params, frozen, rows, dropout_key, smoothing, distillation)

    gradient = jax.grad(loss, has_aux=True)

    def part(carry: Any, inputs: Any) -> tuple[Any, None]:
        index, rows = inputs
        dropout_key = jax.random.fold_in(key, index) if config.dropout_rate else None
        new = gradient(state.params, frozen, rows, dropout_key)
        return jax.tree.map(jnp.add, carry, new), None

    parts = in_parts(batch, config.accumulation)
    zero = jax.tree.map(jnp.zeros_like, state.params)
    mean = ("loss", "divergence") if distillation and llm is None else ("loss",)
    sums = {name: jnp.zeros(()) for name in (*mean, "tokens", "correct")}
    if config.accumulation == 1:
        (grads, sums), _ = part((zero, sums), (0, batch))
    else:
        (grads, sums), _ = jax.lax.scan(
            part, (zero, sums), (jnp.arange(config.accumulation), parts)
        )

    tokens = jnp.maximum(sums["tokens"], 1.0)
    grads = jax.tree.map(lambda g: g / tokens, grads)
    grad_norm = optax.tree.norm(grads)
    is_finite = all_finite((sums, grad_norm))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # Adding a zero can change a bit, that of -0.0, and so can the mean of two equal numbers.
    params = optim.keep_fixed(trained, params, state.params)
    average = state.average
    if average is not None:
        # Early on, the average forgets its random beginning faster.
        decay = jnp.minimum(config.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        average = optax.incremental_update(params, average, 1.0 - decay)
        average = optim.keep_fixed(trained, average, state.average)
    # What is not finite changes nothing but the step's number.
    params, opt_state, average = jax.tree.map(
        lambda new, old: jnp.where(is_finite, new, old),
        (params, opt_state, average),
        (state.params, state.opt_state, state.average),
    )
    if llm is None:
        means = {name: sums[name] / tokens for name in mean}
        means["accuracy"] = sums["correct"] / tokens
    else:
        means = {
            "on_policy_loss": sums["loss"] / tokens,
            "on_policy_agreement": sums["correct"] / tokens,
            "on_policy_tokens": sums["tokens"] / len(batch["response_ids"]),
        }
    metrics = {
        **means,
        "grad_norm": grad_norm,
        "learning_rate": optim.schedule(config)(state.step),
        "skipped": 1.0 - is_finite,
    }
    return TrainState(state.step + 1, params, opt_state, average), metrics


def make_step(
    system: Trainable,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    seed: int,
    shardings: TrainState,
    distillation: Distillation | None = None,
    llm: ModelConfig | None = None,
    prng: str = PRNG,
) -> Callable[..., tuple[TrainState, dict[str, Float32[Array, ""]]]]:
    """`train_step` as it is compiled: (state, frozen, batch) -> (state, metrics).

    The state is given away, and comes back in `shardings`; all devices have the metrics, as they
    have the step's number.
    """
    return jax.jit(
        functools.partial(
            train_step,
            system=system,
            optimizer=optimizer,
            config=config,
            seed=seed,
            prng=prng,
            distillation=distillation,
            llm=llm,
        ),
        donate_argnums=0,
        out_shardings=(shardings, shardings.step),
    )


def step_flops(
    system: Trainable,
    params: Params,
    frozen: Any,
    batch: Mapping[str, Any],
    config: ConfigDict,
    llm: ModelConfig | None = None,
) -> float:
    """Operations of the products that one update on `batch` has to make, over all devices.

    `llm` as of `train_step`. What writes a batch is not counted.
    """

    def loss(params: Params, frozen: Any, batch: Mapping[str, Any]) -> jax.Array:
        if llm is not None:
            return own_loss(system, params, frozen, batch, None, llm)[0]
        return batch_loss(system, params, frozen, batch, None, 0.0)[0]

    return training_flops(loss, params, optim.trained_mask(config, params), frozen, batch)


def abstract_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    shardings: TrainState,
) -> TrainState:
    """Shapes, dtypes and shardings of `init_state(params, ...)`."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(lambda p: init_state(p, optimizer, config), params),
        shardings,
    )
