"""Exact decoding says what the LLM alone says, whatever the SLM drafts."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from test_pairs import model

from l2s_jax.checkpoints.pretrained import family_of
from l2s_jax.decoding.engine import jitted_decode
from l2s_jax.decoding.exact import ExactLoop
from l2s_jax.models.exact import Exact
from l2s_jax.models.systems import LanguageModel, LlmToSlm
from l2s_jax.models.vocabulary import with_vocabulary
from l2s_jax.settings.search import Search

# So few that random models agree now and then.
VOCABULARY = 8
ROWS, PROMPT, NEW = 5, 6, 13
FAMILIES = ("t5", "gpt2", "gpt_neox", "llama", "windows")
# Families of LLM and SLM, fusion: seeds by which they agree on a third to a half of the tokens.
PAIRS = {
    ("t5", "t5", "add"): (1, 5),
    ("t5", "t5", "cross"): (2, 3),
    ("t5", "llama", "add"): (8, 2),
    ("gpt2", "gpt2", "replace"): (3, 2),
    ("gpt_neox", "gpt_neox", "add"): (6, 5),
    ("windows", "llama", "add"): (8, 2),
}
T5 = ("t5", "t5", "add")


def config_of(family, width, **changes):
    config = model("llama" if family == "windows" else family, VOCABULARY, width, **changes)
    if family == "windows":
        windows = {"sliding_window": 3, "window_pattern": "sf"[: config.num_layers]}
        config = dataclasses.replace(config, **windows)
    # With a tied head, random models repeat one token.
    return dataclasses.replace(config, tied_head=False)


@functools.cache
def pair(llm_family="t5", slm_family="t5", fusion="add"):
    """(an Exact system, trained, the whole LLM)."""
    of_llm, of_slm = PAIRS[llm_family, slm_family, fusion]
    llm = config_of(llm_family, 48, num_layers=2)
    whole = small.random_like(
        jax.eval_shape(LanguageModel("llm", llm).init, jax.random.key(0)), seed=of_llm
    )["llm"]
    layer = 1 if llm_family != "t5" else 0
    encoder, _ = family_of(llm).encoder_parameters(llm, layer)
    l2s = LlmToSlm(encoder, config_of(slm_family, 32), 48, fusion=fusion)
    trained = small.random_like(jax.eval_shape(l2s.init, jax.random.key(0)), seed=of_slm)
    return Exact(l2s, LanguageModel("llm", llm)), trained, whole


@functools.cache
def prompts(rows=ROWS, seed=0):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, PROMPT + 1, rows)
    mask = np.arange(PROMPT) < lengths[:, None]
    ids = random.integers(2, VOCABULARY, (rows, PROMPT), dtype=np.int32)
    return np.where(mask, ids, 0), mask


def exact_and_alone(which, search, *, seeds=None, end_ids=(1,), rows=ROWS, limits=None, **changes):
    """What the exact mode and the LLM alone say."""
    system, trained, whole = pair(*which)
    system = dataclasses.replace(system, **changes)
    ids, mask = prompts(rows)
    limits = np.full(rows, NEW, np.int32) if limits is None else limits
    settings = {"max_new_tokens": NEW, "end_ids": end_ids}
    drafting = dataclasses.replace(search, exact=True)
    plain = dataclasses.replace(search, exact=False, draft_tokens=4, draft_tolerance=0.0)
    return (
        jitted_decode(
            system, trained, whole, ids, mask, limits, seeds, search=drafting, **settings
        ),
        jitted_decode(
            system.llm, {"llm": whole}, {}, ids, mask, limits, seeds, search=plain, **settings
        ),
    )


def assert_says_the_same(exact, alone):
    np.testing.assert_array_equal(exact.tokens, alone.tokens)
    np.testing.assert_array_equal(exact.lengths, alone.lengths)
    np.testing.assert_array_equal(exact.finished, alone.finished)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_is_as_many_steps_and_a_row_may_go_back(family):
    config = config_of(family, 48, num_layers=2)
    system = LanguageModel("llm", config)
    params = small.random_like(jax.eval_shape(system.init, jax.random.key(0)))
    ids, mask = prompts()
    prefill = jax.jit(
        lambda: system.prefill(params, {}, ids, mask, system.encode(params, {}, ids, mask), 12)
    )
    step, extend = jax.jit(system.step), jax.jit(system.extend)
    random = np.random.default_rng(1)
    tokens = random.integers(2, VOCABULARY, (ROWS, 9), dtype=np.int32)

    _, cache = prefill()
    one_by_one = []
    for place in range(9):
        logits, cache = step(params, tokens[:, place], cache)
        one_by_one.append(logits)
    expected = np.stack(one_by_one, axis=1)

    _, cache = prefill()
    origin = cache.index
    together, cache = extend(params, tokens[:, :5], cache)
    small.assert_same(together, expected[:, :5], rtol=1e-4, atol=1e-4)

    # Each row forgets another number of tokens, and reads on from where it is.
    held = np.array([5, 3, 0, 4, 1], np.int32)
    cache = cache.replace(index=origin + held)
    rows, places = np.arange(ROWS)[:, None], held[:, None] + np.arange(4)
    onward, cache = extend(params, tokens[rows, places], cache)
    small.assert_same(onward, expected[rows, places], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(cache.index, origin + held + 4)


@pytest.mark.parametrize("which", PAIRS, ids="-".join)
def test_greedy_text_is_the_llms(which):
    exact, alone = exact_and_alone(which, Search())
    assert_says_the_same(exact, alone)
    assert 0 < exact.passed.sum() < exact.tested.sum()


@pytest.mark.parametrize(
    "search",
    [
        Search(min_new_tokens=6),
        Search(repetition_penalty=1.3),
        Search(no_repeat_ngram_size=2, repetition_penalty=0.8),
        Search(frequency_penalty=0.7, presence_penalty=0.5),
        Search(temperature=0.9),
        Search(temperature=1.3, top_k=5, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
    ],
    ids=str,
)
@pytest.mark.parametrize("which", list(PAIRS)[2:3], ids="-".join)
def test_the_other_settings_hold(which, search):
    seeds = np.arange(ROWS, dtype=np.uint32) + 7
    exact, alone = exact_and_alone(which, search, seeds=seeds)
    assert_says_the_same(exact, alone)
    assert exact.passed.sum() > 0


@pytest.mark.parametrize("most", [1, 2, 7, 40])
def test_the_size_of_blocks_does_not_matter(most):
    limits = np.array([NEW, 1, 0, 5, 2], np.int32)
    search = Search(exact=True, draft_tokens=most)
    for end_ids in ((1,), (1, 3)):
        assert_says_the_same(*exact_and_alone(T5, search, end_ids=end_ids, limits=limits))


def test_one_row_is_decoded_as_among_others():
    exact, alone = exact_and_alone(("t5", "t5", "cross"), Search(), rows=1)
    assert_says_the_same(exact, alone)


def test_a_draft_by_the_llm_itself_passes_whole():
    # The "SLM" is the LLM: H is its own embedding, which it reads alone.
    system, trained, whole = pair()
    _, alone = exact_and_alone(T5, Search())
    ids, mask = prompts()

    @dataclasses.dataclass(frozen=True)
    class Echo(Exact):
        def read(self, trained, frozen, ids, mask, max_steps):
            read = super().read(trained, frozen, ids, mask, max_steps)
            return read._replace(draft_logits=read.logits, draft_cache=read.cache)

        def draft(self, trained, tokens, cache):
            return self.judge(trained["llm"], tokens, cache)

        def draft_cost(self, trained, frozen):
            return 0.0

    echo = Echo(system.l2s, system.llm)
    exact = jitted_decode(
        echo,
        {**trained, "llm": whole},
        whole,
        ids,
        mask,
        np.full(ROWS, NEW, np.int32),
        max_new_tokens=NEW,
        search=Search(exact=True, draft_tokens=4),
        end_ids=(1,),
    )
    assert_says_the_same(exact, alone)
    # All that was tested, up to where the response ended within a block.
    np.testing.assert_array_equal(exact.passed, exact.tested)
    assert (exact.blocks <= -(-(exact.lengths - 1) // 5) + 1).all()


def decode_exactly(which, search, rows, seeds=None):
    system, trained, whole = pair(*which)
    ids, mask = (side[rows] for side in prompts())
    limits = np.full(len(rows), NEW, np.int32)
    settings = {"max_new_tokens": NEW, "search": search, "end_ids": (1,)}
    return jitted_decode(system, trained, whole, ids, mask, limits, seeds, **settings)


def test_with_all_tolerance_the_text_is_the_slms():
    system, trained, whole = pair()
    ids, mask = prompts()
    limits = np.full(ROWS, NEW, np.int32)
    alone = jitted_decode(
        system.l2s, trained, whole, ids, mask, limits, max_new_tokens=NEW, end_ids=(1,)
    )
    drafted = decode_exactly(T5, Search(exact=True, draft_tolerance=1.0), np.arange(ROWS))
    assert_says_the_same(drafted, alone)
    of_llm = decode_exactly(T5, Search(exact=True), np.arange(ROWS))
    assert (drafted.tokens != of_llm.tokens).any()


def test_a_tolerance_gives_the_same_text_in_any_company_and_blocks():
    seeds = np.arange(ROWS, dtype=np.uint32)
    for temperature in (0.0, 0.8):
        search = Search(exact=True, draft_tolerance=0.7, temperature=temperature)
        rows = np.arange(ROWS)
        together = decode_exactly(T5, search, rows, seeds)
        one_by_one = dataclasses.replace(search, draft_tokens=1)
        assert_says_the_same(decode_exactly(T5, one_by_one, rows, seeds), together)
        alone = decode_exactly(T5, search, rows[3:4], seeds[3:4])
        np.testing.assert_array_equal(alone.tokens, together.tokens[3:4])


def test_a_tolerance_is_a_share_of_the_best_tokens_probability():
    """Beside a loop in Python, one token at a time, with both models read whole."""
    system, trained, whole = pair()
    ids, mask = (side[:1] for side in prompts())
    hidden = system.l2s.encode(trained, whole, ids, mask)

    @jax.jit
    def logits_of_both(response):
        batch = {"llm_ids": ids, "llm_mask": mask, "llm_hidden": hidden, "response_ids": response}
        return (
            system.l2s.scored(trained, whole, batch).logits()[0],
            system.llm.scored({"llm": whole}, {}, batch).logits()[0],
        )

    tolerance, said = 0.6, []
    while len(said) < NEW:
        response = np.array([said + [0] * (NEW - len(said))], np.int32)
        of_slm, of_llm = (np.asarray(logits[len(said)]) for logits in logits_of_both(response))
        draft, p = int(of_slm.argmax()), np.asarray(jax.nn.softmax(of_llm))
        said.append(draft if p[draft] >= (1 - tolerance) * p.max() else int(p.argmax()))
        if said[-1] == 1:
            break
    search = Search(exact=True, draft_tolerance=tolerance)
    got = decode_exactly(T5, search, np.arange(1))
    assert got.tokens[0, : got.lengths[0]].tolist() == said


def test_an_slm_with_a_part_of_the_vocabulary_drafts_what_it_has():
    system, trained, whole = pair("windows", "llama", "add")
    slm = with_vocabulary(system.l2s.slm_config, [0, 1, 3, 4, 6])
    cut = dataclasses.replace(system, l2s=dataclasses.replace(system.l2s, slm_config=slm))
    served = cut.to_serve(trained, whole)
    ids, mask = prompts()
    limits = np.full(ROWS, NEW, np.int32)
    for search in (Search(), Search(temperature=1.0, repetition_penalty=1.1)):
        settings = {"max_new_tokens": NEW, "end_ids": (1,)}
        seeds = np.arange(ROWS, dtype=np.uint32)
        alone = jitted_decode(
            system.llm, {"llm": whole}, {}, ids, mask, limits, seeds, search=search, **settings
        )
        exact = jitted_decode(
            cut,
            *served,
            ids,
            mask,
            limits,
            seeds,
            search=dataclasses.replace(search, exact=True),
            **settings,
        )
        assert_says_the_same(exact, alone)
        assert exact.passed.sum() > 0


def test_samples_have_the_llms_distribution():
    """A chi-squared test of the first three tokens' joint distribution, over many seeds."""
    system, trained, whole = pair()
    count, chunk = 8192, 1024
    ids, mask = (np.repeat(side[:1], chunk, axis=0) for side in prompts())
    search = Search(exact=True, draft_tokens=2, temperature=1.5)
    found = np.zeros((VOCABULARY,) * 3)
    for start in range(0, count, chunk):
        seeds = np.arange(start, start + chunk, dtype=np.uint32)
        limits = np.full(chunk, 3, np.int32)
        settings = {"max_new_tokens": 3, "search": search, "end_ids": ()}
        drafted = jitted_decode(system, trained, whole, ids, mask, limits, seeds, **settings)
        np.add.at(found, tuple(np.asarray(drafted.tokens).T), 1)
    # The truth, by reading every beginning of two tokens.
    grid = np.stack(np.meshgrid(*[np.arange(VOCABULARY)] * 2, indexing="ij"), -1).reshape(-1, 2)
    response = np.pad(grid, ((0, 0), (0, 1))).astype(np.int32)
    batch = {"response_ids": response}
    for name, side in (("llm_ids", ids), ("llm_mask", mask)):
        batch[name] = np.repeat(side[:1], len(grid), axis=0)
    logits = system.llm.scored({"llm": whole}, {}, batch).logits()
    p = np.asarray(jax.nn.softmax(logits / 1.5), np.float64).reshape(*(VOCABULARY,) * 2, 3, -1)
    truth = p[0, 0, 0][:, None, None] * p[:, 0, 1][:, :, None] * p[:, :, 2]
    expected = truth * count
    often = expected >= 5
    seldom = expected[~often].sum()
    statistic = ((found - expected)[often] ** 2 / expected[often]).sum()
    statistic += (found[~often].sum() - seldom) ** 2 / max(seldom, 1e-9)
    freedom = often.sum()
    # Nearly normal with so many cells: above this once in thirty thousand times.
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)
    assert found.sum() == count and often.sum() > 100


def test_an_imposed_acceptance_is_what_passes():
    shares = []
    for acceptance in (0.0, 1.0):
        exact, _ = exact_and_alone(T5, Search(), end_ids=(), acceptance=acceptance)
        shares.append(float(exact.passed.sum() / exact.tested.sum()))
    assert shares == [0.0, 1.0]


def test_the_size_of_a_block_follows_what_passed():
    loop = ExactLoop(pair()[0], (1,), NEW, Search(exact=True, draft_tokens=8))

    def size(share, cost):
        return int(loop._best_size(jnp.array([1.0, share], jnp.float32), cost))

    # The last two by hand, of (1 - a^(k + 1)) / ((1 - a) (1 + c k)).
    assert [size(0.0, 0.1), size(1.0, 0.1), size(0.5, 0.1), size(0.8, 0.1)] == [1, 8, 2, 6]


def test_two_vocabularies_are_refused():
    system, _, _ = pair()
    l2s = dataclasses.replace(system.l2s, shared_vocabulary=False)
    with pytest.raises(ValueError, match="one tokenizer"):
        Exact(l2s, system.llm)
