"""The model card of an L2S model: what it is, from what it was made, what was measured."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from l2s_jax.config import cut_of
from l2s_jax.evaluation import distilled
from l2s_jax.evaluation.card_head import card_head
from l2s_jax.evaluation.report import dtypes
from l2s_jax.files import write_text
from l2s_jax.hub import is_name, reference
from l2s_jax.models.systems import LlmToSlm, Params, parameter_count
from l2s_jax.serving.bundle import CARD

_FUSIONS = {
    "add": "added to the small model's embedding of the prompt",
    "replace": "in the place of the small model's embedding of the prompt",
    "cross": "attended to by the small model's decoder, which has no encoder of its own",
}


def write_card(
    directory: str,
    config: ConfigDict,
    report: Mapping[str, Any],
    loaded: tuple[LlmToSlm, Params, Params],
) -> None:
    """Writes `directory`/README.md, from a run's config and report.json and the model itself."""
    system, trained, frozen = loaded
    task, systems, environment = report["task"], report["systems"], report["environment"]
    metrics = list(systems["l2s"]["quality"])
    rows = [
        f"| {name} | {values['params']:,} | "
        + " | ".join(f"{values['quality'][metric]:.1f}" for metric in metrics)
        + f" | {values['latency']['decode_ms_per_token']:.3g} "
        + f"| {values['latency']['total_ms']:.3g} |"
        for name, values in systems.items()
    ]
    llm, slm = (_described(config[name], name) for name in ("llm", "slm"))
    layer = f", layer {config.llm.layer:g}" if config.llm.layer else ""
    labels = "the LLM's own responses" if task["labels"] == "llm" else "the data's responses"
    latency = systems["l2s"]["latency"]
    lines = [
        card_head(config, report),
        f"# LLM-to-SLM on {task['name']}",
        "",
        "A large language model (LLM) reads the prompt once; a small one (SLM) writes the response",
        "from the LLM's representations, which a projector brings to its width",
        "([Bergner et al. 2024](https://arxiv.org/abs/2402.16844)).",
        "",
        "## What",
        "",
        f"- LLM, {_state(config.llm.tune)}: {llm}{layer};",
        f"  {parameter_count(frozen):,} parameters are needed",
        f"- SLM: {slm}; {parameter_count(trained['slm']):,} parameters",
        f"- Projector: {parameter_count(trained['projector']):,} parameters; its output is",
        f"  {_FUSIONS[system.fusion]}{_between(system)}",
        f"- Vocabulary: {_vocabulary(system)}",
        f"- Trained on: the `train` split of {task['name']}, {labels}{distilled.clause(task)}",
        f"- Prompt: `{json.dumps(config.task.chat.user or config.task.prompt, ensure_ascii=False)}`"
        + (", in the LLM's chat format" if config.task.chat.user else ""),
        "",
        "## Figures",
        "",
        f"{task['examples']:,} examples of `{task['split']}`. Times are milliseconds at batch 1,",
        f"{latency['prompt_tokens']} prompt tokens and {latency['new_tokens']} new ones, on",
        f"{environment['device']}, in {dtypes(environment)}.",
        "`l2s_mismatched` is the control: L2S fed the representations of another prompt.",
        "",
        f"| system | parameters | {' | '.join(metrics)} | ms per token | ms per request |",
        f"|---|---|{'---|' * len(metrics)}---|---|",
        *rows,
        "",
        "## Use",
        "",
        "```python",
        "import l2s_jax",
        "",
        'model = l2s_jax.load("this directory")',
        'print(model.generate(["a prompt"])[0].text)',
        "```",
        "",
    ]
    write_text(os.path.join(directory, CARD), "\n".join(lines))


def _state(tune: ConfigDict) -> str:
    """Whether the LLM is as it was."""
    return f"adapted by LoRA of rank {tune.rank}" if tune.rank else "frozen"


def _between(system: LlmToSlm) -> str:
    """What else H goes through."""
    groups = " and ".join(", ".join(map(str, group)) for group in system.layers)
    parts = [
        f"it reads the LLM's layers {groups}" if groups else "",
        "H is normalized" if system.normalize else "",
        f"{system.stack} bidirectional layers lie over it" if system.stack else "",
    ]
    return "".join(f"; {part}" for part in parts if part)


def _vocabulary(system: LlmToSlm) -> str:
    """Whose pieces the prompts and the responses have."""
    whose = "shared" if system.shared_vocabulary else "one of each model"
    kept, of = system.slm_config.vocabulary, system.slm_config.vocab_size
    return f"{whose}; responses are written with {len(kept):,} of {of:,} pieces" if kept else whose


def _described(section: ConfigDict, name: str) -> str:
    """Where a model came from."""
    if name == "slm" and (cut := cut_of(section)).is_used:
        kept = ", ".join(
            f"{field}={value}" for field, value in dataclasses.asdict(cut).items() if value
        )
        source = _described(section, "llm") if section.path else "the LLM"
        return f"cut out of {source} ({kept}), trained further"
    if section.path:
        trained = ", trained further" if name == "slm" or section.train.steps else ""
        where = os.path.basename(os.path.normpath(section.path))
        return f"`{reference(section.path) if is_name(section.path) else where}`{trained}"
    return f"{section.model.family}, trained from nothing"
