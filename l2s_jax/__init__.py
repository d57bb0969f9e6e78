"""LLM-to-SLM in JAX/Flax: encode once with a large model, decode with a small one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l2s_jax.serving.generator import Generator

__version__ = "0.1.0"


def load(directory: str, **settings: Any) -> Generator:
    """The L2S model in a directory, ready to answer; see `l2s_jax.serving.loading.load`."""
    # Imported here, so that the package's name alone, and --help, don't wait for JAX.
    from l2s_jax.serving import loading

    return loading.load(directory, **settings)
