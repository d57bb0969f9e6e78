"""LLM-to-SLM in JAX/Flax: encode once with a large model, decode with a small one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l2s_jax.serving.model import Model

__version__ = "0.1.0"


def load(directory: str, **settings: Any) -> Model:
    """The L2S model in a directory, or on the hub, ready to answer.

    See `l2s_jax.serving.loading.load`.
    """
    # Imported here, so that the package's name alone, and --help, don't wait for JAX.
    from l2s_jax.serving import loading

    return loading.load(directory, **settings)
