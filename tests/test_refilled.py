"""Rows that take the next prompt when a response has ended say what batches say."""

from __future__ import annotations

import random

import jax
import pytest
from test_lane import NEW, SEARCHES, VOCABULARY, Numbers, system_of

from l2s_jax.cluster import sharding
from l2s_jax.serving.generator import Generator
from l2s_jax.serving.programs import Programs
from l2s_jax.serving.refilled import Refilled
from l2s_jax.settings.search import Search

SAMPLING = Search(temperature=1.0, min_p=0.05)


def make(kind="t5", search=SAMPLING, **others):
    settings = {"prompt_lengths": (3, 6), "max_new_tokens": NEW, "batch_size": 8} | others
    return Generator(*system_of(kind), Numbers(), Numbers(), search=search, **settings)


def prompts_of(count, longest=5, seed=0):
    chance = random.Random(seed)
    numbers = range(2, VOCABULARY)
    return [" ".join(map(str, chance.choices(numbers, k=1 + i % longest))) for i in range(count)]


def gathered(answered):
    found = {}
    for places, outputs in answered:
        for place, output in zip(places, outputs, strict=True):
            assert place not in found
            found[place] = output
    return found


def check(generator, prompts, **settings):
    expected = generator.generate(prompts, **settings)
    found = gathered(Refilled(generator).answered(prompts, **settings))
    assert [found[place] for place in range(len(prompts))] == expected
    return expected


@pytest.mark.parametrize("kind", ["t5", "windows"])
def test_any_search_says_the_same(kind):
    prompts = prompts_of(37)
    for search in (*SEARCHES, Search(num_beams=2)):
        seeds = [7 * place for place in range(len(prompts))]
        outputs = check(make(kind, search), prompts, seeds=seeds)
    assert len({output.tokens for output in outputs}) > 2


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 23])
def test_however_many_prompts_there_are(count):
    check(make(), prompts_of(count))
    check(make(), prompts_of(count, longest=2))  # of the shorter length alone


def test_a_smaller_limit_holds():
    outputs = check(make(), prompts_of(37), max_new_tokens=3)
    assert {output.cut for output in outputs} == {True, False}
    with pytest.raises(ValueError, match="max_new_tokens=99: expected 1 to"):
        Refilled(make()).generate(prompts_of(37), max_new_tokens=99)


def test_many_prompts_are_answered_in_rows_and_few_in_batches(monkeypatch):
    generator, rows = make(), []
    read = Programs.read
    monkeypatch.setattr(
        Programs, "read", lambda *given, **named: rows.append(given) or read(*given, **named)
    )
    for count, mismatched in ((31, False), (32, False), (32, True)):
        rows.clear()
        prompts, settings = prompts_of(count), {"mismatched": mismatched, "description": "answers"}
        found = Refilled(generator).generate(prompts, **settings)
        assert found == generator.generate(prompts, mismatched=mismatched)
        assert bool(rows) == (count == 32 and not mismatched)


class Silent(Numbers):
    """It knows nothing of some texts, and has no tokens around them."""

    def encode_prompts(self, texts):
        return [super(Silent, self).encode_prompts([text])[0] if text else [] for text in texts]


def test_a_prompt_without_tokens_is_answered():
    prompts = prompts_of(37)
    prompts[5] = prompts[20] = ""
    generator = Generator(
        *system_of("t5"), Silent(), Silent(), prompt_lengths=(3, 6), max_new_tokens=NEW,
        batch_size=8,
    )  # fmt: skip
    check(generator, prompts)
    assert len(Refilled(generator).generate(prompts)) == 37


@pytest.mark.parametrize("other", ["tensor", "sequence"])
def test_on_a_mesh_of_devices(other):
    mesh = sharding.make_mesh({"data": 2, other: 2}, jax.devices()[:4])
    alone = gathered(Refilled(make(prompt_lengths=(4, 8))).answered(prompts_of(21)))
    found = check(make(mesh=mesh, prompt_lengths=(4, 8)), prompts_of(21))
    assert found == [alone[place] for place in range(21)]


def test_parts_have_every_prompt_once():
    prompts = prompts_of(29)
    refilled = Refilled(make())
    expected = gathered(refilled.answered(prompts))
    parts = [gathered(refilled.answered(prompts, part=(i, 3))) for i in range(3)]
    assert min(map(len, parts)) >= 8
    assert {k: v for part in parts for k, v in part.items()} == expected
    assert sum(map(len, parts)) == len(prompts)


def test_rows_do_not_wait_for_the_longest_response(monkeypatch):
    generator, prompts, steps = make(max_new_tokens=40), prompts_of(160), []
    advance = Programs.advance

    def counted(*arguments):
        slots, said = advance(*arguments)
        steps.append(int(said.steps))
        return slots, said

    lengths = [output.tokens for output in check(generator, prompts)]
    monkeypatch.setattr(Programs, "advance", counted)
    gathered(Refilled(generator).answered(prompts))
    assert len(set(lengths)) > 5
    # A batch takes as many steps as its longest response has tokens.
    in_batches = sum(
        max(output.tokens for output in outputs) for _, outputs in generator.answered(prompts)
    )
    assert sum(lengths) / 8 <= sum(steps) < 0.85 * in_batches
