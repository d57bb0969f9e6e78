"""Rotary positions (Su et al. 2021, arXiv 2104.09864) and the ways to stretch them.

The two halves of the rotated share of a head are the two coordinates of its planes, as in GPT-NeoX
and Llama (not interleaved).
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from l2s_jax.models.sizes import check_finite

KINDS = ("default", "linear", "llama3", "yarn")
_FACTORS = (
    "base", "factor", "low_frequency_factor", "high_frequency_factor", "beta_fast", "beta_slow",
    "attention_factor",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotates the first `width` numbers of each head, `kind` one of KINDS.

    linear: positions shrink by `factor` (Chen et al. 2023, arXiv 2306.15595). llama3: only
    frequencies whose wavelength is long against `original_length` shrink, between
    `low_frequency_factor` and `high_frequency_factor` by degrees (Llama 3.1). yarn: likewise,
    between `beta_fast` and `beta_slow` turns over `original_length`, and queries and keys are
    scaled by `attention_factor` (Peng et al. 2023, arXiv 2309.00071, equations 19 to 23).
    """

    width: int
    base: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"rotary kind {self.kind!r}: expected one of {KINDS}")
        if self.kind == "llama3" and self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError(
                f"rotary low_freq_factor {self.low_frequency_factor}: expected less than "
                f"high_freq_factor {self.high_frequency_factor}"
            )
        if not 2 <= self.width <= 2**16 or self.width % 2:
            raise ValueError(f"rotary width {self.width}: expected an even number, 2 to {2**16}")
        check_finite(self, *_FACTORS)
        if self.kind in ("llama3", "yarn") and not 1 <= self.original_length < 2**31:
            raise ValueError(
                f"rotary original_length {self.original_length}: expected 1 to {2**31 - 1}"
            )
        if self.kind == "yarn" and self.base <= 1:
            raise ValueError(f"rotary base {self.base}: expected a number above 1")
        with np.errstate(all="ignore"):
            is_finite = np.isfinite(self.frequencies()).all()
        if not is_finite:
            raise ValueError(f"rotary base {self.base}: frequencies that are not finite")

    def frequencies(self) -> Float32[np.ndarray, " {self.width}//2"]:
        """Radians per position of each plane."""
        plain = self.base ** -(np.arange(0, self.width, 2) / self.width)
        if self.kind == "default":
            return plain.astype(np.float32)
        if self.kind == "linear":
            return (plain / self.factor).astype(np.float32)
        if self.kind == "llama3":
            turns = self.original_length * plain / (2 * math.pi)
            low, high = self.low_frequency_factor, self.high_frequency_factor
            kept = np.clip((turns - low) / (high - low), 0, 1)
        else:
            planes = [self._plane(turns) for turns in (self.beta_fast, self.beta_slow)]
            first, last = max(math.floor(planes[0]), 0), min(math.ceil(planes[1]), self.width - 1)
            ramp = (np.arange(self.width // 2) - first) / max(last - first, 1e-3)
            kept = 1 - np.clip(ramp, 0, 1)
        return (kept * plain + (1 - kept) * plain / self.factor).astype(np.float32)

    def _plane(self, turns: float) -> float:
        """The plane, as a fraction, that turns this often over the original length."""
        wavelength = self.original_length / (turns * 2 * math.pi)
        return self.width * math.log(wavelength) / (2 * math.log(self.base))

    def __call__(
        self, x: Float[Array, "B N T H"], positions: Int32[Array, "B T"]
    ) -> Float32[Array, "B N T H"]:
        """x, each of its planes turned as far as its position says."""
        frequencies = jnp.expand_dims(self.frequencies(), (0, 1, 2))
        angles = positions[:, None, :, None].astype(jnp.float32) * frequencies
        scale = self.attention_factor
        cos, sin = jnp.cos(angles) * scale, jnp.sin(angles) * scale
        x = x.astype(jnp.float32)
        first, second, rest = jnp.split(x, (self.width // 2, self.width), axis=-1)
        return jnp.concatenate(
            [first * cos - second * sin, second * cos + first * sin, rest], axis=-1
        )
