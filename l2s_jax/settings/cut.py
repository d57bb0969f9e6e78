"""What of a checkpoint a small model is cut out of it."""

from __future__ import annotations

import dataclasses

from l2s_jax.settings.declare import Section, setting

_COUNT = "How many layers are kept, evenly spaced, the first and the last among them; 0: all."
_LIST = "Which layers are kept, from 0, ascending; without any, as the number says."
# What the names of settings have before `layers`, of each kind of stack.
STACKS = ("", "encoder_", "decoder_")


def _count(of: str) -> int:
    return setting(0, f"{of}: {_COUNT}", at_least=0)


def _list(of: str) -> tuple[int, ...]:
    return setting(
        (),
        f"{of}: {_LIST}",
        fits=lambda layers: (
            all(type(layer) is int and layer >= 0 for layer in layers)
            and list(layers) == sorted(set(layers))
        ),
        expected="numbers of layers, ascending",
    )


@dataclasses.dataclass(frozen=True)
class Cut(Section):
    """The SLM is cut out of `slm.path`, or where that is "" out of the LLM."""

    num_layers: int = _count("Of a decoder-only model")
    layers: tuple[int, ...] = _list("Of a decoder-only model")
    num_encoder_layers: int = _count("Of a T5's encoder")
    encoder_layers: tuple[int, ...] = _list("Of a T5's encoder")
    num_decoder_layers: int = _count("Of a T5's decoder")
    decoder_layers: tuple[int, ...] = _list("Of a T5's decoder")
    feed_forward_width: int = setting(
        0,
        "Hidden units of each feed-forward that are kept, those of the largest weights; 0: all.",
        at_least=0,
    )

    @property
    def is_used(self) -> bool:
        """Whether anything is left out."""
        return any(getattr(self, field.name) for field in dataclasses.fields(self))

    def conflict(self) -> str:
        """A number and a list of the same layers."""
        for stack in STACKS:
            count, layers = getattr(self, f"num_{stack}layers"), getattr(self, f"{stack}layers")
            if count and layers:
                return f"num_{stack}layers={count} and {stack}layers={layers}: expected one of them"
        return ""
