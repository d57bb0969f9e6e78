"""The training of one system: from its newest checkpoint to the last step, and what it logs."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from l2s_jax.cluster import distributed, sharding, stopping
from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.cluster.stopping import Stopped
from l2s_jax.files import is_bucket
from l2s_jax.models.systems import Params
from l2s_jax.training import PRNG, on_policy, optim, spent
from l2s_jax.training.bucket_checkpoints import BucketCheckpoints
from l2s_jax.training.checkpoint import Checkpoints
from l2s_jax.training.clock import Clock
from l2s_jax.training.compiled import CompiledSteps
from l2s_jax.training.distillation import Distillation
from l2s_jax.training.finite import Watch, all_finite
from l2s_jax.training.meter import Meter
from l2s_jax.training.on_policy import OnPolicy
from l2s_jax.training.parts import rows_of
from l2s_jax.training.progress import MetricWriter, NoWriter
from l2s_jax.training.trackers import Trackers
from l2s_jax.training.update import (
    Trainable,
    TrainState,
    abstract_state,
    batch_loss,
    make_step,
    place_state,
    state_shardings,
    step_flops,
)

T = TypeVar("T")


@runtime_checkable
class Until(Protocol):
    """What things go through, one after another; it ends with an error of its own."""

    def __call__(self, things: Iterable[T], /) -> Iterator[T]:
        """The things."""
        ...


@runtime_checkable
class Judge(Protocol):
    """Says what more is known of parameters, than their loss, that lie on the mesh."""

    def __call__(self, params: Params, frozen: Params, until: Until) -> Judged:
        """`until` is what its work goes through, piece by piece, alike in all processes."""
        ...


@runtime_checkable
class Batches(Protocol):
    """Endless batches, and where in them a run is."""

    def __next__(self) -> Mapping[str, np.ndarray]:
        """The next batch, of the rows of this process."""
        ...

    def get_state(self) -> dict[str, Any]:
        """What JSON can hold."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called."""
        ...


class Judged(NamedTuple):
    """What else a validation finds.

    scores: by name, beside those of `validation_scores`.
    samples: texts by what they are, of a few examples.
    """

    scores: Mapping[str, float]
    samples: Sequence[Mapping[str, str]]


# Of `TrainConfig.select`: by which score a checkpoint is chosen.
_RANKS = {"best": "val_accuracy", "quality": "val_quality", "last": None}


def validation_scores(
    score: Any, params: Params, frozen: Params, batches: Iterable[Mapping[str, AnyArray]]
) -> dict[str, float]:
    """Mean loss (nats), perplexity and accuracy per response token, over all of `batches`."""
    sums: list[Any] = []
    for batch in batches:
        sums.append(score(params, frozen, batch))
        # While the device is at one batch the next is put there, and no more than that.
        sums[-2:-1] = jax.device_get(sums[-2:-1])
    sums = jax.device_get(sums)
    loss, tokens, correct = (
        float(sum(np.float64(batch[name]) for batch in sums))
        for name in ("loss", "tokens", "correct")
    )
    tokens = max(tokens, 1.0)  # an LLM that says nothing gives labels without a token
    return {
        "val_loss": loss / tokens,
        "val_perplexity": math.exp(min(loss / tokens, 50.0)),
        "val_accuracy": correct / tokens,
    }


def fit(
    system: Trainable,
    frozen: Params,
    params: Params,
    config: ConfigDict,
    *,
    batches: Batches,
    validation: Iterable[Mapping[str, np.ndarray]],
    directory: str,
    fingerprint: str,
    seed: int,
    mesh: Mesh,
    prng: str = PRNG,
    judge: Judge | None = None,
    distillation: Distillation | None = None,
    policy: OnPolicy | None = None,
    examples: Callable[[int], Iterable[int]] | None = None,
    trackers: Trackers | None = None,
    compiled: CompiledSteps | None = None,
) -> Params:
    """Trains `params` for `config.steps` and returns the selected ones, on the host of process 0.

    The other processes are given None for each array. `params` that lie on the mesh, where the
    rules place them, are given up.

    Every `evaluate_every` steps and at the end: validation and a checkpoint in
    `directory/checkpoints`, and one every `save_minutes` too. A run that finds one continues from
    it exactly, with the same batches; one of another `fingerprint` is an error. Metrics go to
    `directory` and to `trackers` (see progress.py).

    All processes of a job call it alike, but for `batches` and `validation`, which give each its
    own rows (`sharding.batch_rows`). Their number changes nothing else. `validation`, batches of
    `rows_of` rows, is gone through once for each, and is scored without `distillation`. There
    `judge` says more: with `config.select` "quality" a score `val_quality`. With `policy` the
    system answers the prompts of some batches itself, and these are the responses that it learns;
    other batches are as without. `examples(step)`, where it is given, has the numbers of a step's
    examples, for messages. `prng` as of `update.train_step`. Steps that are `compiled` are taken
    from there, but for those on the system's own responses.

    Raises:
      NotFinite: more than `config.max_bad_steps` steps in a row had a loss or a gradient that is
        not finite, or a model that would be saved or its validation is not.
      ValueError: a step that is `compiled` is of another training.
      CannotWrite: a checkpoint or metrics.
      Stopped: the run was asked to end, and did after a step, which is saved. A validation that
        it was at is made by the run that continues.
    """
    name = os.path.basename(directory)
    optimizer = optim.optimizer(config, params)
    shardings = state_shardings(params, optimizer, config, mesh)
    replicated = NamedSharding(mesh, P())
    rows = sharding.batch_rows(mesh, config.batch_size)
    if compiled:
        step_fn = compiled.step(name, system, config, seed, distillation, prng)
    else:
        step_fn = make_step(system, optimizer, config, seed, shardings, distillation, prng=prng)
    if policy:
        write_fn = on_policy.make_writer(system, policy, seed, mesh, config.accumulation)
        own_step_fn = make_step(
            system, optimizer, config, seed, shardings, llm=policy.llm, prng=prng
        )
    score_fn = jax.jit(
        lambda params, frozen, batch: batch_loss(system, params, frozen, batch, None, 0.0)[1],
        out_shardings=replicated,
    )
    finite_fn = jax.jit(all_finite, out_shardings=replicated)
    best_metric = _RANKS[config.select]
    with (
        jax.set_mesh(mesh),
        (BucketCheckpoints if is_bucket(directory) else Checkpoints)(
            os.path.join(directory, "checkpoints"), best_metric=best_metric
        ) as checkpoints,
    ):
        abstract = abstract_state(params, optimizer, config, shardings)
        frozen = sharding.put_parameters(frozen, mesh)
        of_llm = sharding.put_parameters(policy.params, mesh) if policy else {}
        put = functools.partial(sharding.put_batch, mesh=mesh)
        at_a_time = rows_of(config, sharding.batch_ways(mesh))
        start = checkpoints.latest_step
        saved: Mapping[str, Any] = {}
        state: TrainState | None = None  # where nothing is left to be trained
        if start is None:
            start = 0
            state = place_state(params, optimizer, config, shardings)
        else:
            sharding.free(params, shardings.params)  # before others come in their place
            saved = checkpoints.config(start)
            if saved["fingerprint"] != fingerprint:
                raise ValueError(
                    f"checkpoints in {directory} come from another configuration: "
                    "remove them or use another workdir"
                )
            if start < config.steps or saved.get("owed"):
                state, data_state = _restore(checkpoints, start, abstract)
                batches.set_state(data_state)

        owed = bool(saved.get("owed"))
        if state is not None:
            with (
                (MetricWriter if distributed.is_primary() else NoWriter)(
                    directory,
                    total_steps=config.steps,
                    start_step=start if owed else start + 1,
                    owed=owed,
                    name=name,
                    trackers=trackers,
                ) as writer,
                stopping.deferred() as asked_to_stop,
                spent.on("steps"),
            ):

                def judging(things: Iterable[T]) -> Iterator[T]:
                    return writer.telling("answering", asked_to_stop.until(things))

                share = config.batch_size / len(rows)
                counted = saved.get("bad_steps", {})
                watch = Watch(name, config.max_bad_steps, counted, examples)
                meter = Meter(writer, config, mesh, share, watch, has_own=policy is not None)
                if "meter" in saved:
                    meter.set_state(saved["meter"])
                clock = Clock(config.save_minutes, start)
                flops: dict[Any, float] = {}
                for step in range(start if owed else start + 1, config.steps + 1):
                    is_owed = step == start
                    if not is_owed:
                        with meter.waiting(), spent.on("data"):
                            batch = next(batches)
                        placed = put(batch, batch_size=config.batch_size)
                        own = bool(policy) and on_policy.is_own(step, policy.share, seed)
                        llm = policy.llm if policy and own else None
                        run, given = (own_step_fn, (frozen, of_llm)) if own else (step_fn, frozen)
                        shapes = own, *((name, value.shape) for name, value in placed.items())
                        first = shapes not in flops
                        with meter.compiling(first=first):
                            if own:
                                written = write_fn(state.params, frozen, placed, state.step)
                                placed = on_policy.with_responses(placed, written)
                            if first:
                                flops[shapes] = step_flops(
                                    system, state.params, given, placed, config, llm
                                )
                            state, metrics = run(state, given, placed)
                        meter.dispatched(step, metrics, batch, flops[shapes], own)
                    is_due = step % config.evaluate_every == 0 or step == config.steps
                    is_judged = is_owed or is_due
                    is_timed = clock.is_due(step)
                    signal = asked_to_stop()
                    if not (is_judged or is_timed or signal):
                        continue
                    meter.flush()
                    watch.look(step)
                    watch.check(step, "parameters are", bool(finite_fn(state)))
                    scores = None
                    if is_judged:
                        with spent.on("evaluating"), contextlib.suppress(stopping.Cut):
                            told = writer.telling("validating", asked_to_stop.until(validation))
                            found = (put(part, batch_size=at_a_time) for part in told)
                            judged = validation_scores(score_fn, _weights(state), frozen, found)
                            is_finite = math.isfinite(judged["val_loss"])
                            watch.check(step, "the loss on the validation split is", is_finite)
                            if judge:
                                more = judge(_weights(state), frozen, judging)
                                judged |= more.scores
                                writer.write_samples(step, more.samples)
                            writer.write(step, judged | spent.as_metrics(spent.taken()))
                            scores = judged
                        meter.restart()
                    began = time.perf_counter()
                    is_cut = is_judged and scores is None
                    with spent.on("saving"):
                        if not (is_cut and is_owed):
                            checkpoints.save(
                                step,
                                trees=_trees(state),
                                data=batches.get_state(),
                                config={
                                    **config.to_dict(),
                                    "fingerprint": fingerprint,
                                    "bad_steps": watch.state(),
                                    "meter": meter.state(),
                                    "owed": is_cut,
                                },
                                metrics=scores,
                                before=writer.sync,
                                again=is_owed,
                            )
                    spent.keep()
                    if signal := asked_to_stop():
                        checkpoints.wait()
                        distributed.barrier("saved")
                        raise Stopped(signal, f" after step {step} of {name}, which is saved")
                    meter.paused(time.perf_counter() - began)
                    clock.restart(step)
                # A signal that comes from here on ends the run, and the last step is saved.
                with spent.on("saving"):
                    checkpoints.wait()
                    distributed.barrier("saved")
        chosen = checkpoints.best_step or config.steps
        weights = _weights(state) if state is not None and chosen == config.steps else None
        state = None  # frees what is no longer needed, before others come in its place
        if weights is None:
            weights = _restore_weights(checkpoints, chosen, abstract)
    return sharding.gather_on_primary(weights)


def _weights(state: TrainState) -> Params:
    """What a run evaluates and returns."""
    return state.params if state.average is None else state.average


def _trees(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint: what a run may need alone is one of its own."""
    average = {} if state.average is None else {"average": state.average}
    return {**state.params, "opt": {"step": state.step, "opt_state": state.opt_state}, **average}


def _restore(
    checkpoints: Checkpoints, step: int, abstract: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    trees, data = checkpoints.restore(step, _trees(abstract))
    opt, average = trees.pop("opt"), trees.pop("average", None)
    return TrainState(opt["step"], trees, opt["opt_state"], average), data


def _restore_weights(checkpoints: Checkpoints, step: int, abstract: TrainState) -> Params:
    """What a run that chose `step` returns, and no more of it."""
    if abstract.average is None:
        return checkpoints.restore_trees(step, abstract.params)
    return checkpoints.restore_trees(step, {"average": abstract.average})["average"]
