"""Batches: what is in them, their shapes and masks, their order, resumption and sharding."""

import copy
import itertools
import json
import re
from collections import Counter

import grain
import numpy as np
import pytest
from grain.experimental import LimitIterDataset, assert_equal_output_after_checkpoint
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from l2s_jax.data import examples
from l2s_jax.data.batches import (
    LengthGroups,
    evaluation_batches,
    training_batches,
    validation_batches,
)
from l2s_jax.data.examples import TokenizedExamples
from l2s_jax.data.table import Example

PROMPT_PAD, RESPONSE_PAD, EOS = 7, 3, 1


class NumberTokenizer:
    """Space-separated numbers, each its own id; 0 and the padding id are ordinary tokens too."""

    def __init__(self, pad_id):
        self.pad_id = pad_id
        self.eos_id, self.is_chat = EOS, False
        self.texts_encoded = 0

    def encode_prompts(self, texts):
        self.texts_encoded += len(texts)
        return [[*map(int, text.split()), EOS] for text in texts]

    def encode_responses(self, texts):
        return self.encode_prompts(texts)


def make_data(lengths, limits=None, tokenizers=None):
    """Examples of the given (prompt, response) lengths; the first token is the example's index."""
    examples = []
    for index, (prompt, response) in enumerate(lengths):
        words = [str(index), *["0", "7", "3"] * max(prompt, response)]
        examples.append(Example(" ".join(words[: prompt - 1]), " ".join(words[: response - 1]), ()))
    prompt_tokenizer, response_tokenizer = tokenizers or (
        NumberTokenizer(PROMPT_PAD),
        NumberTokenizer(RESPONSE_PAD),
    )
    longest = limits or tuple(map(max, zip(*lengths, strict=True)))
    return TokenizedExamples(
        examples,
        prompt_tokenizer=prompt_tokenizer,
        response_tokenizer=response_tokenizer,
        max_prompt_tokens=longest[0],
        max_response_tokens=longest[1],
    )


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def indices_of(batch):
    return batch["llm_ids"][:, 0].tolist()


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


def assert_rows_are_exact(data, indices, batch):
    for row, index in enumerate(indices):
        sides = zip(data[index], ("llm", "response"), (PROMPT_PAD, RESPONSE_PAD), strict=True)
        for ids, name, pad in sides:
            count = len(ids)
            width = batch[f"{name}_ids"].shape[1]
            np.testing.assert_array_equal(batch[f"{name}_ids"][row, :count], ids)
            assert (batch[f"{name}_ids"][row, count:] == pad).all()
            np.testing.assert_array_equal(batch[f"{name}_mask"][row], np.arange(width) < count)


lengths_strategy = st.lists(
    st.tuples(st.integers(2, 20), st.integers(2, 20)), min_size=1, max_size=60
)
buckets_strategy = st.lists(st.tuples(st.integers(2, 19), st.integers(2, 19)), max_size=4).map(
    lambda pairs: (
        *dict.fromkeys(zip(sorted(p for p, _ in pairs), sorted(r for _, r in pairs), strict=True)),
        (20, 20),
    )
)


@settings(max_examples=80, deadline=None)
@given(
    lengths=lengths_strategy,
    buckets=buckets_strategy,
    batch_size=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
def test_an_epoch_of_training_batches(lengths, buckets, batch_size, seed):
    assume(len(lengths) >= batch_size)
    data = make_data(lengths)
    count = len(lengths) // batch_size
    iterator = training_batches(
        data, prompt_name="llm", buckets=buckets, batch_size=batch_size, seed=seed
    )
    epochs = [take(iterator, count) for _ in range(2)]
    for epoch in epochs:
        seen = Counter(itertools.chain.from_iterable(map(indices_of, epoch)))
        assert set(seen.values()) == {1}
        assert len(lengths) - len(seen) < batch_size
        smaller_than_bucket = 0
        for batch in epoch:
            assert list(batch) == ["llm_ids", "llm_mask", "response_ids", "response_mask"]
            for name in ("llm", "response"):
                assert batch[f"{name}_ids"].dtype == np.int32
                assert batch[f"{name}_mask"].dtype == bool
                assert batch[f"{name}_mask"].shape == batch[f"{name}_ids"].shape
            shape = (batch["llm_ids"].shape[1], batch["response_ids"].shape[1])
            assert shape in buckets
            assert len(batch["llm_ids"]) == len(batch["response_ids"]) == batch_size
            assert_rows_are_exact(data, indices_of(batch), batch)
            for prompt, response in (lengths[i] for i in indices_of(batch)):
                fitting = next(b for b in buckets if prompt <= b[0] and response <= b[1])
                smaller_than_bucket += fitting != shape
        # Only what is left of each smaller bucket moves up, at most through all of the larger ones.
        assert smaller_than_bucket <= (len(buckets) - 1) * (batch_size - 1)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(2, 9), st.integers(2, 9)), min_size=6, max_size=30),
    stop=st.integers(0, 25),
    seed=st.integers(0, 9),
)
def test_resumption_is_exact(lengths, stop, seed):
    data = make_data(lengths)

    def start():
        return training_batches(
            data, prompt_name="llm", buckets=[(5, 5), (9, 9)], batch_size=3, seed=seed
        )

    straight = take(start(), 40)
    first = start()
    assert_equal(take(first, stop), straight[:stop])
    state = copy.deepcopy(first.get_state())
    take(first, 3)
    resumed = start()
    resumed.set_state(state)
    assert_equal(take(resumed, 40 - stop), straight[stop:])
    first.set_state(state)
    assert_equal(take(first, 3), straight[stop : stop + 3])


OPTIONS = {"prompt_name": "llm", "buckets": [(5, 5), (9, 9)], "batch_size": 12}


class Training(grain.IterDataset):
    """`training_batches`, each time from the first on."""

    def __init__(self, data, rows=None):
        super().__init__()
        self.data, self.rows = data, rows

    def __iter__(self):
        return training_batches(self.data, seed=0, rows=self.rows, **OPTIONS)


@pytest.fixture(scope="module")
def two_epochs():
    """Data of which two epochs, and a batch, are 13 batches."""
    random = np.random.default_rng(0)
    return make_data([tuple(pair) for pair in random.integers(2, 10, (80, 2)).tolist()])


@pytest.mark.parametrize("rows", [None, np.array([3, 1, 8])])
def test_grain_finds_each_state_exact(two_epochs, rows):
    training = LimitIterDataset(Training(two_epochs, rows), 13)
    assert_equal_output_after_checkpoint(training)
    own = np.arange(12) if rows is None else rows
    assert_equal_output_after_checkpoint(validation_batches(two_epochs, rows=own, **OPTIONS))


def test_each_state_continues_with_any_number_of_processes(two_epochs):
    def start(processes):
        rows = np.split(np.arange(12), processes)
        return [iter(Training(two_epochs, own)) for own in rows]

    straight = take(iter(Training(two_epochs)), 13)
    shapes = {batch["llm_ids"].shape for batch in straight}
    assert len(shapes) == 2
    for before in (1, 2, 3):
        saving = start(before)
        for step in range(12):
            (state,) = {json.dumps(each.get_state()) for each in saving}
            for after in (1, 2, 4):
                resumed = start(after)
                for each in resumed:
                    each.set_state(json.loads(state))
                for expected in straight[step : step + 2]:
                    parts = [next(each) for each in resumed]
                    whole = {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
                    assert_equal([whole], [expected])
            for each in saving:
                next(each)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(2, 9), st.integers(2, 9)), min_size=12, max_size=40),
    processes=st.sampled_from([1, 2, 3, 4, 6, 12]),
    seed=st.integers(0, 9),
)
def test_processes_share_the_batches_of_one(lengths, processes, seed):
    data = make_data(lengths)

    def start(rows=None):
        return training_batches(
            data, prompt_name="llm", buckets=[(5, 5), (9, 9)], batch_size=12, seed=seed, rows=rows
        )

    rows_of = np.split(np.random.default_rng(seed).permutation(12), processes)
    shards = [take(start(rows), 7) for rows in rows_of]
    for step, batch in enumerate(take(start(), 7)):
        for key, value in batch.items():
            for rows, shard in zip(rows_of, shards, strict=True):
                np.testing.assert_array_equal(shard[step][key], value[rows])


def test_epochs_and_seeds_differ_and_repeat():
    data = make_data([(4, 4)] * 60)

    def order(seed):
        batches = training_batches(
            data, prompt_name="llm", buckets=[(4, 4)], batch_size=10, seed=seed
        )
        indices = [i for batch in take(batches, 12) for i in indices_of(batch)]
        return indices[:60], indices[60:]

    first, second = order(0)
    assert sorted(first) == sorted(second) == list(range(60))
    assert first != second
    assert order(0) == (first, second)
    assert len({tuple(order(seed)[0]) for seed in range(5)}) == 5


def test_widths_are_shuffled_within_an_epoch():
    data = make_data([(2, 2), (8, 8)] * 40)
    batches = training_batches(
        data, prompt_name="llm", buckets=[(2, 2), (8, 8)], batch_size=4, seed=0
    )
    widths = [batch["llm_ids"].shape[1] for batch in take(batches, 20)]
    assert sorted(widths) == [2] * 10 + [8] * 10
    assert widths not in (sorted(widths), sorted(widths)[::-1])


def test_rare_long_examples_are_trained_on():
    data = make_data([(2, 2)] * 9 + [(9, 9)])
    batches = training_batches(
        data, prompt_name="llm", buckets=[(2, 2), (9, 9)], batch_size=8, seed=0
    )
    seen = Counter(i for batch in take(batches, 400) for i in indices_of(batch))
    assert min(seen[index] for index in range(10)) > 400 * 0.8 * 0.8


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_strategy, buckets=buckets_strategy, batch_size=st.integers(1, 12))
def test_evaluation_batches_hold_every_example_once(lengths, buckets, batch_size):
    data = make_data(lengths)
    batches = evaluation_batches(data, prompt_name="llm", buckets=buckets, batch_size=batch_size)
    assert len(batches) == len(list(batches)) == -(-len(lengths) // batch_size)
    seen = np.concatenate([indices for indices, _ in batches])
    real = seen[seen >= 0]
    assert sorted(real.tolist()) == list(range(len(lengths)))
    assert (seen[len(real) :] == -1).all()
    prompt_lengths = [lengths[i][0] for i in real]
    assert prompt_lengths == sorted(prompt_lengths)
    for indices, batch in batches:
        real = indices[indices >= 0].tolist()
        longest = max(lengths[i][0] for i in real)
        width = min(prompt for prompt, _ in buckets if prompt >= longest)
        assert batch["llm_ids"].shape == (batch_size, width)
        assert batch["response_ids"].shape == (batch_size, 20)
        assert_rows_are_exact(data, real, batch)


def test_padding_rows_attend_to_one_token_and_count_in_no_loss():
    data = make_data([(4, 4)] * 5)
    indices, batch = evaluation_batches(data, prompt_name="llm", buckets=[(6, 8)], batch_size=4)[-1]
    assert indices.tolist() == [4, -1, -1, -1]
    assert batch["llm_mask"].sum(axis=1).tolist() == [4, 1, 1, 1]
    assert batch["llm_mask"][1:, 0].all()
    assert batch["response_mask"].sum(axis=1).tolist() == [4, 0, 0, 0]
    assert (batch["llm_ids"][1:] == PROMPT_PAD).all()
    assert (batch["response_ids"][1:] == RESPONSE_PAD).all()


@settings(max_examples=40, deadline=None)
@given(
    lengths=lengths_strategy,
    others=st.lists(st.integers(2, 20), min_size=60, max_size=60),
    buckets=buckets_strategy,
)
def test_evaluation_prompts_know_nothing_of_responses(lengths, others, buckets):
    changed = [(prompt, other) for (prompt, _), other in zip(lengths, others, strict=False)]

    def prompts(pairs):
        data = make_data(pairs, limits=(20, 20))
        batches = evaluation_batches(data, prompt_name="llm", buckets=buckets, batch_size=4)
        return [
            {"indices": i, "ids": b["llm_ids"], "mask": b["llm_mask"], "s": b["response_ids"].shape}
            for i, b in batches
        ]

    assert_equal(prompts(lengths), prompts(changed))


def test_groups_take_some_of_the_prompts_by_length():
    data = make_data([(9, 2), (3, 2), (7, 2), (4, 2), (5, 2)])
    groups = LengthGroups(data, np.array([4, 3, 0, 1]), [4, 6, 12], 3)
    assert [(indices.tolist(), width) for indices, width in groups] == [
        ([1, 3, 4], 6),
        ([0, -1, -1], 12),
    ]
    assert len(LengthGroups(data, np.array([], int), [4], 3)) == 0
    with pytest.raises(ValueError, match="a prompt has 9 tokens: expected at most 6"):
        LengthGroups(data, np.arange(5), [4, 6], 3)


def test_prompt_name_is_in_the_keys():
    data = make_data([(4, 4)] * 4)
    options = {"prompt_name": "slm_prompt", "buckets": [(4, 4)], "batch_size": 2}
    keys = ["slm_prompt_ids", "slm_prompt_mask", "response_ids", "response_mask"]
    assert list(next(training_batches(data, seed=0, **options))) == keys
    assert list(evaluation_batches(data, **options)[0][1]) == keys


def test_long_prompts_end_with_eos_and_long_responses_do_not():
    data = make_data([(3, 9), (4, 3), (5, 5), (12, 2)], limits=(4, 6))
    assert data.prompt_lengths.tolist() == [3, 4, 4, 4]
    assert data.response_lengths.tolist() == [6, 3, 5, 2]
    assert (data.loss.prompts, data.loss.responses) == (2, 1)
    assert [ids.tolist() for ids in data[3]] == [[3, 0, 7, EOS], [3, EOS]]
    assert [ids.tolist() for ids in data[0]] == [[0, 0, EOS], [0, 0, 7, 3, 0, 7]]
    assert all(ids.dtype == np.int32 for ids in data[0])
    assert data.prompt_lengths.dtype == data.response_lengths.dtype == np.int32


def test_a_sequence_without_eos_is_only_cut():
    class Bare(NumberTokenizer):
        def encode_prompts(self, texts):
            return [ids[:-1] for ids in super().encode_prompts(texts)]

    data = make_data([(6, 6)], limits=(3, 3), tokenizers=(Bare(0), NumberTokenizer(0)))
    assert [ids.tolist() for ids in data[0]] == [[0, 0, 7], [0, 0, 7]]


def test_examples_are_tokenized_once(monkeypatch):
    monkeypatch.setattr(examples, "AT_ONCE", 4)
    tokenizers = NumberTokenizer(0), NumberTokenizer(0)
    lengths = [(2 + i % 5, 2 + i % 3) for i in range(11)]
    data = make_data(lengths, tokenizers=tokenizers)
    assert tokenizers[0].texts_encoded == 0
    options = {"prompt_name": "llm", "buckets": [(9, 9)], "batch_size": 4}
    take(training_batches(data, seed=0, **options), 10)
    list(evaluation_batches(data, **options))
    assert [tokenizer.texts_encoded for tokenizer in tokenizers] == [11, 11]
    assert data.prompt_lengths.tolist() == [prompt for prompt, _ in lengths]
    assert data[10][0].tolist() == [10, EOS]
    assert data[-1][0].tolist() == [10, EOS]
    with pytest.raises(IndexError):
        data[11]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"buckets": [(4, 4)]}, "max_prompt_tokens 8 and max_response_tokens 6"),
        ({"buckets": [(8, 5)]}, "(8, 5), expected the last to hold"),
        ({"buckets": [(7, 6)]}, "(7, 6), expected the last to hold"),
        ({"buckets": []}, "none"),
        ({"buckets": [(8, 8), (4, 4)]}, "(8, 8), (4, 4), expected both sizes to ascend"),
        ({"buckets": [(4, 8), (8, 6)]}, "ascend"),
        ({"buckets": [(8, 8), (8, 8)]}, "ascend"),
        ({"buckets": [(0, 8), (8, 8)]}, "pairs"),
        ({"buckets": [(8, 8, 8)]}, "pairs"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 11}, "batch_size is 11, expected 1 to 10, the number of examples"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_errors(options, expected):
    data = make_data([(4, 4)] * 10, limits=(8, 6))
    good = {"prompt_name": "llm", "buckets": [(8, 6)], "batch_size": 4, "seed": 0}
    next(training_batches(data, **good))
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        training_batches(data, **good | options)
    assert "\n" not in str(error.value)
    evaluation = {k: v for k, v in (good | options).items() if k in good and k != "seed"}
    if "buckets" in options or evaluation["batch_size"] == 0:
        with pytest.raises(ValueError, match=re.escape(expected.split(",")[0])):
            evaluation_batches(data, **evaluation)


@pytest.mark.parametrize("limits", [(0, 4), (4, 0)])
def test_limits_must_leave_room(limits):
    with pytest.raises(ValueError, match="is 0, expected at least 1"):
        make_data([(4, 4)], limits=limits)
