"""How exact decoding went: what was drafted and kept, and whether the text is the LLM's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from l2s_jax.cluster.sharding import gather
from l2s_jax.data import fitting
from l2s_jax.evaluation.latency import block_ms
from l2s_jax.models.exact import Exact
from l2s_jax.serving.generator import Generator
from l2s_jax.serving.output import Output

# So many texts that differ are named.
_NAMED = 20


def drafting(outputs: Sequence[Output]) -> dict[str, Any]:
    """What became of drafted tokens.

    acceptance: the share that was kept of those that were looked at. acceptance_by_place: the same
      of each place in a block, None where none was looked at.
    tokens_per_block: tokens of the responses, over what the LLM read.
    """
    drafts = [output.drafts for output in outputs if output.drafts]
    tested, passed = (
        np.sum([getattr(one, name) for one in drafts], axis=0) for name in ("tested", "passed")
    )
    # A prompt's own reading gives its first token, and counts as a block.
    blocks = sum(one.blocks + 1 for one in drafts)
    return {
        "acceptance": float(passed.sum() / max(tested.sum(), 1)),
        "acceptance_by_place": [
            float(p / t) if t else None for p, t in zip(passed, tested, strict=True)
        ],
        "tokens_per_block": sum(output.tokens for output in outputs) / max(blocks, 1),
    }


def times(
    generator: Generator, found: Mapping[str, Any], measured: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Milliseconds of a drafted token, of a block of the most tokens, and of what is left of one.

    Args:
      generator: that decodes exactly.
      found: what `drafting` gave.
      measured: the latencies of l2s and exact, at batch 1.
    """
    system, size = generator.system, generator.search.draft_tokens + 1
    assert isinstance(system, Exact)
    shape = {name: int(measured["exact"][name]) for name in ("prompt_tokens", "new_tokens")}
    block = block_ms(
        system.llm,
        {"llm": generator.frozen},
        generator.prompt_tokenizer.vocab_size,
        tokens=size,
        mesh=generator.mesh,
        **shape,
    )
    draft = measured["l2s"]["decode_ms_per_token"]
    whole = measured["exact"]["decode_ms_per_token"] * found["tokens_per_block"]
    return {
        "draft_ms": draft,
        "block_tokens": size,
        "block_ms": block,
        "rest_ms": max(whole - draft * (size - 1) - block, 0.0),
    }


def against_llm(
    prompts: Sequence[str],
    exact: Sequence[Output],
    llm: Sequence[Output],
    generator: Generator,
) -> dict[str, Any]:
    """How many texts equal the LLM's, and where and by how much the others part from it.

    `margin` is by how much the LLM's logits of the two tokens, before any penalty, differ where two
    texts part: rounding decides where it is as small as rounding is (a tie). `generator` is what
    decodes exactly.
    """
    different = [i for i, pair in enumerate(zip(exact, llm, strict=True)) if _part(*pair)]
    named = different[:_NAMED]
    margins = _margins(
        [prompts[i] for i in named],
        [(exact[i].text, llm[i].text) for i in named],
        generator,
    )
    return {
        "equal": len(exact) - len(different),
        "of": len(exact),
        "different": [
            {"example": i, "place": place, "margin": margin}
            for i, (place, margin) in zip(named, margins, strict=True)
        ],
    }


def _part(one: Output, other: Output) -> bool:
    return (one.text, one.tokens) != (other.text, other.tokens)


def _margins(
    prompts: Sequence[str], pairs: Sequence[tuple[str, str]], generator: Generator
) -> list[tuple[int, float | None]]:
    """(place of the first token that differs, by how much the LLM prefers one of the two)."""
    if not prompts:
        return []
    tokenizer, longest = generator.prompt_tokenizer, generator.prompt_lengths[-1]
    # Cut as they were where they were answered.
    cut = fitting.fit(prompts, tokenizer, longest)
    sides = [
        tokenizer.encode_responses([text for text in side]) for side in zip(*pairs, strict=True)
    ]
    length = max(len(one) for side in sides for one in side)
    system = generator.system
    assert isinstance(system, Exact)
    llm: Any = system.llm
    batch: dict[str, Any] = {
        "llm_ids": np.stack([_padded(one, longest) for one in cut.ids]),
        "llm_mask": np.stack([np.arange(longest) < len(one) for one in cut.ids]),
        "response_ids": np.stack([_padded(one, length) for one in sides[1]]),
    }
    with jax.set_mesh(generator.mesh):
        score = jax.jit(lambda params: llm.scored({"llm": params}, {}, batch).logits())
        logits = gather(score(generator.frozen))
    found: list[tuple[int, float | None]] = []
    for row, (mine, its) in enumerate(zip(*sides, strict=True)):
        places = [i for i, (a, b) in enumerate(zip(mine, its, strict=False)) if a != b]
        place = places[0] if places else min(len(mine), len(its))
        if not places:
            # One goes on where the other was cut.
            found.append((place, None))
            continue
        margin = logits[row, place, its[place]] - logits[row, place, mine[place]]
        found.append((place, float(margin)))
    return found


def _padded(ids: Sequence[int], length: int) -> np.ndarray:
    return np.pad(np.asarray(ids, np.int32), (0, length - len(ids)))


def lines(found: Mapping[str, Any]) -> list[str]:
    """The report's paragraphs about a system's "drafts"."""
    shares = ", ".join(
        f"{share:.0%}" if share is not None else "none" for share in found["acceptance_by_place"]
    )
    blocks = [
        "## Exact decoding",
        f"L2S drafts, and the LLM keeps {found['acceptance']:.0%} of the tokens that it looks at: "
        f"{found['tokens_per_block']:.2f} tokens for each time that the LLM is read. By the place "
        f"in a block: {shares}. Times are of random prompts on which drafts are kept as often.",
    ]
    if times := found.get("times"):
        blocks.append(
            f"At batch 1 a drafted token takes {times['draft_ms']:.3g} ms, a block of "
            f"{times['block_tokens']} tokens {times['block_ms']:.3g} ms, and all else "
            f"{times['rest_ms']:.3g} ms for each block."
        )
    if same := found.get("against_llm"):
        text = f"{same['equal']:,} of {same['of']:,} texts are the LLM's own."
        if same["different"]:
            text += " The others, with by how much the LLM prefers its token where they part: "
            text += ", ".join(
                f"example {one['example']} at token {one['place']}"
                + ("" if one["margin"] is None else f" ({one['margin']:.2g})")
                for one in same["different"]
            )
            text += "."
        blocks.append(text)
    return blocks
