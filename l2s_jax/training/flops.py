"""How many operations a training step has to make, counted in its program.

Only products count (`dot_general`), as in the model FLOPs of PaLM (Chowdhery et al. 2022, arXiv
2204.02311, appendix B): 2 per multiplication and addition forward, as many again for each factor
that needs a gradient. What is made twice to save memory counts once, and a frozen LLM, LoRA's base
and whatever else is not trained as what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def training_flops(loss: Callable[..., Any], trained: Any, mask: Any, *arguments: Any) -> float:
    """Operations of `loss(trained, *arguments)` and of its gradient.

    Args:
      loss: what is differentiated by `trained`. It is traced, not run.
      trained: parameters, arrays or ShapeDtypeStructs.
      mask: a tree like `trained` of bools: whether a parameter is trained; None: all are.
      arguments: what has no gradient.
    """
    closed = jax.make_jaxpr(loss)(trained, *arguments)
    count = len(jax.tree.leaves(trained))
    needed = [True] * count if mask is None else jax.tree.leaves(mask)
    others = len(closed.jaxpr.invars) - count
    return _count(closed.jaxpr, [*needed, *[False] * others])[0]


def _count(jaxpr: Jaxpr, needed: Sequence[bool]) -> tuple[float, list[bool]]:
    """(operations, which results depend on what needs a gradient)."""
    depends = dict(zip(jaxpr.invars, needed, strict=True))

    def of(variable: Any) -> bool:
        return not isinstance(variable, Literal) and depends.get(variable, False)

    total = 0.0
    for equation in jaxpr.eqns:
        inputs = [of(variable) for variable in equation.invars]
        outputs = [any(inputs)] * len(equation.outvars)
        if equation.primitive.name == "dot_general":
            total += _product(equation) * (1 + sum(inputs))
        elif equation.primitive.name == "scan":
            more, outputs = _count_scan(equation, inputs)
            total += more
        elif equation.primitive.name == "cond":
            branches = [_count(b.jaxpr, inputs[1:]) for b in equation.params["branches"]]
            total += max(flops for flops, _ in branches)
            outputs = [any(of_all) for of_all in zip(*(o for _, o in branches), strict=True)]
        elif inner := _called(equation):
            more, outputs = _count(inner, inputs)
            total += more
        depends.update(zip(equation.outvars, outputs, strict=True))
    return total, [of(variable) for variable in jaxpr.outvars]


def _count_scan(equation: Any, inputs: Sequence[bool]) -> tuple[float, list[bool]]:
    body, inputs = equation.params["jaxpr"].jaxpr, list(inputs)
    # What is neither scanned nor stacked has as many axes within as without: constants and then
    # what is carried go in, what is carried comes out. (Params say it in each version of JAX's own
    # way.)
    carried = _alike(equation.outvars, body.outvars)
    end = _alike(equation.invars, body.invars)
    carry = slice(end - carried, end)
    while True:
        flops, outputs = _count(body, inputs)
        joined = [a or b for a, b in zip(inputs[carry], outputs[:carried], strict=True)]
        if joined == inputs[carry]:
            return flops * equation.params["length"], outputs
        inputs[carry] = joined


def _alike(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    """How many variables have as many axes outside a loop as inside it."""
    return sum(
        len(one.aval.shape) == len(other.aval.shape)
        for one, other in zip(outer, inner, strict=True)
    )


def _called(equation: Any) -> Jaxpr | None:
    """The program that an equation calls with its own arguments."""
    for value in equation.params.values():
        inner = value.jaxpr if isinstance(value, ClosedJaxpr) else value
        if isinstance(inner, Jaxpr) and len(inner.invars) == len(equation.invars):
            return inner
    return None


def _product(equation: Any) -> float:
    """Operations of one dot_general: 2 for each element of the result and each term of its sum."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2.0 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
