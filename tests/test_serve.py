"""The HTTP server, as the official client and others see it: the same answers as `generate`."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
import server

import l2s_jax
from l2s_jax.settings.search import Search

PROMPTS = ["abc bca", "cab 22", "abba abc", "1", "dabc 333 bcad"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return server.write_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def running(models):
    with server.serving(models[0]) as started:
        yield started


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=f"{running.address}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def generate(models):
    model = l2s_jax.load(models[0], batch_size=1)
    return model.generate


def expected(output):
    return output.text, "length" if output.cut else "stop", output.tokens


def test_completions_are_what_generate_gives(client, generate):
    found = client.completions.create(model="l2s", prompt=PROMPTS)
    outputs = generate(PROMPTS)
    for choice, output in zip(found.choices, outputs, strict=True):
        assert (choice.text, choice.finish_reason) == expected(output)[:2]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3, 4]
    assert found.usage.completion_tokens == sum(output.tokens for output in outputs)
    assert len({output.text for output in outputs}) > 2


@pytest.mark.parametrize(
    ("asked", "extra", "search"),
    [
        ({"temperature": 0.9, "top_p": 0.8}, {}, Search(temperature=0.9, top_p=0.8)),
        (
            {"temperature": 1.5},
            {"top_k": 4, "min_p": 0.1},
            Search(temperature=1.5, top_k=4, min_p=0.1),
        ),
        ({}, {"repetition_penalty": 2.0}, Search(repetition_penalty=2.0)),
        (
            {},
            {"min_tokens": 9, "no_repeat_ngram_size": 3},
            Search(min_new_tokens=9, no_repeat_ngram_size=3),
        ),
        ({"stop": ["b", "1"]}, {}, Search(stop=("b", "1"))),
        ({"temperature": 0, "top_p": 0.5}, {}, Search()),
    ],
)
def test_settings_and_seeds_are_those_of_generate(client, generate, asked, extra, search):
    seeds = [2**32 - 2, 2**32 - 1, 0, 1]
    found = client.completions.create(
        model="l2s", prompt=PROMPTS[:2], n=2, seed=seeds[0], max_tokens=7, extra_body=extra, **asked
    )
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    outputs = generate(prompts, search=search, seeds=seeds, max_new_tokens=7)
    for choice, output in zip(found.choices, outputs, strict=True):
        assert (choice.text, choice.finish_reason) == expected(output)[:2]


def test_a_stream_is_the_text_in_pieces(client, generate):
    search = {"temperature": 1.2, "seed": 5}
    outputs = generate(PROMPTS[:1] * 3, search=Search(temperature=1.2), seeds=[5, 6, 7])
    events = list(
        client.completions.create(
            model="l2s",
            prompt=PROMPTS[0],
            n=3,
            stream=True,
            stream_options={"include_usage": True},
            **search,
        )
    )
    *events, last = events
    assert last.choices == [] and last.usage.completion_tokens == sum(o.tokens for o in outputs)
    for index, output in enumerate(outputs):
        own = [e.choices[0] for e in events if e.choices[0].index == index]
        assert ("".join(e.text for e in own), own[-1].finish_reason) == expected(output)[:2]
        assert [e.finish_reason for e in own[:-1]] == [None] * (len(own) - 1)
    assert len(events) > 3


def test_events_are_lines_that_end_with_done(running):
    body = {"model": "l2s", "prompt": "abc", "stream": True}
    found = httpx.post(f"{running.address}/v1/completions", json=body)
    assert found.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = found.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    for event in events:
        assert "usage" not in json.loads(event.removeprefix("data: "))


def test_token_ids_are_a_prompt(client, models):
    tokenizer = l2s_jax.load(models[0]).prompt_tokenizer
    ids = tokenizer.encode_prompts(PROMPTS)
    texts = [
        choice.text for choice in client.completions.create(model="l2s", prompt=PROMPTS).choices
    ]
    found = client.completions.create(model="l2s", prompt=ids)
    assert [choice.text for choice in found.choices] == texts
    (one,) = client.completions.create(model="l2s", prompt=ids[1]).choices
    assert one.text == texts[1]


def test_logprobs_are_of_each_token(client):
    asked = {"model": "l2s", "prompt": PROMPTS[0], "temperature": 1.0, "seed": 3}
    plain = client.completions.create(**asked)
    found = client.completions.create(**asked, logprobs=2)
    assert found.choices[0].text == plain.choices[0].text
    scores = found.choices[0].logprobs
    assert len(scores.tokens) == found.usage.completion_tokens == len(scores.text_offset)
    for token, log_p, top in zip(
        scores.tokens, scores.token_logprobs, scores.top_logprobs, strict=True
    ):
        assert top[token] == log_p <= 0 and 2 <= len(top) <= 3
    streamed = client.completions.create(**asked, logprobs=2, stream=True)
    events = [event.choices[0].logprobs for event in streamed]
    assert [token for event in events for token in event.tokens] == scores.tokens
    assert [offset for event in events for offset in event.text_offset] == scores.text_offset


def test_models_and_health(client, running):
    (card,) = client.models.list().data
    assert card == client.models.retrieve("l2s")
    assert (card.id, card.max_prompt_tokens) == ("l2s", server.PROMPT_TOKENS)
    with pytest.raises(openai.NotFoundError, match="no such model; expected one of l2s"):
        client.models.retrieve("gpt-4")
    assert httpx.get(f"{running.address}/health").json() == {"status": "ready"}


def test_a_tokenizer_without_a_template_takes_no_chat(client):
    with pytest.raises(openai.BadRequestError, match="its tokenizer has no chat template"):
        client.chat.completions.create(model="l2s", messages=[{"role": "user", "content": "abc"}])
