"""Ours on the device: programs to compare, and where two outputs part and by how little.

A model that says one token and not another has found the one's logit larger. Two correct programs
may disagree only where the two logits are closer than what rounding moves them by: a tie.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from l2s_jax.decoding.engine import GREEDY, jitted_decode
from l2s_jax.models.systems import LanguageModel
from l2s_jax.settings.search import Search

if TYPE_CHECKING:
    from benchmarks.gpu.right_reference import Reference

DTYPES = ("float32", "bfloat16")

# Of the gap of two bfloat16 logits, in root mean square errors of one. In a gap there are two, and
# it is a difference of two programs: 2 such errors are its standard deviation, if none cancel.
DEVIATIONS = 6

PAD_ID = 0
FIRST_ID = 2  # of the ids that prompts are drawn from: 0 is padding, 1 the default eos


@dataclasses.dataclass(frozen=True)
class Size:
    """Geometry of the models, and what they are asked.

    rows: prompts of a batch. prompt, longer: its tokens and those of one with more padding.
    new: tokens of a response. T5 has `layers` in its encoder and as many in its decoder.
    searched, in_company: models of which so much is asked; each takes programs of its own.
    """

    width: int
    heads: int
    layers: int
    vocab: int
    rows: int
    prompt: int
    longer: int
    new: int
    searched: tuple[str, ...]
    in_company: tuple[str, ...]


CARD = Size(
    width=512,
    heads=8,
    layers=4,
    vocab=2048,
    rows=32,
    prompt=32,
    longer=48,
    new=32,
    searched=("T5 v1.0", "Flan-T5", "GPT-2", "GPT-NeoX", "Llama", "Qwen3"),
    in_company=("Flan-T5", "Llama"),
)
REHEARSAL = Size(
    width=32,
    heads=4,
    layers=1,
    vocab=64,
    rows=6,
    prompt=8,
    longer=12,
    new=8,
    searched=("Llama",),
    in_company=("Llama",),
)


class Prompts(NamedTuple):
    """int32 and bool [B, T]; ids that the mask leaves out are random."""

    ids: np.ndarray
    mask: np.ndarray

    def row(self, i: int) -> Prompts:
        """One of them, as a batch."""
        return Prompts(self.ids[i : i + 1], self.mask[i : i + 1])


def draw_prompts(size: Size, side: str, seed: int = 0) -> Prompts:
    """Prompts of different lengths, padded on one `side`; "both": left, right, not at all in turn.

    Padding holds random tokens, so that a mask that is not looked at changes the results.
    """
    random = np.random.default_rng(seed)
    shape = size.rows, size.prompt
    ids = random.integers(FIRST_ID, size.vocab, shape, dtype=np.int32)
    padding = random.integers(0, size.prompt // 2 + 1, (size.rows, 1))
    left = np.arange(size.prompt) >= padding
    right = left[:, ::-1].copy()  # torch takes no negative strides
    if side == "both":
        turn = np.arange(size.rows)[:, None] % 3
        return Prompts(ids, np.where(turn == 0, left, right | (turn == 2)))
    return Prompts(ids, {"left": left, "right": right}[side])


@dataclasses.dataclass(frozen=True)
class Subject:
    """One checkpoint in transformers' hands and, in both dtypes, in ours.

    systems, params: by dtype; params lie on the device as generation holds them.
    prompts: padded on the side where transformers generates.
    said: int32 [B, S], transformers' greedy responses without an end.
    """

    name: str
    reference: Reference
    systems: dict[str, LanguageModel]
    params: dict[str, Any]
    prompts: Prompts
    said: np.ndarray

    @property
    def eos_id(self) -> int:
        return self.systems["float32"].config.eos_id


def make_subject(
    name: str, reference: Reference, module: nn.Module, params: Any, size: Size
) -> Subject:
    """Of what `load_hf` read of the reference's checkpoint.

    The eos is a token that about half of the responses hold, as a random model's own never comes.
    """
    prompts = draw_prompts(size, "right" if reference.encoder_decoder else "left")
    said, _ = reference.generate(prompts, size.new)
    shares = [(said[:, 1:] == token).any(1).mean() for token in range(size.vocab)]
    shares[PAD_ID] = 0.0
    eos_id = int(np.argmin(np.abs(np.array(shares) - 0.5)))
    systems, held = {}, {}
    for dtype in DTYPES:
        fields = {"dtype": jnp.dtype(dtype), "eos_id": eos_id}
        systems[dtype] = LanguageModel("llm", dataclasses.replace(module.config, **fields))
        served, _ = systems[dtype].to_serve({"llm": params}, {})
        held[dtype] = jax.device_put(served)
    return Subject(name, reference, systems, held, prompts, said)


def precision(dtype: str) -> contextlib.AbstractContextManager:
    """float32 products in float32; those of bfloat16 as everyone has them."""
    if dtype == "float32":
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


@functools.partial(jax.jit, static_argnames="system")
def _jitted_logits(system: LanguageModel, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    return system.scored(params, {}, batch).logits()


def logits(subject: Subject, prompts: Prompts, response_ids: np.ndarray, dtype: str) -> np.ndarray:
    """float32 [B, S, V] of each token of a response."""
    batch = {"llm_ids": prompts.ids, "llm_mask": prompts.mask, "response_ids": response_ids}
    with precision(dtype):
        return np.asarray(_jitted_logits(subject.systems[dtype], subject.params[dtype], batch))


def decode(
    subject: Subject,
    prompts: Prompts,
    size: Size,
    dtype: str,
    search: Search = GREEDY,
    program: Callable[..., Any] = jitted_decode,
) -> tuple[np.ndarray, np.ndarray | None]:
    """(int32 [B, S], scores [B] of a beam search); `program` has jitted_decode's arguments."""
    limits = np.full(len(prompts.ids), size.new, np.int32)
    with precision(dtype):
        decoded = program(
            subject.systems[dtype],
            subject.params[dtype],
            {},
            *prompts,
            limits,
            max_new_tokens=size.new,
            search=search,
        )
    if search.num_beams == 1:
        return np.asarray(decoded.tokens), None
    return np.asarray(decoded.tokens)[:, 0], np.asarray(decoded.scores)[:, 0]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Where a row's two outputs part.

    margin: between the two best logits there.
    gap: from the best to the lesser of the two tokens' logits; the margin if they are the two best.
    """

    row: int
    step: int
    margin: float
    gap: float


def differences(one: np.ndarray, other: np.ndarray, scores: np.ndarray) -> list[Difference]:
    """Of outputs int32 [B, S], with the logits [B, S, V] of the first."""
    found = []
    for row in np.flatnonzero((one != other).any(1)):
        step = int((one[row] != other[row]).argmax())
        here = scores[row, step]
        second, best = np.partition(here, -2)[-2:]
        lesser = min(here[one[row, step]], here[other[row, step]])
        found.append(Difference(int(row), step, float(best - second), float(best - lesser)))
    return found


def in_every_company(
    prompts: Prompts, size: Size, run: Callable[[Prompts], np.ndarray]
) -> dict[str, np.ndarray]:
    """How the rows are run -> what they say, int32 [B, S].

    "one batch" and "among others" are one program, "alone" is a program for one row, and both ways
    to pad are a program for longer prompts.
    """
    random = np.random.default_rng(1)
    others = draw_prompts(size, "both", seed=2)
    kept = np.arange(size.rows)[:, None] % 2 == 0

    def among_others(stay: np.ndarray) -> np.ndarray:
        return run(Prompts(*(np.where(stay, *pair) for pair in zip(prompts, others, strict=True))))

    def padded(left: int) -> np.ndarray:
        sides = [(0, 0), (left, size.longer - size.prompt - left)]
        filled = random.integers(0, size.vocab, (size.rows, size.longer), dtype=np.int32)
        mask = np.pad(prompts.mask, sides)
        return run(Prompts(np.where(mask, np.pad(prompts.ids, sides), filled), mask))

    return {
        "alone": np.concatenate([run(prompts.row(i)) for i in range(size.rows)]),
        "one batch": run(prompts),
        "among others": np.where(kept, among_others(kept), among_others(~kept)),
        "padded on the left": padded(size.longer - size.prompt),
        "padded on the right": padded(0),
    }


def product_error(level: str | None) -> float:
    """Of a float32 product on the device under a matmul precision, relative to the largest."""
    random = np.random.default_rng(0)
    x, y = (random.normal(size=(512, 512)).astype(np.float32) for _ in range(2))
    with jax.default_matmul_precision(level) if level else contextlib.nullcontext():
        found = np.asarray(jax.jit(jnp.matmul)(x, y))
    exact = x.astype(np.float64) @ y.astype(np.float64)
    return float(np.abs(found - exact).max() / np.abs(exact).max())


def rms(difference: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))
