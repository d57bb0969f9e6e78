"""Text in, text out; and the labels that an LLM gives, through interruptions."""

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from l2s_jax import labels
from l2s_jax.data.tasks import Example
from l2s_jax.generate import Generator, Output
from l2s_jax.models.systems import LanguageModel, LlmToSlm
from l2s_jax.text import train_sentencepiece

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "then",
    "sleeps",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
    directory = tmp_path_factory.mktemp("tokenizer")
    return train_sentencepiece(texts, vocab_size=60, directory=str(directory), model_type="bpe")


@pytest.fixture(scope="module")
def systems(tokenizer):
    """name -> (system, trained, frozen), with random parameters."""
    config = small.t5_config(vocab_size=60)
    llm, l2s = LanguageModel("llm", config), LlmToSlm(config, config, projector_width=16)
    llm_params = llm.init(jax.random.key(0))
    frozen = small.encoder_only(llm_params["llm"])
    return {"llm": (llm, llm_params, {}), "l2s": (l2s, l2s.init(jax.random.key(1)), frozen)}


def generator(loaded, tokenizer, *, lengths=(8, 16), batch_size=4):
    return Generator(
        *loaded,
        tokenizer,
        tokenizer,
        prompt_lengths=lengths,
        max_new_tokens=6,
        batch_size=batch_size,
    )


@pytest.mark.parametrize("name", ["llm", "l2s"])
@settings(max_examples=15, deadline=None)
@given(prompts=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9), max_size=9))
def test_outputs_do_not_depend_on_company_order_or_bucket(name, systems, tokenizer, prompts):
    prompts = [" ".join(words) for words in prompts]
    together = generator(systems[name], tokenizer).generate(prompts)
    alone = generator(systems[name], tokenizer, lengths=(16,), batch_size=1)
    assert together == [alone.generate([prompt])[0] for prompt in prompts]
    assert generator(systems[name], tokenizer).generate(prompts[::-1]) == together[::-1]


def test_cut_outputs_are_marked_and_have_max_new_tokens(systems, tokenizer):
    outputs = generator(systems["llm"], tokenizer).generate([" ".join(WORDS[i:]) for i in range(9)])
    assert all(output.tokens == 6 for output in outputs if output.cut)
    assert all(output.tokens <= 6 for output in outputs)


def test_mismatched_feeds_another_prompts_representations(systems, tokenizer):
    system, trained, frozen = systems["l2s"]
    prompts = ["the quick brown fox", "a lazy dog", "and sleeps over", "jumps"]
    loaded = generator((system, trained, frozen), tokenizer, lengths=(16,))
    own = loaded.generate(prompts)
    other = loaded.generate(prompts, mismatched=True)
    assert [o.text for o in own] != [o.text for o in other]
    # With one and the same prompt in every row, another prompt's representations are one's own.
    same = ["a lazy dog"] * 4
    assert loaded.generate(same, mismatched=True) == loaded.generate(same)


class Counting:
    """A generator that answers with the number of prompts seen before, and can be killed."""

    def __init__(self, fail_after=None):
        self.seen, self.fail_after = 0, fail_after

    def generate(self, prompts, *, description=""):
        if self.fail_after is not None and self.seen >= self.fail_after:
            raise KeyboardInterrupt
        self.seen += len(prompts)
        return [Output(f"answer to {prompt}", 1, False) for prompt in prompts]


def test_labels_continue_after_an_interruption_without_repeating_or_losing_any(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(labels, "SHARD", 4)
    examples = [Example(f"prompt {i}", "old", ("old",)) for i in range(11)]
    with pytest.raises(KeyboardInterrupt):
        labels.label(examples, lambda: Counting(fail_after=4), str(tmp_path))
    second = Counting()
    labelled = labels.label(examples, lambda: second, str(tmp_path))
    assert second.seen == 7
    assert [e.prompt for e in labelled] == [e.prompt for e in examples]
    assert [e.response for e in labelled] == [f"answer to {e.prompt}" for e in examples]

    def never():
        raise AssertionError("all labels are there")

    assert labels.label(examples, never, str(tmp_path)) == labelled


class Unsliceable(Sequence):
    """Random access and a length, as TFDS gives."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        assert isinstance(index, int)
        if index >= len(self.examples):
            raise IndexError
        return self.examples[index]


def test_processes_share_the_labelling(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "SHARD", 2)
    barrier = threading.Barrier(2)
    monkeypatch.setattr(
        labels.multihost_utils, "sync_global_devices", lambda _: barrier.wait(timeout=60)
    )
    examples = Unsliceable([Example(f"prompt {i}", "old", ("old",)) for i in range(9)])
    generators = [Counting(), Counting()]

    def run(index):
        return labels.label(
            examples,
            lambda: generators[index],
            str(tmp_path),
            process_index=index,
            process_count=2,
        )

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    assert [generator.seen for generator in generators] == [5, 4]
    assert first == second
    assert [e.response for e in first] == [f"answer to prompt {i}" for i in range(9)]


def test_a_label_file_with_a_wrong_count_is_refused(tmp_path):
    path = tmp_path / "train-00000.jsonl"
    path.write_text(json.dumps({"response": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"train-00000\.jsonl: 1 labels, expected 2"):
        labels.label([Example("a", "b", ("b",))] * 2, Counting, str(tmp_path))
