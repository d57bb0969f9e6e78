"""Chat templates that ask for the date of today: prompts are the same on every day, or refused."""

from __future__ import annotations

import datetime
import json

import pytest
import transformers
from test_text_hf import train

from l2s_jax.tokenizers import for_chat, load_tokenizer

SAID = "{{ messages[0].content }}"
# As Llama 3.2, gpt-oss and Mistral Small ask for it.
OPTIONAL = (
    "\n  {%- if not date_string is defined %}{% if strftime_now is defined %}"
    '{% set date_string = strftime_now("%d %b %Y") %}{% else %}{% set date_string = "?" %}'
    "{% endif %}{% endif %}{{ 'fox ' + date_string }}" + SAID
)
IN_A_MACRO = (
    '{%- macro system() -%}{{- "fox " + strftime_now("%Y-%m-%d") + "\n" }}{%- endmacro -%}'
    "{{ system() }}" + SAID
)
SET = '\n{% set today = strftime_now("%Y-%m-%d") %} fox {{ today }}' + SAID
TEMPLATES = {"optional": OPTIONAL, "in_a_macro": IN_A_MACRO, "set": SET}


@pytest.fixture(params=TEMPLATES)
def directory(request, tmp_path):
    """A checkpoint with such a template."""
    made, special = train("llama")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)
    fast.chat_template = TEMPLATES[request.param]
    fast.save_pretrained(str(tmp_path / "model"))
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "llama"}))
    return tmp_path / "model"


def on(monkeypatch, year):
    """Has transformers' clock show a day of that year."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(year, 7, 26, tzinfo=tz)

    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Clock)


def text_of(tokenizer, content="dog"):
    (ids,) = tokenizer.encode_prompts([content])
    return tokenizer.decode(ids)


def test_a_date_that_nothing_fixes_is_refused(directory):
    with pytest.raises(ValueError, match="writes today's date") as error:
        for_chat(load_tokenizer(str(directory)), "")
    assert "expected options.strftime_now" in str(error.value)
    assert "\n" not in str(error.value)
    # A run that was made with such prompts can still be looked at.
    assert "fox" in text_of(for_chat(load_tokenizer(str(directory)), "", repeatable=False))


def test_a_date_that_is_set_is_the_same_on_every_day(directory, monkeypatch, tmp_path):
    plain = load_tokenizer(str(directory))
    date = '"26" \\ Jul 2024 {{ % }} é🙂'
    on(monkeypatch, 2031)
    chat = for_chat(plain, "", {"strftime_now": date})
    written = text_of(chat)
    assert date in written and "2031" not in written
    # All around it is as transformers writes it.
    on(monkeypatch, 2040)
    theirs = transformers.AutoTokenizer.from_pretrained(str(directory))
    said = [{"role": "user", "content": "dog"}]
    whole = theirs.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    for format in ("%d %b %Y", "%Y-%m-%d"):
        whole = whole.replace(datetime.date(2040, 7, 26).strftime(format), date)
    assert written == whole
    chat.save(str(tmp_path / "copy"))
    again = load_tokenizer(str(tmp_path / "copy"))
    assert text_of(again) == written and again.identity == chat.identity
    assert for_chat(plain, "", {"strftime_now": "1"}).identity != chat.identity


def test_a_date_that_is_no_text_is_refused(directory):
    with pytest.raises(ValueError, match=r"options\.strftime_now is 2024, expected a text"):
        for_chat(load_tokenizer(str(directory)), "", {"strftime_now": 2024})


def test_an_option_of_the_template_fixes_it_too(directory, monkeypatch):
    plain, options = load_tokenizer(str(directory)), {"date_string": "1 2"}
    if "date_string" not in (directory / "chat_template.jinja").read_text():
        with pytest.raises(ValueError, match="writes today's date"):
            for_chat(plain, "", options)
        return
    on(monkeypatch, 2031)
    assert text_of(for_chat(plain, "", options)) == "fox 1 2dog"


def test_a_chat_that_nothing_was_trained_on_has_the_date_of_the_day(directory, monkeypatch):
    plain = load_tokenizer(str(directory))
    on(monkeypatch, 2031)
    ids = plain.encode_chat([{"role": "user", "content": "dog"}])
    assert "2031" in plain.decode(ids)
