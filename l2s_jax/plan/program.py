"""A program of a plan: what it is for, whether it fits, what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from l2s_jax.cluster.chips import COLLECTIVE_S, Chip
from l2s_jax.plan.hlo import Collective


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one run on one device: operations, bytes of memory read and written, collectives."""

    flops: float
    memory_bytes: float
    collectives: tuple[Collective, ...]

    def roofline(self, chip: Chip, sent_per_s: float, slices: int = 1) -> dict[str, float]:
        """Milliseconds that each would take at the chip's published rate.

        `sent_per_s` as of `Slice`. Latency is that of as many collectives, one after another. Of
        several slices there is also the time of what they send each other.
        """
        sent = sum(c.sent * c.times for c in self.collectives)
        between = sum(c.sent_over_dcn * c.times for c in self.collectives)
        return {
            "compute_ms": self.flops / chip.flops * 1e3,
            "memory_ms": self.memory_bytes / chip.hbm * 1e3,
            "network_ms": sent / sent_per_s * 1e3 if sent else 0.0,
            "latency_ms": sum(c.times for c in self.collectives) * COLLECTIVE_S * 1e3,
        } | ({"dcn_ms": between / chip.dcn * 1e3} if slices > 1 else {})


@dataclasses.dataclass(frozen=True)
class Program:
    """A program compiled for a slice; sizes in bytes on each device.

    peak: with what others hold there while it runs. temporaries, peak and costs are None where the
    compiler gave up, or was not asked, because the program cannot fit. A step of decode or advance
    is one token of each row, of the others one batch.
    """

    batch_size: int
    arguments: int
    temporaries: int | None
    peak: int | None
    fits: bool
    costs: Costs | None
    compile_s: float


@dataclasses.dataclass(frozen=True)
class Work:
    """How a system is trained (None: not at all) and answers, of all that a config says.

    batch_size: prompts that it answers, or reads, at a time; 0: none. train_where and
    decoding_where: the sections, which make no other work of it. features: training is given H.
    distilled: it is given the LLM's distributions. seed: of what is random in it. together: of rows
    that are refilled, those that are read for at a time; 0: prompts are answered in batches.
    """

    train: ConfigDict | None = None
    batch_size: int = 0
    max_new_tokens: int = 1
    search: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    train_where: str = dataclasses.field(default="l2s.train", compare=False)
    decoding_where: str = dataclasses.field(default="decoding", compare=False)
    features: bool = False
    distilled: bool = False
    seed: int = 0
    together: int = 0


def shard_bytes(leaf: Any) -> int:
    """Bytes of an abstract array on each device that holds a part of it."""
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    return jax.ShapeDtypeStruct(shape, leaf.dtype).size * leaf.dtype.itemsize


def held_bytes(tree: Any) -> int:
    """Bytes of abstract arrays on each device."""
    return sum(map(shard_bytes, jax.tree.leaves(tree)))
