"""Tokens in the workdir: made once, found again, made again where something is missing."""

import json
import os
import shutil

import corpus
import numpy as np
import pytest
import small
import tiny

from l2s_jax.config import default
from l2s_jax.data.examples import TokenizedExamples
from l2s_jax.data.table import Example
from l2s_jax.data.tokens import Tokenization, gathered
from l2s_jax.experiment import token_files
from l2s_jax.experiment.context import Context
from l2s_jax.experiment.splits import Split

PAIRS = small.random_pairs(11, 9)
EXAMPLES = [Example(p, r, (r,), i == 4) for i, (p, r) in enumerate(PAIRS)]
IDENTITY = {"of": "the test"}


class Counting(small.NumberTokenizer):
    """Counts the texts that it is asked for."""

    def __init__(self):
        self.texts = 0

    def encode_prompts(self, texts):
        self.texts += len(texts)
        return super().encode_prompts(texts)

    encode_responses = encode_prompts


@pytest.fixture(autouse=True)
def few_in_a_file(monkeypatch):
    monkeypatch.setattr(token_files, "AT_ONCE", 4)


def how_to(tokenizer, most=6):
    return Tokenization(tokenizer, tokenizer, most, most)


def kept(folder, examples=EXAMPLES, tokenizer=None):
    return token_files.kept(str(folder), IDENTITY, examples, how_to(tokenizer or Counting()))


def lists(tokens):
    """All of them as lists, with what was lost."""
    rows = range(len(tokens.cut))
    sides = ([side[i].tolist() for i in rows] for side in (tokens.prompts, tokens.responses))
    lengths = [side.lengths.tolist() for side in (tokens.prompts, tokens.responses)]
    return *sides, lengths, tokens.cut.tolist(), tokens.loss


def never():
    raise AssertionError("nobody needs to read them")
    yield


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_they_are_those_of_memory_and_are_found_without_a_look_at_the_texts(tmp_path):
    expected = lists(gathered([how_to(Counting())(EXAMPLES)]))
    assert expected[-1].prompts and expected[-1].responses and expected[-1].fields
    tokenizer = Counting()
    assert lists(kept(tmp_path, tokenizer=tokenizer)) == expected
    assert tokenizer.texts == 2 * len(EXAMPLES)
    assert len(list(tmp_path.glob("*.arrow"))) == 3
    before = files_of(tmp_path)
    assert lists(kept(tmp_path, never())) == expected
    assert files_of(tmp_path) == before
    with pytest.raises(IndexError):
        kept(tmp_path, never()).prompts[len(EXAMPLES)]


def test_what_is_cut_may_be_left_out_of_the_same_tokens(tmp_path):
    settings = {"prompt_tokenizer": Counting(), "response_tokenizer": Counting()}
    settings |= {"max_prompt_tokens": 6, "max_response_tokens": 6, "keep_cut": False}
    ours = TokenizedExamples(EXAMPLES, tokens=kept(tmp_path), **settings)
    whole = [i for i, e in enumerate(EXAMPLES) if len(e.response.split()) < 6 and not e.cut]
    assert 0 < len(ours) == len(whole) < len(EXAMPLES)
    assert ours.places.tolist() == whole
    assert ours.loss.left_out == len(EXAMPLES) - len(whole)
    batch = ours.padded(np.array([-1, 0, len(whole) - 1]), 6, 6, "llm")
    for row, place in ((1, whole[0]), (2, whole[-1])):
        ids = [*map(int, EXAMPLES[place].response.split()), 1]
        assert batch["response_ids"][row][batch["response_mask"][row]].tolist() == ids
    assert batch["llm_mask"][0].tolist() == [True, *[False] * 5]
    assert not batch["response_mask"][0].any()
    alone = TokenizedExamples([EXAMPLES[i] for i in whole], **settings)
    assert (ours.pair_keys == alone.pair_keys).all()
    assert (ours.prompt_keys == alone.prompt_keys).all()
    assert ours.prompt_lengths.tolist() == alone.prompt_lengths.tolist()
    assert [ids.tolist() for ids in ours[-1]] == [ids.tolist() for ids in alone[-1]]


def test_interrupted_it_goes_on_with_what_is_missing(tmp_path):
    expected = lists(kept(tmp_path / "whole"))

    class Stopping(Counting):
        def encode_prompts(self, texts):
            if self.texts >= 2 * 8:
                raise KeyboardInterrupt
            return super().encode_prompts(texts)

        encode_responses = encode_prompts

    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        kept(folder, tokenizer=Stopping())
    assert [path.name.split("-")[1] for path in sorted(folder.iterdir())] == ["00000", "00001"]
    (folder / f"tokens-00002-x.arrow.{'0' * 32}.tmp").write_bytes(b"what a kill leaves")
    tokenizer = Counting()
    assert lists(kept(folder, tokenizer=tokenizer)) == expected
    assert tokenizer.texts == 2 * 3
    assert files_of(folder) == files_of(tmp_path / "whole")


def test_what_is_damaged_is_made_again(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "damaged"
    expected = lists(kept(whole))
    files = files_of(whole)
    (middle,) = (name for name in files if name.startswith("tokens-00001"))
    tried = 0
    for name in (middle, "tokens.json"):
        for variant in (*corpus.flips(files[name], 60), *corpus.cut(files[name])):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
            (folder / name).write_bytes(variant.content)
            tokenizer = Counting()
            assert lists(kept(folder, tokenizer=tokenizer)) == expected, variant.name
            assert tokenizer.texts == (2 * 4 if name == middle else 0)
            # (A space more in the JSON is no damage.)
            assert name != middle or files_of(folder) == files
            tried += 1
    assert tried > 100
    (whole / middle).unlink()
    tokenizer = Counting()
    assert lists(kept(whole, tokenizer=tokenizer)) == expected and tokenizer.texts == 2 * 4


@pytest.fixture
def task(tmp_path):
    """A config, and the lines of its train split, which can be rewritten."""
    tiny.write_task(tmp_path / "data")
    config = default()
    config.task.update(name="t", source="jsonl", data_dir=str(tmp_path / "data"))
    config.task.splits.update(train="train.jsonl", validation="validation.jsonl", test="test.jsonl")
    config.task.truncate.words = "end"
    config.task.update(prompt="reverse: {words}", response="reversed")
    config.max_prompt_tokens = config.max_response_tokens = 6
    return config


class Words(small.NumberTokenizer):
    """A number for each word."""

    def __init__(self, identity="words"):
        self.identity, self.texts = identity, 0

    def encode_prompts(self, texts):
        self.texts += len(texts)
        return [[*(3 + len(word) for word in text.split()), 1] for text in texts]

    encode_responses = encode_prompts


def folders(tmp_path):
    return {path.name for path in (tmp_path / "run/tokens").iterdir()}


def asked(task, tmp_path, change=lambda config: None, tokenizers=None, split="train"):
    """How many texts a run tokenizes, after a change of the config."""
    config = task.copy_and_resolve_references()
    change(config)
    context = Context(config, str(tmp_path / "run"), "make")
    prompts, responses = tokenizers or (Words(), Words())
    os.makedirs(context.workdir, exist_ok=True)
    examples = context.validation() if split == "validation" else context.examples(split)
    data = context.tokenized(examples, prompts, responses)
    read = context.task.examples(split)
    alone = TokenizedExamples(
        read,
        prompt_tokenizer=prompts,
        response_tokenizer=responses,
        max_prompt_tokens=config.max_prompt_tokens,
        max_response_tokens=config.max_response_tokens,
        keep_cut=config.task.cut_responses == "keep",
    )
    texts = prompts.texts + responses.texts
    assert len(alone) == len(data) and data.loss == alone.loss
    assert all((data[i][0] == alone[i][0]).all() for i in range(len(alone)))
    assert isinstance(examples, Split) and examples.is_read == bool(texts)
    return texts


@pytest.mark.parametrize(
    ("change", "is_new"),
    [
        ({"seed": 9, "buckets": ((9, 9),), "task.cut_responses": "drop"}, False),
        ({"max_prompt_tokens": 5}, True),
        ({"max_response_tokens": 7}, True),
        ({"task.truncate.words": "start"}, True),
        ({"task.prompt": "{words}"}, True),
    ],
)
def test_what_decides_them_makes_them_anew(task, tmp_path, change, is_new):
    assert asked(task, tmp_path) == 2 * 64
    assert asked(task, tmp_path) == 0

    def changed(config):
        config.update_from_flattened_dict(change)

    assert bool(asked(task, tmp_path, changed)) == is_new
    assert asked(task, tmp_path) == 0 and len(folders(tmp_path)) == 1 + is_new


def test_other_data_and_tokenizers_have_tokens_of_their_own(task, tmp_path):
    assert asked(task, tmp_path, split="validation") == 2 * 8
    assert asked(task, tmp_path) == 2 * 64
    assert asked(task, tmp_path, tokenizers=(Words(), Words("others"))) == 2 * 64
    assert asked(task, tmp_path, tokenizers=(Words("others"), Words())) == 2 * 64
    path = tmp_path / "data/train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    assert asked(task, tmp_path) == 2 * 64
    assert asked(task, tmp_path, split="validation") == 0


def test_nothing_is_written_where_nothing_may_be_made(task, tmp_path):
    context = Context(task, str(tmp_path / "run"), "find")
    data = context.tokenized(context.examples("train"), Words(), Words())
    assert len(data) == 64 and not (tmp_path / "run").exists()
