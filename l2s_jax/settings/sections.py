"""The sections of a config, from the whole, `Settings`, at the end to what each of them holds."""

from __future__ import annotations

import dataclasses
from typing import Any

from l2s_jax.settings import limits
from l2s_jax.settings.cut import Cut
from l2s_jax.settings.declare import Allowed, Section, setting
from l2s_jax.settings.distillation import Distillation
from l2s_jax.settings.evaluation import Evaluation
from l2s_jax.settings.following import TRACKERS, are_trackers
from l2s_jax.settings.geometry import Model, T5Model
from l2s_jax.settings.search import Search
from l2s_jax.settings.task import Task
from l2s_jax.settings.training import Lora, Train, TrainAlways, Tune

_DTYPES = ("float32", "bfloat16", "auto")
DTYPE = Allowed(
    str,
    fits=lambda name: name in _DTYPES,
    expected=f"one of {_DTYPES}",
    refused={"float16": "T5 overflows in it; use 'bfloat16' or 'float32'"},
)


def _axis(default: int, meaning: str, added: bool = False) -> Any:
    return setting(
        default,
        meaning,
        added=added,
        fits=lambda size: size == -1 or size >= 1,
        expected="an integer >= 1, or -1",
    )


def _are_buckets(buckets: tuple[Any, ...]) -> bool:
    return bool(buckets) and all(
        isinstance(bucket, tuple)
        and len(bucket) == 2
        and all(isinstance(size, int) and size > 0 for size in bucket)
        for bucket in buckets
    )


def _are_groups(groups: tuple[Any, ...]) -> bool:
    return all(
        isinstance(group, tuple)
        and group
        and all(type(layer) is int and layer >= 1 for layer in group)
        for group in groups
    )


@dataclasses.dataclass(frozen=True)
class Tokenizer(Section):
    """Where a tokenizer comes from: a directory, or the text of the train split."""

    train_vocab_size: int = setting(
        0,
        "Pieces of a tokenizer that is trained on the train split; 0: that of the model's "
        "directory, or for an SLM without one the LLM's.",
        at_least=0,
    )
    model_type: str = setting("unigram", "Kind of it.", one_of=("unigram", "bpe"))


@dataclasses.dataclass(frozen=True)
class Llm(Section):
    """The large model."""

    path: str = setting(
        "",
        "A Hugging Face directory, a GGUF file, a name on the hub (`org/name` or "
        "`org/name@revision`), or `RUN/llm/model`; without one, it is made here.",
        is_path=True,
    )
    model: Model = T5Model()
    layer: float = setting(
        0.0,
        "Of a decoder-only LLM: after how many of its layers, or which fraction of them, H is "
        "taken; 0: after all.",
        at_least=0,
    )
    encoder_dtype: str = setting(
        "auto",
        "As `dtype`, of the LLM where it encodes for L2S. What was trained with one continues and "
        "is used with the other too.",
        allowed=DTYPE,
    )
    lora: Lora = Lora()
    train: Train = Train()
    tune: Tune = Tune()

    def conflict(self) -> str:
        """A layer of a model that has none to choose; LoRA with updates of nothing."""
        if self.layer and not self.path and self.model.family == "t5":
            return f"layer={self.layer:g}: expected 0, the encoder of a T5 has one output"
        return self.lora.conflict_with(self.train) if self.train.steps else ""


@dataclasses.dataclass(frozen=True)
class _LikeSlm(Section):
    """What the SLM alone and L2S have in common."""

    lora: Lora = Lora()
    train: TrainAlways = TrainAlways()

    def conflict(self) -> str:
        """LoRA with updates of nothing."""
        return self.lora.conflict_with(self.train)


@dataclasses.dataclass(frozen=True)
class Slm(_LikeSlm):
    """The small model, alone and in L2S."""

    path: str = setting(
        "",
        "What to start from, as `llm.path`; without one, from random parameters, or with `slm.cut` "
        "from the LLM's.",
        is_path=True,
    )
    cut: Cut = Cut()
    model: Model = T5Model()
    tokenizer: Tokenizer = Tokenizer()
    vocabulary: str = setting(
        "all",
        "What responses are written with: all of the tokenizer's pieces, those that the train "
        "split's responses use (task), or a number of them, the most used. Special pieces, single "
        "characters and bytes always stay, and prompts have all.",
        fits=lambda text: text in ("all", "task") or (text.isdecimal() and int(text) > 0),
        expected="all, task, or a number above 0",
    )

    def conflict(self) -> str:
        """Two tokenizers."""
        if self.cut.is_used and self.tokenizer.train_vocab_size:
            return (
                "cut and tokenizer.train_vocab_size="
                f"{self.tokenizer.train_vocab_size}: two tokenizers, expected one"
            )
        if self.path and self.tokenizer.train_vocab_size:
            return (
                f"path={self.path!r} and tokenizer.train_vocab_size="
                f"{self.tokenizer.train_vocab_size}: two tokenizers, expected one"
            )
        return super().conflict()


@dataclasses.dataclass(frozen=True)
class L2s(_LikeSlm):
    """The SLM with the LLM's representations of the prompt."""

    fusion: str = setting(
        "add",
        "How they meet: Z is added to the SLM's embedding of the prompt, takes its place, or is "
        "what the SLM's decoder attends to, without an SLM encoder.",
        one_of=("add", "replace", "cross"),
    )
    projector_width: int = setting(
        0, "Hidden units of the projector; 0: the SLM's width.", at_least=0
    )
    layers: tuple[tuple[int, ...], ...] = setting(
        (),
        "Groups of the LLM's layers, each as after how many layers: ((4, 8), (12, 16)). H is a "
        "weighted sum of each group, with learnt weights, side by side. Without any, H is that of "
        "`llm.layer`.",
        fits=_are_groups,
        expected="a tuple of tuples of numbers of layers, from 1",
    )
    normalize: bool = setting(False, "A norm with a learnt scale, over H before the projector.")
    zero_start: bool = setting(
        False,
        "Z is zero before training, so that the SLM starts as it is: for one that has been trained "
        "before.",
        added=True,
    )
    stack: int = setting(
        0,
        "Layers in which the prompt's tokens see each other in both directions, over Z before the "
        "SLM reads it.",
        at_least=0,
    )


@dataclasses.dataclass(frozen=True)
class Mesh(Section):
    """Devices along each axis; one axis may be -1, which takes those that are left."""

    data: int = _axis(-1, "Devices, or groups of them, between which a batch is split.")
    fsdp: int = _axis(1, "Devices between which parameters, and a batch, are split.")
    tensor: int = _axis(1, "Devices between which each product is split.")
    sequence: int = _axis(
        1,
        "Devices between which the positions of a prompt are split: for one that is longer than "
        "one device holds.",
        added=True,
    )
    slices: int = setting(
        1,
        "TPU slices that the devices are of, between which `data` is split first: gradients alone "
        "cross the network between them.",
        at_least=1,
        added=True,
    )
    process_is_granule: bool = setting(
        False, "Each process is a slice, on devices that are of none: CPUs, GPUs.", added=True
    )


@dataclasses.dataclass(frozen=True)
class StageMesh(Section):
    """Likewise, of the stages that a section is about; 0: as in `mesh`."""

    data: int = setting(0, "As `mesh.data`; 0: the same.", at_least=-1)
    fsdp: int = setting(0, "As `mesh.fsdp`; 0: the same.", at_least=-1)
    tensor: int = setting(0, "As `mesh.tensor`; 0: the same.", at_least=-1)
    sequence: int = setting(0, "As `mesh.sequence`; 0: the same.", at_least=-1, added=True)


@dataclasses.dataclass(frozen=True)
class Labels(Section):
    """What the SLM and L2S learn to say."""

    source: str = setting(
        "data",
        "Whose responses to the train split: those of the data, or the LLM's own.",
        one_of=("data", "llm"),
    )
    search: Search = Search()
    max_new_tokens: int = setting(
        0,
        "Where the LLM's are cut; 0: at `max_response_tokens`.",
        at_least=0,
        at_most=limits.TOKENS,
    )
    batch_size: int = setting(
        32, "Prompts that it answers at a time.", at_least=1, at_most=limits.ROWS
    )
    mesh: StageMesh = StageMesh()


@dataclasses.dataclass(frozen=True)
class Features(Section):
    """The frozen LLM's representations of prompts."""

    cache: str = setting(
        "",
        "A folder that keeps H of all prompts, computed once; without one, each step computes its "
        "own.",
        is_path=True,
    )
    mesh: StageMesh = StageMesh()


@dataclasses.dataclass(frozen=True)
class Decoding(Section):
    """How outputs are made, in evaluation and generation."""

    max_new_tokens: int = setting(128, "Where an output is cut.", at_least=1, at_most=limits.TOKENS)
    batch_size: int = setting(
        32, "Prompts that are answered at a time.", at_least=1, at_most=limits.ROWS
    )
    search: Search = Search()
    weights: str = setting(
        "float",
        "Of the LLM's encoder and the SLM; int8: quantized.",
        one_of=("float", "int8"),
    )
    mesh: StageMesh = StageMesh()


@dataclasses.dataclass(frozen=True)
class Settings(Section):
    """A whole experiment."""

    seed: int = setting(0, "Of all that is random.", at_least=0, at_most=2**32 - 1)
    train_seed: int = setting(
        -1,
        "Of the SLM alone and L2S, if another: of their random parameters, the order of their "
        "examples, their dropout; -1: `seed`.",
        at_least=-1,
        at_most=2**32 - 1,
    )
    dtype: str = setting(
        "auto", "Of the products; auto: float32 on CPU, bfloat16 elsewhere.", allowed=DTYPE
    )
    scan_layers: bool = setting(
        False,
        "Layers of the frozen LLM and of what is trained are one loop: the same results, "
        "but for other masks of dropout, from programs that do not grow, nor take longer to "
        "compile, with depth.",
    )
    task: Task = Task()
    tokenizer: Tokenizer = Tokenizer()
    max_prompt_tokens: int = setting(
        128, "Longer prompts are cut.", at_least=1, at_most=limits.TOKENS
    )
    max_response_tokens: int = setting(
        128, "Longer responses are cut.", at_least=1, at_most=limits.TOKENS
    )
    buckets: tuple[tuple[int, int], ...] = setting(
        ((128, 128),),
        "Lengths (prompt, response) that batches are padded to, ascending.",
        fits=_are_buckets,
        expected="pairs of prompt tokens and response tokens",
    )
    labels: Labels = Labels()
    distillation: Distillation = Distillation()
    features: Features = Features()
    llm: Llm = Llm()
    slm: Slm = Slm()
    l2s: L2s = L2s()
    decoding: Decoding = Decoding()
    evaluation: Evaluation = Evaluation()
    trackers: tuple[str, ...] = setting(
        ("tensorboard",),
        "Where a run can be followed, beside its `metrics.jsonl`: files for TensorBoard, Weights & "
        "Biases, Trackio.",
        fits=are_trackers,
        expected=f"some of {tuple(TRACKERS)}, each once",
        added=True,
    )
    mesh: Mesh = Mesh()

    def conflict(self) -> str:
        """Buckets out of order, or too small."""
        for smaller, larger in zip(self.buckets, self.buckets[1:], strict=False):
            if smaller == larger or smaller[0] > larger[0] or smaller[1] > larger[1]:
                return f"buckets={self.buckets}: expected both sizes to ascend"
        prompt, response = self.buckets[-1]
        if prompt < self.max_prompt_tokens or response < self.max_response_tokens:
            return (
                f"buckets={self.buckets}: expected the last to hold "
                f"max_prompt_tokens={self.max_prompt_tokens} and "
                f"max_response_tokens={self.max_response_tokens}"
            )
        return ""
