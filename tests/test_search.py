"""Searches beside transformers' generate and an exhaustive one; sampling by its distribution."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
import xla
from hypothesis import given, settings
from hypothesis import strategies as st

from l2s_jax.checkpoints.pretrained import load_hf
from l2s_jax.decoding import choices
from l2s_jax.decoding import logits as processing
from l2s_jax.decoding.beam import beam_search
from l2s_jax.decoding.engine import GREEDY, jitted_decode
from l2s_jax.decoding.loop import Loop
from l2s_jax.models.systems import LanguageModel
from l2s_jax.settings.search import Search

ROWS, PROMPT, NEW = 200, 6, 12
FAMILIES = ("t5", "gpt2", "gpt_neox", "llama")
ONE_END = ("t5", "gpt2")  # the others have two tokens that end a response
SEARCHES = {
    "greedy": Search(),
    "greedy with penalties": Search(
        repetition_penalty=1.4, no_repeat_ngram_size=2, min_new_tokens=4
    ),
    "beams": Search(num_beams=4),
    "the three best by probability": Search(num_beams=4, num_return=3, length_penalty=0.0),
    "the first finished": Search(
        num_beams=3, num_return=2, early_stopping=True, length_penalty=0.5
    ),
    "beams with penalties": Search(
        num_beams=3,
        length_penalty=-1.0,
        repetition_penalty=1.4,
        no_repeat_ngram_size=3,
        min_new_tokens=4,
    ),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """family -> (transformers' model, ours as a system, its parameters, its end_ids)."""

    @functools.cache
    def make(family):
        directory = str(tmp_path_factory.mktemp(family))
        if family == "t5":
            reference = hf.make_t5(directory, own_head=True, tie_word_embeddings=False)
        else:
            # A tied head says the last token over and over.
            reference = hf.make_causal(directory, model_type=family, tie_word_embeddings=False)
        module, params = load_hf(directory)
        system, trained = LanguageModel("llm", module.config), {"llm": params}
        # A random model hardly ever says its eos: a token that many responses have serves as it.
        said = run(system, trained, GREEDY, end_ids=()).tokens
        shares = [(said[:, 1:] == token).any(1).mean() for token in range(module.config.vocab_size)]
        ends = tuple(
            int(np.argmin(np.abs(np.array(shares) - share)))
            for share in ((0.5,) if family in ONE_END else (0.4, 0.2))
        )
        assert len(set(ends)) == len(ends)
        config = dataclasses.replace(module.config, eos_id=ends[0])
        return reference, LanguageModel("llm", config), trained, ends

    return make


@functools.cache
def prompts():
    return np.random.default_rng(0).integers(2, 64, (ROWS, PROMPT), dtype=np.int32)


def run(system, trained, search, rows=ROWS, seeds=None, **options):
    ids = prompts()[:rows]
    with jax.default_matmul_precision("highest"):
        return jax.device_get(
            jitted_decode(
                system,
                trained,
                {},
                ids,
                np.ones(ids.shape, bool),
                np.full(rows, NEW, np.int32),
                seeds,
                max_new_tokens=NEW,
                search=search,
                **options,
            )
        )


def of_transformers(reference, pad_id, ends, search, ids, **options):
    """(tokens [B, N, NEW], scores [B, N] or None)."""
    fields = dataclasses.asdict(search)
    fields["num_return_sequences"] = fields.pop("num_return")
    sampling, drafting = ("temperature", "top_k", "top_p", "min_p"), ("exact", "draft_tokens")
    others = ("draft_tolerance", "stop", "frequency_penalty", "presence_penalty")
    for name in (*sampling, *drafting, *others):
        del fields[name]
    ids = torch.tensor(ids).long()
    found = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=list(ends),
        pad_token_id=pad_id,
        return_dict_in_generate=True,
        output_scores=True,
        **fields,
        **options,
    )
    tokens = found.sequences.numpy()[:, 1 if reference.config.is_encoder_decoder else PROMPT :]
    tokens = np.pad(tokens, [(0, 0), (0, NEW - tokens.shape[1])], constant_values=pad_id)
    # Its beam search fills up with eos where the padding id is 0.
    is_end = np.isin(tokens, ends)
    tokens = np.where(np.cumsum(is_end, axis=1) - is_end > 0, pad_id, tokens)
    scores = None
    if search.num_beams > 1:
        scores = found.sequences_scores.numpy().reshape(len(ids), search.num_return)
    return tokens.reshape(len(ids), search.num_return, NEW), scores


class Rounding(transformers.LogitsProcessor):
    """Moves the gap of any two logits by up to 1e-5 of their scale."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, input_ids, scores):
        scale = torch.where(scores.isfinite(), scores.abs(), 0.0).amax(1, keepdim=True)
        return scores + 5e-6 * scale * (2 * torch.rand(scores.shape, generator=self.generator) - 1)


def is_tie(reference, pad_id, ends, search, ids, tokens):
    """Whether transformers says tokens [N, NEW] too, in some draw of what rounding may do.

    Of beams, the tie may be of two hypotheses that later ones replaced: the scores of what comes of
    them are then far apart, so that no comparison of outputs would tell it from a bug.
    """
    draws = np.repeat(ids[None], 64, axis=0)
    said, _ = of_transformers(reference, pad_id, ends, search, draws, logits_processor=[Rounding()])
    return (said == tokens).all((1, 2)).any()


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family, name, checkpoints):
    reference, system, trained, ends = checkpoints(family)
    search, pad_id = SEARCHES[name], system.config.pad_id
    decoded = run(system, trained, search, end_ids=ends)
    expected, scores = of_transformers(reference, pad_id, ends, search, prompts())
    tokens = decoded.tokens.reshape(expected.shape)
    same = (tokens == expected).all((1, 2))
    # Two tokens may be as likely as each other to the last bit: in one row of 200, not in more.
    ties = np.flatnonzero(~same)
    assert len(ties) <= 1, f"{len(ties)} rows differ: {ties}"
    for row in ties:
        assert is_tie(reference, pad_id, ends, search, prompts()[row], tokens[row]), (
            f"row {row} differs, and not by a tie: {tokens[row]}, expected {expected[row]}"
        )
    assert 0.05 < (decoded.lengths < NEW).mean() < 1, "no test of what ends early"
    if scores is not None:
        np.testing.assert_allclose(decoded.scores[same], scores[same], rtol=1e-4, atol=1e-6)
        assert (np.diff(decoded.scores, axis=1) <= 0).all()


def test_searches_differ_from_each_other(checkpoints):
    _, system, trained, _ = checkpoints("t5")
    best = [
        run(system, trained, search).tokens.reshape(ROWS, -1, NEW)[:, 0]
        for search in SEARCHES.values()
    ]
    for one, other in itertools.combinations(best, 2):
        assert (one != other).any(1).mean() > 0.1


VOCABULARY, EOS, PAD, LONGEST = 4, 1, 0, 4
NEVER = -1


@functools.cache
def language(seed):
    """Log probabilities [V] of the next token after each tuple of up to LONGEST - 1 tokens."""
    random = np.random.default_rng(seed)
    contexts = itertools.chain.from_iterable(
        itertools.product(range(VOCABULARY), repeat=length) for length in range(LONGEST)
    )
    return {
        context: np.asarray(jax.nn.log_softmax(random.normal(size=VOCABULARY) * 1.5))
        for context in contexts
    }


def exhaustive(table, limit, length_penalty):
    """Every response of up to `limit` tokens with its score, best first."""
    found = []

    def extend(tokens, log_p):
        if tokens and (tokens[-1] == EOS or len(tokens) == limit):
            found.append((log_p / len(tokens) ** length_penalty, tokens))
            return
        for token in range(VOCABULARY):
            extend((*tokens, token), log_p + table[tokens][token])

    extend((), 0.0)
    return sorted(found, reverse=True)


def search_languages(tables, limit, search):
    """Hypotheses of a beam search, a row per language."""
    # All contexts of one length, as numbers in base V, so that a step is a look-up.
    arrays = [
        jnp.stack(
            [
                jnp.stack([table[c] for c in itertools.product(range(VOCABULARY), repeat=length)])
                for table in tables
            ]
        )
        for length in range(LONGEST)
    ]

    def step(params, token, cache):
        context, row = cache["context"] * VOCABULARY + token, cache["row"]
        branches = [
            lambda length=length: arrays[length][row, context % VOCABULARY**length]
            for length in range(1, LONGEST)
        ]
        logits = jax.lax.switch(cache["steps"], branches)
        return logits, {"context": context, "row": row, "steps": cache["steps"] + 1}

    rows = len(tables)
    return jax.device_get(
        jax.jit(
            lambda: beam_search(
                step,
                None,
                arrays[0][:, 0],
                {
                    "context": jnp.zeros(rows, jnp.int32),
                    "row": jnp.arange(rows),
                    "steps": jnp.int32(0),
                },
                jnp.full(rows, limit),
                take=lambda cache, parents: {
                    **cache,
                    "context": jnp.take_along_axis(
                        cache["context"].reshape(parents.shape), parents, axis=1
                    ).reshape(-1),
                },
                search=search,
                end_ids=(EOS,),
                pad_id=PAD,
                capacity=LONGEST,
            )
        )()
    )


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("limit", [1, 2, LONGEST])
def test_wide_beams_find_what_an_exhaustive_search_finds(limit, length_penalty):
    tables = [language(seed) for seed in range(5)]
    beams = VOCABULARY**LONGEST  # no hypothesis is ever dropped
    search = Search(num_beams=beams, num_return=3, length_penalty=length_penalty)
    found = search_languages(tables, limit, search)
    for row, table in enumerate(tables):
        expected = exhaustive(table, limit, length_penalty)[:3]
        for place, (score, tokens) in enumerate(expected):
            length = found.lengths[row, place]
            assert tuple(found.tokens[row, place, :length]) == tokens
            assert (found.tokens[row, place, length:] == PAD).all()
            assert found.finished[row, place] == (tokens[-1] == EOS)
            np.testing.assert_allclose(found.scores[row, place], score, rtol=1e-5)


def test_a_row_that_has_its_hypotheses_takes_no_more_while_others_run():
    tables = [language(seed) for seed in range(8)]
    # The first two to end are the result, although longer ones would score higher.
    search = Search(num_beams=2, num_return=2, length_penalty=3.0, early_stopping=True)
    together = search_languages(tables, LONGEST, search)
    early = 0
    for row, table in enumerate(tables):
        alone = search_languages([table], LONGEST, search)
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
        np.testing.assert_allclose(together.scores[row], alone.scores[0], rtol=1e-6)
        early += together.lengths[row].max() < LONGEST
    assert 0 < early < len(tables)


def test_rows_have_limits_of_their_own(checkpoints):
    _, system, trained, _ = checkpoints("gpt2")
    limits = np.array([0, 1, 5, NEW], np.int32)
    ids = np.repeat(prompts()[:1], 4, axis=0)
    for search in (GREEDY, Search(num_beams=3), Search(temperature=0.8)):
        decoded = jax.device_get(
            jitted_decode(
                system,
                trained,
                {},
                ids,
                np.ones(ids.shape, bool),
                limits,
                np.full(4, 3, np.uint32),
                max_new_tokens=NEW,
                search=search,
                end_ids=(),
            )
        )
        assert decoded.lengths.reshape(-1).tolist() == limits.tolist()
        tokens = decoded.tokens.reshape(4, NEW)
        for row, limit in enumerate(limits):
            assert (tokens[row, limit:] == system.config.pad_id).all()
            if search.num_beams == 1:
                np.testing.assert_array_equal(tokens[row, :limit], tokens[3, :limit])


scores = st.lists(
    st.lists(st.integers(-40, 40).map(lambda value: value / 8), min_size=9, max_size=9),
    min_size=2,
    max_size=2,
).map(lambda rows: np.asarray(rows, np.float32))


def torch_of(array):
    return torch.tensor(np.asarray(array))


@settings(deadline=None, max_examples=40)
@given(
    logits=scores,
    penalty=st.sampled_from([0.5, 1.0, 1.7]),
    size=st.sampled_from([0, 1, 2, 3]),
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=10),
    padding=st.integers(0, 3),
    prompt=st.integers(0, 10),
)
def test_penalties_are_those_of_transformers(logits, penalty, size, tokens, padding, prompt):
    search = Search(repetition_penalty=penalty, no_repeat_ngram_size=size)
    rows, prompt = len(logits), min(prompt, len(tokens))
    ids = np.array([[*[7] * padding, *tokens[:prompt]]] * rows, np.int32)
    mask = np.arange(padding + prompt) >= padding
    history = processing.history_of(
        jnp.asarray(ids), jnp.broadcast_to(mask, ids.shape), len(tokens) - prompt + 2
    )
    for token in tokens[prompt:]:
        history = history.append(jnp.full(rows, token))
    found = processing.constrain(search, jnp.asarray(logits), history, jnp.int32(9), ())

    expected, sofar = torch_of(logits), torch.tensor([tokens] * rows)
    if penalty != 1:
        expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(sofar, expected)
    if size:
        expected = transformers.NoRepeatNGramLogitsProcessor(size)(sofar, expected)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    logits=scores,
    frequency=st.sampled_from([0.0, 0.5, -1.5]),
    presence=st.sampled_from([0.0, 0.25, -1.0]),
    prompt=st.lists(st.integers(0, 3), max_size=5),
    response=st.lists(st.integers(0, 3), max_size=9),
    padding=st.integers(0, 3),
)
def test_penalties_by_frequency_and_presence(
    logits, frequency, presence, prompt, response, padding
):
    rows = len(logits)
    ids = np.array([[*[7] * padding, *prompt]] * rows, np.int32).reshape(rows, -1)
    mask = np.arange(ids.shape[1]) >= padding
    history = processing.history_of(
        jnp.asarray(ids), jnp.broadcast_to(mask, ids.shape), len(response) + 1
    )
    for token in response:
        history = history.append(jnp.full(rows, token))
    times = np.bincount(response, minlength=9)
    expected = logits - frequency * times - presence * (times > 0)
    count = jnp.int32(len(response))
    search = Search(frequency_penalty=frequency, presence_penalty=presence)
    found = processing.constrain(search, jnp.asarray(logits), history, count, ())
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    # By each row's own choices, and own counts.
    history = history.replace(end=jnp.full(rows, history.end))
    rows_of = choices.choices_of([search, Search()])
    found = choices.constrain(rows_of, jnp.asarray(logits), history, jnp.full(rows, count), ())
    np.testing.assert_allclose(found, [expected[0], logits[1]], rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    logits=scores,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 4, 20]),
    top_p=st.sampled_from([1.0, 0.35, 0.9]),
    min_p=st.sampled_from([0.0, 0.1, 0.6]),
)
def test_truncation_keeps_what_transformers_keeps(logits, temperature, top_k, top_p, min_p):
    # Equal logits could be cut in either order: here all differ.
    logits = logits + np.arange(9, dtype=np.float32) / 97
    search = Search(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found = processing.truncate(search, jnp.asarray(logits))
    expected = transformers.TemperatureLogitsWarper(temperature)(None, torch_of(logits))
    if top_k:
        expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = transformers.MinPLogitsWarper(min_p)(None, expected)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


@settings(deadline=None)
@given(st.lists(st.sampled_from([-np.inf, -1.5, -0.0, 0.0, 2.0, np.inf]), min_size=9, max_size=9))
def test_greatest_is_an_argmax(values):
    rows = np.array([values, values[::-1]], np.float32)
    np.testing.assert_array_equal(processing.greatest(jnp.asarray(rows)), rows.argmax(axis=1))


def test_the_greatest_is_found_in_a_program_with_all_that_comes_before_it():
    search = Search(repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=30)
    rows, size, vocabulary = 64, 24, 32128

    def constrained(hidden, table, tokens):
        logits = jnp.einsum("bd,vd->bv", hidden, table)
        starts = jnp.zeros(rows, jnp.int32)
        history = processing.History(tokens, starts, jnp.int32(size))
        return processing.constrain(search, logits, history, jnp.int32(9), (1,))

    keys = jax.random.split(jax.random.key(0), 3)
    inputs = (
        jax.random.normal(keys[0], (rows, 32)),
        jax.random.normal(keys[1], (vocabulary, 32)),
        jax.random.randint(keys[2], (size, rows), 0, vocabulary),
    )
    chosen = jax.jit(lambda *arguments: processing.greatest(constrained(*arguments)))
    optimized = {"xla_backend_optimization_level": 3} | xla.AS_USERS_HAVE_IT
    found = chosen.lower(*inputs).compile(compiler_options=optimized)(*inputs)
    logits = jax.jit(constrained).lower(*inputs).compile(compiler_options=optimized)(*inputs)
    np.testing.assert_array_equal(found, np.asarray(logits).argmax(axis=1))


def test_samples_have_the_distribution_of_the_logits():
    draws = 20000
    logits = np.random.default_rng(1).normal(size=12).astype(np.float32) * 2
    search = Search(temperature=0.7, top_k=8, top_p=0.95)
    kept = processing.truncate(search, jnp.asarray(logits)[None])[0]
    keys = jax.vmap(jax.random.key)(jnp.arange(draws))
    tokens = processing.sample(jnp.broadcast_to(kept, (draws, 12)), keys)
    counts = np.bincount(tokens, minlength=12)
    expected = draws * np.asarray(jax.nn.softmax(kept))
    assert (counts[expected == 0] == 0).all() and 3 <= (expected > 0).sum() < 9
    there = expected > 0
    chi_squared = ((counts - expected)[there] ** 2 / expected[there]).sum()
    assert chi_squared < 30  # of at most 7 degrees of freedom: p < 1e-4


def assert_drawn(counts, expected):
    """A chi-squared test of how often each outcome was drawn."""
    # Rare outcomes together, so that no expectation is too small for the test.
    rare = expected < 10
    expected = np.append(expected[~rare], expected[rare].sum())
    counts = np.append(counts[~rare], counts[rare].sum())
    there = expected > 0
    chi_squared = ((counts - expected)[there] ** 2 / expected[there]).sum()
    freedom = there.sum() - 1
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom)


def test_first_tokens_are_sampled_from_the_models_distribution(checkpoints):
    _, system, trained, _ = checkpoints("llama")
    draws = 4000
    ids = np.repeat(prompts()[:1], draws, axis=0)
    decoded = jax.device_get(
        jitted_decode(
            system,
            trained,
            {},
            ids,
            np.ones(ids.shape, bool),
            np.full(draws, 1, np.int32),
            np.arange(draws, dtype=np.uint32),
            max_new_tokens=1,
            search=Search(temperature=1.3),
        )
    )
    logits = system.scored(
        trained,
        {},
        {
            "llm_ids": ids[:1],
            "llm_mask": np.ones((1, PROMPT), bool),
            "response_ids": np.zeros((1, 1), np.int32),
        },
    ).logits()[0, 0]
    expected = draws * np.asarray(jax.nn.softmax(logits / 1.3))
    counts = np.bincount(decoded.tokens[:, 0], minlength=len(expected))
    assert_drawn(counts, expected)


@pytest.mark.parametrize(
    ("search", "possible"),
    [(Search(temperature=0.8), 64), (Search(temperature=1.5, min_p=0.2), 44)],
)
def test_the_tokens_of_a_response_are_sampled_from_their_joint_distribution(search, possible):
    draws, steps = 20000, 3
    # Of the next token after each, the first one's in the last row.
    table = np.random.default_rng(5).normal(size=(VOCABULARY + 1, VOCABULARY)).astype(np.float32)

    def step(table, token, cache):
        return table[token], cache

    loop = Loop(step, (NEVER,), PAD, steps, search)
    logits = np.broadcast_to(table[-1], (draws, VOCABULARY))
    limits, seeds = np.full(draws, steps), np.arange(draws, dtype=np.uint32)
    decoded = jax.jit(loop.run)(jnp.asarray(table), logits, jnp.int32(0), limits, seeds)

    after = np.exp(table / search.temperature)
    after[after < search.min_p * after.max(1, keepdims=True)] = 0
    after /= after.sum(1, keepdims=True)
    joint = np.einsum("a,ab,bc->abc", after[-1], after[:-1], after[:-1])
    shape = (VOCABULARY,) * steps
    places = np.ravel_multi_index(np.asarray(decoded.tokens).T, shape)
    counts = np.bincount(places, minlength=joint.size)
    expected = draws * joint.reshape(-1)
    assert (expected > 0).sum() == possible and (counts[expected == 0] == 0).all()
    assert_drawn(counts, expected)


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_a_sampled_row_depends_on_its_seed_only(family, checkpoints):
    _, system, trained, _ = checkpoints(family)
    search = Search(temperature=0.9, top_p=0.9, repetition_penalty=1.2)
    seeds = np.arange(100, 100 + ROWS, dtype=np.uint32)
    whole = run(system, trained, search, seeds=seeds)
    again = run(system, trained, search, seeds=seeds)
    np.testing.assert_array_equal(whole.tokens, again.tokens)
    few = run(system, trained, search, rows=5, seeds=seeds[:5])
    np.testing.assert_array_equal(few.tokens, whole.tokens[:5])
    others = run(system, trained, search, seeds=seeds + 1000)
    assert (others.tokens != whole.tokens).any(1).mean() > 0.9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0: expected a number >= 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": True}, "temperature=True"),
        ({"top_k": -1}, "top_k=-1: expected an integer >= 0"),
        ({"top_k": 2.0}, "top_k=2.0: expected an integer"),
        ({"top_p": 0}, "top_p=0: expected a number above 0, at most 1"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"num_beams": 0}, "num_beams=0: expected an integer >= 1"),
        ({"num_beams": "4"}, "num_beams='4'"),
        ({"length_penalty": float("inf")}, "length_penalty=inf: expected a finite number"),
        ({"early_stopping": 1}, "early_stopping=1: expected true or false"),
        ({"num_return": 2}, "num_return=2: expected at most num_beams=1"),
        ({"min_new_tokens": -3}, "min_new_tokens=-3"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: expected a number above 0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1"),
        ({"stop": ("",)}, "expected texts of at least one character"),
        ({"stop": 3}, "stop=3: expected texts"),
        ({"num_beams": 2, "temperature": 0.5}, "beam search does not sample"),
        ({"num_beams": 2, "stop": ("x",)}, "expected one of them"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValueError) as error:
        Search(**fields)
    assert message in str(error.value) and "\n" not in str(error.value)
