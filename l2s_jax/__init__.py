"""LLM-to-SLM in JAX/Flax: encode once with a large model, decode with a small one."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l2s_jax.serving.model import Model

__version__ = "0.1.0"


def load(directory: str, **settings: Any) -> Model:
    """The L2S model in a directory, or on the hub, ready to answer.

    See `l2s_jax.serving.loading.load`. What is wrong with a setting is a ValueError before anything
    is read.
    """
    # Imported here, so that the package's name alone, and --help, don't wait for JAX.
    from l2s_jax.serving import loading
    from l2s_jax.serving.bundle_config import check_given

    named = inspect.getfullargspec(loading.load).kwonlyargs
    check_given({name: settings[name] for name in settings if name not in named}, named)
    return loading.load(directory, **settings)
