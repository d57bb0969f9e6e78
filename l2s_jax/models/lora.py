"""LoRA (Hu et al. 2021, arXiv 2106.09685): training a low-rank change of a model's kernels.

It knows no family: it rewrites a parameter tree, and what comes out of training is an ordinary one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float32, Key

from l2s_jax.cluster.paths import matching
from l2s_jax.models.families import ModelConfig
from l2s_jax.models.systems import Batch, LanguageModel, LlmToSlm, Params


@dataclasses.dataclass(frozen=True)
class Lora:
    """A system whose language model is trained by LoRA: the SLM of an L2S, or a model alone.

    Each kernel [in, out] of it whose path matches all of `pattern` becomes
    `kernel + alpha / rank * a @ b` with a [in, rank] and b [rank, out], float32; all else of the
    model stays as it is. It has what training asks of a system, in the trees

        trained   {"lora": {"path/to/module": {"a", "b"}}}, beside an L2S's "projector"
        frozen    {"base": the model's parameters, "inner": what the system itself has frozen}

    b starts at zero, so an optimizer that measures updates by the size of a parameter
    (`train.parameter_scale`) hardly moves it.
    """

    system: LanguageModel | LlmToSlm
    rank: int
    alpha: float
    pattern: str

    @property
    def name(self) -> str:
        """That of the system."""
        return self.system.name

    @property
    def prompt_name(self) -> str:
        """Prefix of the batch keys that hold the prompt."""
        return self.system.prompt_name

    @property
    def decoder(self) -> ModelConfig:
        """Config of the model that decodes."""
        return self.system.decoder

    @property
    def _model(self) -> str:
        """The entry of the system's parameters that LoRA stands in for."""
        return self.system.name if isinstance(self.system, LanguageModel) else "slm"

    def _kernels(self, base: Params) -> list[str]:
        """Paths of the kernels in `base` that are adapted, in order."""
        flat: dict[str, Any] = flatten_dict(base, sep="/")
        kernels = [
            path
            for path, leaf in flat.items()
            if re.fullmatch("(.*/)?kernel", path) and leaf.ndim == 2
        ]
        return sorted(matching(self.pattern, kernels, "lora.pattern", what="kernel"))

    def init(self, key: Key[Array, ""], base: Params) -> dict[str, Any]:
        """The tree of a and b for a model's parameters: a normal, b zero.

        Raises:
          ValueError: the pattern matches no kernel.
        """
        flat: dict[str, Any] = flatten_dict(base, sep="/")
        paths = self._kernels(base)
        adapters = {}
        for path, own_key in zip(paths, jax.random.split(key, len(paths)), strict=True):
            inward, outward = flat[path].shape
            module = path.removesuffix("kernel")
            # x @ a is then of the size of x.
            normal = jax.random.normal(own_key, (inward, self.rank), jnp.float32)
            adapters[f"{module}a"] = normal * inward**-0.5
            adapters[f"{module}b"] = jnp.zeros((self.rank, outward), jnp.float32)
        return unflatten_dict(adapters, sep="/")

    def split(self, params: Params, key: Key[Array, ""]) -> tuple[dict[str, Any], Params]:
        """The system's parameters -> (trained, base), at which `merge` gives them back."""
        base = params[self._model]
        rest = {name: tree for name, tree in params.items() if name != self._model}
        return {**rest, "lora": self.init(key, base)}, base

    def merge(self, trained: Params, base: Params) -> dict[str, Any]:
        """(trained, base) -> parameters of the system itself; no gradient goes to `base`."""
        adapters: dict[str, Any] = flatten_dict(trained["lora"], sep="/")
        flat: dict[str, Any] = flatten_dict(jax.lax.stop_gradient(base), sep="/")
        for path in self._kernels(base):
            module = path.removesuffix("kernel")
            change = jnp.matmul(
                adapters[f"{module}a"],
                adapters[f"{module}b"],
                # So that it is the same in a training step and after it, on any device.
                precision=jax.lax.Precision.HIGHEST,
            )
            flat[path] = flat[path] + self.alpha / self.rank * change
        rest = {name: tree for name, tree in trained.items() if name != "lora"}
        return {**rest, self._model: unflatten_dict(flat, sep="/")}

    def logits(
        self,
        trained: Params,
        frozen: Mapping[str, Params],
        batch: Batch,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float32[Array, "B S V"]:
        """Teacher-forced logits of the response."""
        params = self.merge(trained, frozen["base"])
        return self.system.logits(params, frozen["inner"], batch, dropout_key)
