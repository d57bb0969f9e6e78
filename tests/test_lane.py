"""Requests that come and go are answered as if each were alone."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random

import jax
import pytest
import small
from test_exact import VOCABULARY, pair

from l2s_jax.cluster import sharding
from l2s_jax.models.systems import LanguageModel
from l2s_jax.serving import lane as lanes
from l2s_jax.serving.generator import Generator
from l2s_jax.serving.lane import Lane, NotRead
from l2s_jax.serving.request import Request
from l2s_jax.settings.search import Search

NEW = 11
SEARCHES = [
    Search(),
    Search(temperature=0.7),
    Search(temperature=1.3, top_k=3),
    Search(temperature=1.0, top_p=0.7, min_new_tokens=4),
    Search(temperature=2.0, top_k=6, top_p=0.9, min_p=0.1),
    Search(repetition_penalty=1.7),
    Search(frequency_penalty=0.8),
    Search(temperature=0.9, frequency_penalty=-0.4, presence_penalty=1.5),
    Search(no_repeat_ngram_size=2, min_new_tokens=6),
    Search(temperature=1.0, no_repeat_ngram_size=3, repetition_penalty=1.2, stop=("5", "3 3")),
]
KINDS = ("t5", "windows", "exact", "dial")
DRAFTED = {
    "exact": Search(exact=True, draft_tokens=3),
    "dial": Search(exact=True, draft_tokens=3, draft_tolerance=0.6),
}


class Numbers(small.NumberTokenizer):
    vocab_size = VOCABULARY


@functools.cache
def system_of(kind):
    """An L2S of T5s, exact decoding by them or nearly so, its LLM, or an LLM with windows."""
    exact, trained, whole = pair("windows", "llama", "add") if kind == "windows" else pair()
    if kind in ("windows", "llm"):
        return LanguageModel("llm", exact.llm.config), {"llm": whole}, {}
    if kind in DRAFTED:
        return exact, trained, whole
    return exact.l2s, trained, small.encoder_only(whole)


def generator(kind, prompt_lengths, batch_size, **others):
    return Generator(
        *system_of(kind),
        Numbers(),
        Numbers(),
        prompt_lengths=prompt_lengths,
        max_new_tokens=NEW,
        batch_size=batch_size,
        search=DRAFTED.get(kind, Search()),
        **others,
    )


@functools.cache
def lane(kind, **axes):
    others = {"mesh": sharding.make_mesh(axes, jax.devices()[:4])} if axes else {}
    made = Lane(generator(kind, (3, 6), 4, **others), 4)
    made.warm_up()
    return made


def with_dial(search):
    """A search by the dial's tolerance, which no request can name."""
    dial = DRAFTED["dial"]
    drafts = {name: getattr(dial, name) for name in ("exact", "draft_tokens", "draft_tolerance")}
    return dataclasses.replace(search, **drafts)


def requests(kind, count, seed):
    """(what is asked, what `generate` says to it)."""
    chance = random.Random(seed)
    asked = [
        (
            " ".join(str(chance.randrange(2, VOCABULARY)) for _ in range(chance.randrange(1, 6))),
            chance.choice(SEARCHES),
            chance.choice([1, 4, NEW]),
            chance.randrange(2**32),
        )
        for _ in range(count)
    ]
    expected = {}
    # What exact decoding says is the LLM's.
    one_by_one = generator("llm" if kind == "exact" else kind, (6,), 1)
    for search, limit in itertools.product(SEARCHES, (1, 4, NEW)):
        own = [i for i, one in enumerate(asked) if one[1:3] == (search, limit)]
        said = one_by_one.generate(
            [asked[i][0] for i in own],
            search=with_dial(search) if kind == "dial" else search,
            max_new_tokens=limit,
            seeds=[asked[i][3] for i in own],
        )
        expected.update(zip(own, said, strict=True))
    return asked, [expected[i] for i in range(count)]


def submit(lane, prompt, search, limit, seed, **others):
    """The pieces that will be there."""
    pieces = []
    (ids,) = lane.generator.prompt_tokenizer.encode_prompts([prompt])
    job = lane.submit(Request(ids, search, limit, seed, **others), pieces.append)
    return job, pieces


@pytest.mark.parametrize("kind", KINDS)
def test_requests_are_answered_as_if_each_were_alone(kind):
    check_answers(lane(kind), *requests(kind, 60, seed=1))


def test_a_dial_that_is_turned_changes_what_is_said():
    _, turned = requests("dial", 60, seed=1)
    _, exact = requests("exact", 60, seed=1)
    same = [one.text == other.text for one, other in zip(turned, exact, strict=True)]
    assert 0 < sum(same) < len(same)


def test_requests_share_a_mesh_of_devices_and_compile_nothing_there(compilations):
    asked, expected = requests("t5", 30, seed=4)
    made = lane("t5", data=2, tensor=2)
    compilations.clear()
    check_answers(made, asked, expected)
    assert not compilations


def check_answers(made, asked, expected):
    answers, left = {}, list(range(len(asked)))
    chance = random.Random(2)
    chance.shuffle(left)
    while left or made.busy:
        for _ in range(min(len(left), chance.choice([0, 0, 1, 3, 9]))):
            place = left.pop()
            answers[place] = submit(made, *asked[place])[1]
        made.turn(1.0)
    for place, output in enumerate(expected):
        text = "".join(piece.text for piece in answers[place])
        end = answers[place][-1].end
        assert (text, end) == (output.text, "length" if output.cut else "stop"), asked[place]
        assert [bool(piece.end) for piece in answers[place]][:-1].count(True) == 0


@pytest.mark.parametrize("kind", ["t5", "exact"])
def test_what_programs_take_is_known_when_they_are_warm(kind):
    programs = lane(kind)._programs
    assert programs.step_s.keys() == {1, 2, 4}
    assert programs.read_s.keys() == set(itertools.product((1, 2, 4), (3, 6)))
    assert min([*programs.step_s.values(), *programs.read_s.values()]) > 0


def test_no_mix_of_requests_compiles_anything(compilations):
    asked, _ = requests("t5", 20, seed=3)
    made = lane("t5")
    compilations.clear()
    for one in asked:
        submit(made, *one)
        made.turn(1.0)
    while made.busy:
        made.turn(1.0)
    assert not compilations


def one_step_a_turn(monkeypatch):
    for name in ("_CHUNK_S", "_FIRST_CHUNK_S"):
        monkeypatch.setattr(lanes, name, 0.0)


def test_who_goes_frees_a_slot_within_a_chunk(monkeypatch):
    made = lane("t5")
    one_step_a_turn(monkeypatch)
    job, pieces = submit(made, "2 3", Search(min_new_tokens=NEW), NEW, 0)
    made.turn(1.0)
    job.cancel()
    made.turn(1.0)
    made.turn(1.0)
    assert not made.busy
    assert pieces[-1].end == "cancelled"
    _, others = submit(made, "2 3", Search(min_new_tokens=NEW), NEW, 0, time_s=0.0)
    made.turn(1.0)
    assert others[-1].end == "time" and not made.busy


def test_a_step_that_fails_ends_those_concerned_and_no_others(monkeypatch):
    made = lane("t5")
    one_step_a_turn(monkeypatch)
    _, running = submit(made, "2 3", Search(min_new_tokens=NEW), NEW, 0)
    made.turn(1.0)
    _, waiting = submit(made, "4 5", Search(min_new_tokens=NEW), NEW, 0)

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    made._owed_s = 0.0
    with monkeypatch.context() as patched:
        patched.setattr(made._programs, "read", fails)
        with pytest.raises(NotRead):
            made.turn(1.0)
    assert waiting[-1].end == "error"
    assert not any(piece.end for piece in running)
    while made.busy:
        made.turn(1.0)
    for step in ("advance", "insert"):
        _, running = submit(made, "2 3", Search(min_new_tokens=NEW), NEW, 0)
        made.turn(1.0)
        _, joining = submit(made, "4 5", Search(min_new_tokens=NEW), NEW, 0)
        made._owed_s = 0.0
        with monkeypatch.context() as patched:
            patched.setattr(made._programs, step, fails)
            with pytest.raises(RuntimeError):
                made.turn(1.0)
        made.abandon("the model failed at a step")
        assert running[-1].end == joining[-1].end == "error"
        assert not made.busy
    _, after = submit(made, "2 3", Search(min_new_tokens=NEW), NEW, 0)
    while made.busy:
        made.turn(1.0)
    assert after[-1].end == "length"


@pytest.mark.parametrize("ends", ["a step fails", "the server ends"])
def test_a_response_that_is_there_is_delivered_whatever_ends_the_others(ends, monkeypatch):
    made = lane("t5")
    one_step_a_turn(monkeypatch)
    _, expected = submit(made, "2 3", Search(min_new_tokens=NEW), 2, 0)
    while made.busy:
        made.turn(1.0)
    _, short = submit(made, "2 3", Search(min_new_tokens=NEW), 2, 0)
    _, long = submit(made, "4 5", Search(min_new_tokens=NEW), NEW, 0)
    while made.running != 1:
        made.turn(1.0)
    assert not short[-1:] or not short[-1].end
    if ends == "a step fails":

        def fails(*_, **__):
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patched:
            patched.setattr(made._programs, "advance", fails)
            with pytest.raises(RuntimeError):
                made.turn(1.0)
        made.abandon("the model failed at a step")
        assert long[-1].end == "error"
    else:
        made.end_all("cancelled")
        assert long[-1].end == "cancelled"
        while made.busy:
            made.turn(1.0)
    assert "".join(piece.text for piece in short) == "".join(piece.text for piece in expected)
    assert short[-1].end == "length"


def test_a_response_that_cannot_be_written_ends_alone(monkeypatch):
    made = lane("t5")
    one_step_a_turn(monkeypatch)
    job, broken = submit(made, "2 3", Search(min_new_tokens=NEW), NEW, 0)
    _, other = submit(made, "4 5", Search(min_new_tokens=NEW), NEW, 0)

    def fails(*_, **__):
        raise UnicodeError("no text")

    monkeypatch.setattr(job._text, "extend", fails)
    while made.busy:
        made.turn(1.0)
    assert broken[-1].end == "error" and other[-1].end == "length"
