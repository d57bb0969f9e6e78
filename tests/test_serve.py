"""The HTTP server, as the official client and others see it: the same answers as `generate`."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import httpx
import jax
import numpy as np
import openai
import pytest
import server
from prometheus_client.parser import text_string_to_metric_families

import l2s_jax
from l2s_jax.cluster.sharding import one_device
from l2s_jax.serve.asking import chat_prompts
from l2s_jax.serve.errors import Refused
from l2s_jax.serve.models import Models, load_models
from l2s_jax.serve.protocol import ChatAsked
from l2s_jax.serving import bundle
from l2s_jax.serving.generator import Generator
from l2s_jax.serving.loading import load_alone
from l2s_jax.settings.search import Search
from l2s_jax.tokenizers import for_chat
from l2s_jax.tokenizers.cut import CutTokenizer, essential
from l2s_jax.tokenizers.tokenizer import load_tokenizer

PROMPTS = ["abc bca", "cab 22", "abba abc", "1", "dabc 333 bcad"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return server.write_model(root, server.chat_tokenizer(), seed=5, prompt_lengths=[40])


@pytest.fixture(scope="module")
def running(models):
    flags = ("--slots=1", "--models=l2s,llm,exact,slm", f"--slm={models[1]}")
    with server.serving(models[0], *flags) as started:
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
            {"frequency_penalty": 1.5, "presence_penalty": -0.5},
            {},
            Search(frequency_penalty=1.5, presence_penalty=-0.5),
        ),
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
    assert scores.text_offset[0] == 0 and max(scores.text_offset) <= len(plain.choices[0].text)


def test_models_and_health(client, running):
    cards = client.models.list().data
    assert [card.id for card in cards] == running.models == ["l2s", "llm", "exact", "slm"]
    assert cards[0] == client.models.retrieve("l2s")
    assert (cards[0].max_prompt_tokens, cards[0].max_new_tokens) == (40, server.NEW_TOKENS)
    with pytest.raises(openai.NotFoundError, match="no such model; expected one of l2s, llm"):
        client.models.retrieve("gpt-4")
    assert httpx.get(f"{running.address}/health").json() == {"status": "ready"}


def texts_of(client, model, **asked):
    found = client.completions.create(model=model, prompt=PROMPTS, **asked)
    return [choice.text for choice in found.choices]


def test_each_name_is_a_system_of_its_own(client, models):
    exact = l2s_jax.load(models[0], exact=True, batch_size=1)
    placed = {"weights": "float", "mesh": one_device()}
    loaded = load_alone("slm", models[1], exact.prompt_tokenizer, dtype=np.float32, **placed)
    slm = Generator(
        *loaded,
        exact.prompt_tokenizer,
        exact.prompt_tokenizer,
        prompt_lengths=[40],
        max_new_tokens=server.NEW_TOKENS,
        batch_size=1,
    )
    of_llm = [output.text for output in exact.generate(PROMPTS)]
    of_slm = [output.text for output in slm.generate(PROMPTS)]
    assert texts_of(client, "llm") == texts_of(client, "exact") == of_llm
    assert texts_of(client, "slm") == of_slm
    assert of_llm != of_slm


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_an_llm_is_held_once(models, weights):
    made = load_models(Models(models[0], ("l2s", "llm", "exact"), settings={"weights": weights}))
    held = {id(leaf) for leaf in jax.tree.leaves(made["llm"].trained)}
    own = [*jax.tree.leaves(made["l2s"].frozen), *jax.tree.leaves(made["exact"].frozen)]
    assert own and all(id(leaf) in held for leaf in own)
    l2s, exact = (jax.tree.leaves(made[name].trained) for name in ("l2s", "exact"))
    assert all(one is other for one, other in zip(l2s, exact, strict=True))
    alone = l2s_jax.load(models[0], weights=weights)
    assert made["l2s"].generate(PROMPTS) == alone.generate(PROMPTS)


def test_what_drafts_is_cut_once(tmp_path):
    directory, _ = server.write_model(tmp_path)
    whole = load_tokenizer(directory)
    kept = essential(whole)
    CutTokenizer(whole, kept).save(directory)
    made = load_models(Models(directory, ("l2s", "exact")))
    head = made["exact"].trained["slm"]["head"]["kernel"]
    assert head.shape[1] == len(kept)
    assert head is made["l2s"].trained["slm"]["head"]["kernel"]


@pytest.mark.parametrize(
    ("names", "search", "line"),
    [
        (("l2s",), {"exact": True}, "exact=true with --models=l2s: expected `exact` among"),
        (("l2s", "exact"), {"exact": False}, "exact=false with --models=l2s,exact"),
        (("l2s",), {"draft_tokens": 6}, "draft_tokens=6 with exact=False"),
        (("exact",), {"draft_tolerance": 1.0}, "draft_tolerance=1 with `exact`"),
    ],
)
def test_a_search_that_would_not_be_looked_at_is_refused(names, search, line, models):
    with pytest.raises(ValueError, match=re.escape(line)):
        load_models(Models(models[0], names, search=search))


def test_a_wrong_slm_is_seen_before_anything_is_read(models, monkeypatch):
    monkeypatch.setattr(bundle, "load", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ValueError, match="nowhere"):
        load_models(Models(models[0], ("l2s", "slm"), slm="./nowhere"))


CHAT = [
    {"role": "system", "content": "abc"},
    {"role": "user", "content": [{"type": "text", "text": "ca"}, {"type": "text", "text": "b"}]},
]


def test_a_chat_is_written_by_the_template(client, models):
    prompt = "system: abc\nuser: cab\nassistant:"
    search = {"model": "l2s", "temperature": 1.2, "seed": 8, "n": 2, "stop": ["33"]}
    plain = client.completions.create(prompt=prompt, **search)
    asked = {"messages": CHAT, "max_completion_tokens": server.NEW_TOKENS, **search}
    found = client.chat.completions.create(**asked)
    for choice, other in zip(found.choices, plain.choices, strict=True):
        assert (choice.message.role, choice.message.content) == ("assistant", other.text)
        assert choice.finish_reason == other.finish_reason
    assert found.usage == plain.usage
    events = list(client.chat.completions.create(stream=True, **asked))
    for index, choice in enumerate(plain.choices):
        own = [e.choices[0] for e in events if e.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(e.delta.content for e in own) == choice.text
        assert own[-1].finish_reason == choice.finish_reason


def test_logprobs_of_a_chat(client):
    asked = {"model": "l2s", "messages": CHAT[1:], "logprobs": True}
    found = client.chat.completions.create(**asked, top_logprobs=3)
    scores = found.choices[0].logprobs.content
    assert len(scores) == found.usage.completion_tokens
    for score in scores:
        # Greedy decoding takes the likeliest.
        best = score.top_logprobs[0]
        assert (score.token, score.logprob) == (best.token, best.logprob)
        assert len(score.top_logprobs) == 3
    assert not client.chat.completions.create(**asked).choices[0].logprobs.content[0].top_logprobs


def test_a_model_that_was_trained_with_a_chat_takes_what_the_user_says(models):
    generator = l2s_jax.load(models[0])
    generator.prompt_tokenizer = for_chat(generator.prompt_tokenizer, "abc")
    user = {"role": "user", "content": "cab"}
    asked = ChatAsked.model_validate({"model": "l2s", "messages": [user]})
    assert chat_prompts(asked, generator) == generator.prompt_tokenizer.encode_prompts(["cab"])
    asked = ChatAsked.model_validate({"model": "l2s", "messages": [CHAT[0], user]})
    with pytest.raises(Refused, match="expected one message, of role 'user'"):
        chat_prompts(asked, generator)


def figures(running):
    """{name: {labels: value}} of all models."""
    text = httpx.get(f"{running.address}/metrics").text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(v for k, v in sorted(sample.labels.items()) if k != "le")
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def test_metrics_count_what_was_answered(client, running):
    def since(name, *labels):
        return after.get(name, {}).get(labels, 0) - before.get(name, {}).get(labels, 0)

    before = figures(running)
    found = client.completions.create(
        model="exact",
        prompt=PROMPTS,
        n=2,
        temperature=1.0,
        seed=1,
        extra_body={"min_tokens": 2},
    )
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt", prompt="abc")
    after = figures(running)
    assert since("l2s_requests_total", "completions", "exact", "200") == 1
    assert since("l2s_requests_total", "completions", "", "404") == 1
    assert since("l2s_prompt_tokens_total", "exact") == found.usage.prompt_tokens
    assert since("l2s_generated_tokens_total", "exact") == found.usage.completion_tokens
    drafted = since("l2s_drafted_tokens_total", "exact")
    assert 0 < since("l2s_accepted_tokens_total", "exact") <= drafted
    for name in ("time_to_first_token", "time_per_output_token", "response"):
        assert since(f"l2s_{name}_seconds_count", "exact") == 10
        assert since(f"l2s_{name}_seconds_sum", "exact") > 0
        assert since(f"l2s_{name}_seconds_count", "l2s") == 0
    assert set(after["l2s_running"].values()) == set(after["l2s_waiting"].values()) == {0}
    assert set(after["l2s_batch_size"]) == {("l2s",), ("llm",), ("exact",), ("slm",)}


def test_schemathesis_finds_nothing(running, tmp_path):
    checks = ("not_a_server_error", "status_code_conformance", "content_type_conformance")
    checks += ("response_schema_conformance", "negative_data_rejection", "unsupported_method")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{running.address}/openapi.json"]
    command += [f"--checks={','.join(checks)}", "--max-examples=10", "--seed=1", "--no-color"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout + found.stderr
