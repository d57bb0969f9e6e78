"""Prompts that are too long lose text of their fields, and nothing of the template around them."""

from __future__ import annotations

import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from l2s_jax.data.examples import TokenizedExamples
from l2s_jax.data.fitting import fit, shortened
from l2s_jax.data.table import Example
from l2s_jax.data.tasks import load_task
from l2s_jax.data.templates import Span, Template, fields_of, spans_of
from l2s_jax.data.text import text_list


class Characters:
    """A token for each character of a text; of a chat, within brackets that are tokens too."""

    vocab_size, pad_id, eos_id, end_ids = 1 << 21, 0, 1, (1,)
    fingerprint = identity = "characters"

    def __init__(self, is_chat=False):
        self.is_chat = is_chat

    def encode_prompts(self, texts):
        frames = ("<", ">") if self.is_chat else ("", "")
        return [[*map(ord, f"{frames[0]}{text}{frames[1]}"), self.eos_id] for text in texts]

    def encode_responses(self, texts):
        return [[*map(ord, text), self.eos_id] for text in texts]


def text_of(ids):
    return "".join(map(chr, ids[:-1])) if ids[-1] == 1 else "".join(map(chr, ids))


def render(template, values, sides):
    return Template(template, sides, "key").render(values)


WORDS = st.text("ab c\nd", max_size=60)
SIDES = st.sampled_from(["start", "end"])


@settings(deadline=None, max_examples=200)
@given(a=WORDS, b=WORDS, c=WORDS, sides=st.tuples(SIDES, SIDES), most=st.integers(20, 90))
def test_the_template_stays_and_fields_lose_as_little_as_they_must(a, b, c, sides, most):
    template = "[{a}|{kept}|{b}]"
    values = {"a": a, "b": b, "kept": c[:10]}
    prompt = render(template, values, dict(zip("ab", sides, strict=True)))
    fitted = fit([prompt], Characters(is_chat=True), most)
    (ids,) = fitted.ids
    whole = f"<{prompt}>"
    assert len(ids) <= most
    if len(whole) + 1 <= most:
        assert text_of(ids) == whole and not fitted.cut and not fitted.losses
        return
    assert (fitted.cut, fitted.hopeless) == (1, 0)
    text = text_of(ids)
    assert text.startswith("<[") and text.endswith("]>")
    first, kept, second = text[2:-2].split("|")
    assert kept == values["kept"]
    for value, found, side in ((a, first, sides[0]), (b, second, sides[1])):
        assert value.endswith(found) if side == "start" else value.startswith(found)
    # Nobody loses text while another has more, but for the word that is cut off.
    if len(first) < len(a) and len(second) < len(b):
        assert abs(len(first) - len(second)) <= 20 + 4
    assert most - len(ids) <= 2 * (20 + 4)


def test_a_long_field_is_cut_between_words_on_its_side():
    prompt = render("{a} => ", {"a": "one two three four"}, {"a": "end"})
    assert shortened(prompt, 9) == "one two => "
    assert shortened(render("{a} => ", {"a": "one two three four"}, {"a": "start"}), 9) == (
        "four => "
    )
    assert shortened(prompt, 30) == prompt
    assert shortened("x" * 30, 4) == "xxxx"


@pytest.mark.parametrize("text", ["plain", "größer \N{SNOWMAN}"])
def test_a_prompt_on_its_way_to_a_generator_knows_its_fields(text):
    prompt = render("say {a}!", {"a": text}, {"a": "start"})
    (taken,) = text_list([prompt], "prompts")
    assert taken == prompt and spans_of(taken) == prompt.spans


def test_a_text_alone_loses_its_last_tokens_as_ever():
    fitted = fit(["3 4 5 6 7 8 9", "3 4"], small.NumberTokenizer(), 4)
    assert fitted.ids == [[3, 4, 5, 1], [3, 4, 1]]
    assert (fitted.cut, fitted.hopeless, list(fitted.losses)) == (1, 0, ["text"])


def test_what_no_cut_helps_is_told():
    prompt = render("a long template {a}", {"a": "text"}, {"a": "end"})
    fitted = fit([prompt], Characters(is_chat=True), 8)
    assert fitted.ids == [[*map(ord, "<a long"), 1]] and fitted.hopeless == 1
    data = TokenizedExamples(
        [Example(prompt, "b", ())],
        prompt_tokenizer=Characters(is_chat=True),
        response_tokenizer=Characters(),
        max_prompt_tokens=8,
        max_response_tokens=8,
    )
    first, second = data.loss.describe(8)
    assert "1 of 1 prompts were longer than 8 tokens and lost text: 100% of a" in first
    assert "even without their fields" in second


def task(**changes):
    config = {"name": "t", "source": "jsonl", "splits": {"test": "f"}, "response": "y"}
    return load_task(ConfigDict(config | changes))


def test_a_task_says_where_its_fields_lie():
    record = {"a": "one", "b": "two", "y": "z"}
    prompt = task(prompt="{b}: {a}!").render_prompt(record)
    assert prompt == "two: one!" and fields_of(prompt) == "two\none"
    assert [span.field for span in prompt.spans] == ["b", "a"]
    prompt = task(prompt="{b}: {a}!", truncate={"a": "start"}).render_prompt(record)
    assert prompt.spans == (Span("a", 5, 8, "start"),)
    chat = task(chat={"user": "say {a}", "system": "be kind"})
    assert chat.render_prompt(record) == "say one" and chat.prompt_fields == ("a",)
    with pytest.raises(ValueError, match=r"truncate has 'c'.*\(it has: b, a\)"):
        task(prompt="{b}: {a}!", truncate={"c": "end"})
    with pytest.raises(ValueError, match=r"config\.task\.prompt is not set"):
        task()


@pytest.mark.parametrize("keep", [True, False])
def test_responses_that_were_cut_teach_no_end(keep):
    examples = [Example("p", "abc", ()), Example("q", "abc", (), True), Example("r", "abcdef", ())]
    data = TokenizedExamples(
        examples,
        prompt_tokenizer=Characters(),
        response_tokenizer=Characters(),
        max_prompt_tokens=4,
        max_response_tokens=4,
        keep_cut=keep,
    )
    assert len(data) == (3 if keep else 1)
    found = [(text_of(data[i][0].tolist()), data[i][1].tolist()) for i in range(len(data))]
    whole = ("p", [*map(ord, "abc"), 1])
    cut = [("q", [*map(ord, "abc")]), ("r", [*map(ord, "abcd")])]
    assert found == [whole, *(cut if keep else [])]
    (line,) = data.loss.describe(4)
    assert line.startswith("2 of 3 responses were cut, and ")
    assert line.endswith("teach no end" if keep else "are left out")
    assert data.loss.fields == {}
