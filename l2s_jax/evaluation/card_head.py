"""The head of a model card, in YAML, by which the hub finds and shows a model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from l2s_jax.copies import local
from l2s_jax.files import is_bucket, is_file
from l2s_jax.gguf_file import is_gguf, read_header
from l2s_jax.hub import cached, is_name

LIBRARY = "l2s_jax"
_PIPELINE = "text-generation"
# What a dataset's name may be on the hub.
_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?")


def card_head(config: ConfigDict, report: Mapping[str, Any]) -> str:
    """The head, from its first --- to its last.

    Licence and languages are those that both models' own cards name, or their GGUF files.
    """
    # Imported here: it takes a while, and only who writes a card needs it.
    from huggingface_hub import EvalResult, ModelCardData

    task, quality = report["task"], report["systems"]["l2s"]["quality"]
    paths = [path for path in (config.llm.path, config.slm.path) if path]
    known = [_known(path) for path in paths]
    names = [path.partition("@")[0] for path in paths if is_name(path)]
    dataset = config.task.tfds_name.partition("/")[0] or task["name"]
    named = dataset if _DATASET.fullmatch(dataset) else None
    data = ModelCardData(
        base_model=list(dict.fromkeys(names)) or None,
        datasets=[named] if named else None,
        language=_languages(known) or None,
        library_name=LIBRARY,
        license=_license(known),
        model_name=f"LLM-to-SLM on {task['name']}",
        pipeline_tag=_PIPELINE,
        eval_results=[
            EvalResult(
                task_type=_PIPELINE,
                dataset_type=named or "other",
                dataset_name=task["name"],
                dataset_split=task["split"],
                metric_type=name,
                metric_value=round(value, 2),
            )
            for name, value in quality.items()
        ],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _known(path: str) -> dict[str, Any]:
    """What a model says of its licence and languages."""
    found = cached(path)
    if found is None:
        return {}
    if is_bucket(found):
        found = local(found, ("README.md",)) if is_file(f"{found}/README.md") else ""
    if is_gguf(found):
        header = read_header(found, strings=True)
        return {
            "license": header.string("general.license") or None,
            "language": header.get("general.languages", list, []),
        }
    from huggingface_hub import ModelCard

    card = os.path.join(found, "README.md")
    if not os.path.exists(card):
        return {}
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # somebody else's card, of whatever form, is no reason to write none
        return {}
    return {name: data.get(name) for name in ("license", "language")}


def _license(known: Sequence[Mapping[str, Any]]) -> str | None:
    """The licence of all models; "other" where they differ, nothing where one doesn't say."""
    licenses = {one.get("license") for one in known}
    if not licenses or None in licenses:
        return None
    return licenses.pop() if len(licenses) == 1 else "other"


def _languages(known: Sequence[Mapping[str, Any]]) -> list[str]:
    found: dict[str, None] = {}
    for one in known:
        languages = one.get("language") or []
        found |= dict.fromkeys([languages] if isinstance(languages, str) else languages)
    return sorted(found)
