"""LoRA (Hu et al. 2021, arXiv 2106.09685): training a low-rank change of a model's kernels.

It knows no family: it rewrites a parameter tree, and what comes out of training is an ordinary one.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key

from l2s_jax.cluster.paths import matching
from l2s_jax.models.families import ModelConfig
from l2s_jax.models.products import LowRank
from l2s_jax.models.scored import Scored
from l2s_jax.models.stacking import stacked_path
from l2s_jax.models.systems import Batch, LanguageModel, LlmToSlm, Params


@dataclasses.dataclass(frozen=True)
class Adapters:
    """What is trained in the place of kernels: {"path/to/module": {"a", "b"}}.

    Each kernel [in, out] of a model whose path matches all of `pattern` becomes
    `kernel + alpha / rank * a @ b` with a [in, rank] and b [rank, out], float32; all else of the
    model stays as it is. b starts at zero, so an optimizer that measures updates by the size of a
    parameter (`train.parameter_scale`) hardly moves it.

    `merge` makes that kernel. `beside` leaves it in its parts, of which products take each: a
    training step then neither makes a changed kernel nor the gradient of one.
    """

    rank: int
    alpha: float
    pattern: str
    where: str = "lora.pattern"

    def _kernels(self, base: Params) -> list[str]:
        """Paths of the kernels in `base` that are adapted, in order."""
        flat: dict[str, Any] = flatten_dict(base, sep="/")
        kernels = [
            path
            for path, leaf in flat.items()
            if re.fullmatch("(.*/)?kernel", path) and leaf.ndim == 2
        ]
        return sorted(matching(self.pattern, kernels, self.where, what="kernel"))

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

    def merge(self, adapters: Params, base: Params) -> dict[str, Any]:
        """The model's parameters with their change; of host arrays, host arrays."""
        return self._changed(adapters, base, self._merged)

    def beside(self, adapters: Params, base: Params) -> dict[str, Any]:
        """The model's parameters, with a `LowRank` for each kernel that all layers have adapted.

        Layers that are alike can be stacked. The head, of which a vocabulary may be cut, is merged.
        """
        paths = self._kernels(base)
        adapted = collections.Counter(stacked_path(path)[0] for path in paths)
        layers = collections.Counter(stacked_path(path)[0] for path in flatten_dict(base, sep="/"))

        def change(path: str, kernel: Any, a: Any, b: Any) -> Any:
            stacked, layer = stacked_path(path)
            if layer is None or adapted[stacked] < layers[stacked]:
                return self._merged(path, kernel, a, b)
            return LowRank(kernel, a, self.alpha / self.rank * b)

        return self._changed(adapters, base, change)

    def _merged(self, _: str, kernel: Any, a: Any, b: Any) -> Any:
        if all(isinstance(x, np.ndarray) for x in (kernel, a, b)):
            # No device need have room for a whole model.
            return kernel + np.float32(self.alpha / self.rank) * np.matmul(a, b)
        # At this precision it is nearly the same on all devices, and on the host.
        return kernel + self.alpha / self.rank * jnp.matmul(
            a, b, precision=jax.lax.Precision.HIGHEST
        )

    def _changed(
        self, adapters: Params, base: Params, change: Callable[[str, Any, Any, Any], Any]
    ) -> dict[str, Any]:
        """`base` with `change(path, kernel, a, b)` for each kernel that is adapted."""
        changes: dict[str, Any] = flatten_dict(adapters, sep="/")
        flat: dict[str, Any] = flatten_dict(base, sep="/")
        for path in self._kernels(base):
            module = path.removesuffix("kernel")
            flat[path] = change(path, flat[path], changes[f"{module}a"], changes[f"{module}b"])
        return unflatten_dict(flat, sep="/")


@dataclasses.dataclass(frozen=True)
class Adapted(abc.ABC):
    """A system of which adapters are trained; it has what training asks of a system."""

    system: Any

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

    @abc.abstractmethod
    def whole(
        self, trained: Params, frozen: Mapping[str, Params], *, merged: bool = True
    ) -> tuple[Any, Any, Any]:
        """(system, trained, frozen) of the system itself, as it is by now.

        Without `merged`, kernels are as `Adapters.beside` has them.
        """

    def scored(
        self,
        trained: Params,
        frozen: Mapping[str, Params],
        batch: Batch,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Scored:
        """The response, teacher-forced."""
        frozen = jax.lax.stop_gradient(frozen)
        system, params, inner = self.whole(trained, frozen, merged=False)
        return system.scored(params, inner, batch, dropout_key)


@dataclasses.dataclass(frozen=True)
class Lora(Adapted):
    """A system whose language model is trained by LoRA: the SLM of an L2S, or a model alone.

    The trees are

        trained   {"lora": the adapters}, beside an L2S's "projector"
        frozen    {"base": the model's parameters, "inner": what the system itself has frozen}
    """

    system: LanguageModel | LlmToSlm
    rank: int
    alpha: float
    pattern: str

    @property
    def _adapters(self) -> Adapters:
        return Adapters(self.rank, self.alpha, self.pattern)

    @property
    def _model(self) -> str:
        """The entry of the system's parameters that LoRA stands in for."""
        return self.system.name if isinstance(self.system, LanguageModel) else "slm"

    def init(self, key: Key[Array, ""], base: Params) -> dict[str, Any]:
        """The adapters of a model's parameters; see `Adapters.init`."""
        return self._adapters.init(key, base)

    def split(self, params: Params, key: Key[Array, ""]) -> tuple[dict[str, Any], Params]:
        """The system's parameters -> (trained, base), at which `merge` gives them back."""
        base = params[self._model]
        rest = {name: tree for name, tree in params.items() if name != self._model}
        return {**rest, "lora": self.init(key, base)}, base

    def merge(self, trained: Params, base: Params) -> dict[str, Any]:
        """(trained, base) -> parameters of the system itself; of host arrays, host arrays."""
        return self._with(self._adapters.merge, trained, base)

    def whole(
        self, trained: Params, frozen: Mapping[str, Params], *, merged: bool = True
    ) -> tuple[Any, Any, Any]:
        """See `Adapted.whole`."""
        join = self._adapters.merge if merged else self._adapters.beside
        return self.system, self._with(join, trained, frozen["base"]), frozen["inner"]

    def _with(
        self, join: Callable[[Params, Params], Params], trained: Params, base: Params
    ) -> dict[str, Any]:
        rest = {name: tree for name, tree in trained.items() if name != "lora"}
        return {**rest, self._model: join(trained["lora"], base)}
