"""Chats, written by the template of a checkpoint."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers

from l2s_jax.messages import one_line, shown

# What transformers gives a template for the date of today, and the option that stands for it.
TODAY = "strftime_now"


class ChatTemplate:
    """A chat template (Jinja), with values of other names that it looks at.

    Of these, TODAY is the text that it writes as the date of today, which else the clock says.
    """

    def __init__(
        self,
        template: str,
        options: Mapping[str, Any],
        tokenizer: tokenizers.Tokenizer,
        named: Mapping[str, str],
    ):
        """`named`: special tokens by the names that transformers has for them."""
        with quiet():
            from transformers import PreTrainedTokenizerFast
        self._tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
        self._template, self._options = template, dict(options)

    def write(self, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        """A chat, {"role", "content"} each, up to where the answer begins.

        Raises:
          ValueError: the template takes no such messages.
        """
        options = self._options | options
        template = self._template
        if (today := options.pop(TODAY, None)) is not None:
            if not isinstance(today, str):
                raise ValueError(f"options.{TODAY} is {shown(today)}, expected a text")
            # (A line break that follows a block is none of the text.)
            text = json.dumps(today, ensure_ascii=False)
            template = f"{{% macro {TODAY}(format) %}}{{{{ {text} }}}}{{% endmacro %}}\n{template}"
        try:
            return self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
                **options,
            )
        except Exception as error:  # a template may raise anything
            raise ValueError(f"the chat template takes no such prompt: {one_line(error)}") from None

    def check_repeatable(self, messages: Sequence[Mapping[str, str]]) -> None:
        """Raises a ValueError where these messages would be another prompt on another day."""
        if TODAY in self._options or TODAY not in self._template:
            return
        if self.write(messages, **{TODAY: "1"}) != self.write(messages, **{TODAY: "2"}):
            raise ValueError(
                "the chat template writes today's date, with which prompts would change from day "
                f"to day; expected options.{TODAY}, the text to write in its place, such as "
                "'26 Jul 2024'"
            )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from saying at its import that there is no PyTorch, which nobody needs."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
