"""Text in, text out: tokenize, group by length, decode in one compiled program, put in order.

`Generator` does it for a list of prompts; `generate_file` for a file, from a workdir alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from l2s_jax import bundle, convert
from l2s_jax.config import compute_dtype
from l2s_jax.data.batches import TokenizedExamples, evaluation_batches
from l2s_jax.data.tasks import Example, Task, load_task
from l2s_jax.decoding.loop import Decoded, decoding_steps, greedy
from l2s_jax.models.families import with_tokens
from l2s_jax.models.systems import LanguageModel, Params, System
from l2s_jax.text import Tokenizer, load_tokenizer


class Output(NamedTuple):
    """One generated response; `cut` says that max_new_tokens ended it."""

    text: str
    tokens: int
    cut: bool


def decode_cache(
    system: System,
    trained: Params,
    logits: jax.Array,
    cache: Any,
    active: jax.Array,
    *,
    max_new_tokens: int,
    ignore_eos: bool = False,
) -> Decoded:
    """The decoding loop after `prefill`; rows where active bool [B] is false are padding.

    With `ignore_eos`, every row decodes max_new_tokens: what a measurement wants.
    """
    decoder = system.decoder
    return greedy(
        system.step,
        trained,
        logits,
        cache,
        active,
        eos_id=-1 if ignore_eos else decoder.eos_id,
        pad_id=decoder.pad_id,
        max_new_tokens=max_new_tokens,
    )


def decode(
    system: System,
    trained: Params,
    frozen: Params,
    ids: jax.Array,
    mask: jax.Array,
    active: jax.Array,
    *,
    max_new_tokens: int,
    mismatched: bool = False,
    ignore_eos: bool = False,
) -> Decoded:
    """A whole batch, from prompt to response, as one program. Call it through `jitted_decode`.

    ids int32 [B, T], mask bool [B, T], active bool [B] as in `decode_cache`. `mismatched` is the
    control: every row gets the encoded prompt of the row before it.
    """
    hidden = system.encode(trained, frozen, ids, mask)
    if mismatched:
        hidden = jnp.roll(hidden * mask[..., None], 1, axis=0)
    steps = decoding_steps(max_new_tokens)
    logits, cache = system.prefill(trained, frozen, ids, mask, hidden, steps)
    return decode_cache(
        system, trained, logits, cache, active, max_new_tokens=max_new_tokens, ignore_eos=ignore_eos
    )


jitted_decode = jax.jit(
    decode, static_argnames=("system", "max_new_tokens", "mismatched", "ignore_eos")
)


class Generator:
    """Answers prompts with one system. Results do not depend on batch company or padding."""

    def __init__(
        self,
        system: System,
        trained: Params,
        frozen: Params,
        prompt_tokenizer: Tokenizer,
        response_tokenizer: Tokenizer,
        *,
        prompt_lengths: Sequence[int],
        max_new_tokens: int,
        batch_size: int,
    ):
        """`prompt_lengths`: what prompts are padded to, ascending; longer ones are truncated."""
        self.system = system
        self.trained = jax.device_put(trained)
        self.frozen = jax.device_put(frozen)
        self.prompt_tokenizer = prompt_tokenizer
        self.response_tokenizer = response_tokenizer
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self._prompt_lengths = tuple(prompt_lengths)

    def generate(
        self, prompts: Sequence[str], *, description: str = "", mismatched: bool = False
    ) -> list[Output]:
        """One output per prompt, in order; with a `description`, a progress bar on stderr."""
        data = TokenizedExamples(
            [Example(prompt, "", ()) for prompt in prompts],
            prompt_tokenizer=self.prompt_tokenizer,
            response_tokenizer=self.response_tokenizer,
            max_prompt_tokens=self._prompt_lengths[-1],
            max_response_tokens=1,
        )
        batches = evaluation_batches(
            data,
            prompt_name="prompt",
            buckets=tuple((length, i + 1) for i, length in enumerate(self._prompt_lengths)),
            # A batch of one row has no other row to be mismatched with.
            batch_size=max(self.batch_size, 2) if mismatched else self.batch_size,
        )
        outputs: list[Output | None] = [None] * len(prompts)
        with tqdm(
            total=len(prompts), desc=description, disable=not description, file=sys.stderr
        ) as bar:
            for indices, batch in batches:
                decoded = jax.device_get(
                    jitted_decode(
                        self.system,
                        self.trained,
                        self.frozen,
                        batch["prompt_ids"],
                        batch["prompt_mask"],
                        indices >= 0,
                        max_new_tokens=self.max_new_tokens,
                        mismatched=mismatched,
                    )
                )
                self._collect(indices, decoded, outputs)
                bar.update(int(np.sum(indices >= 0)))
        return outputs

    def _collect(self, indices: np.ndarray, decoded: Decoded, outputs: list) -> None:
        for row, index in enumerate(indices):
            if index >= 0:
                length = int(decoded.lengths[row])
                text = self.response_tokenizer.decode(decoded.tokens[row, :length].tolist())
                outputs[index] = Output(text, length, not bool(decoded.finished[row]))


def generation_settings(config: ConfigDict) -> dict[str, Any]:
    """What a config says of decoding, as arguments of Generator; JSON can hold it."""
    return {
        "prompt_lengths": sorted({prompt for prompt, _ in config.buckets}),
        "max_new_tokens": config.decoding.max_new_tokens,
        "batch_size": config.decoding.batch_size,
    }


def make_generator(
    config: ConfigDict,
    loaded: tuple[System, Params, Params],
    prompt_tokenizer: Tokenizer,
    response_tokenizer: Tokenizer,
) -> Generator:
    """A Generator with a config's buckets and decoding settings; loaded is (system, trained,
    frozen).
    """
    return Generator(*loaded, prompt_tokenizer, response_tokenizer, **generation_settings(config))


def load(directory: str, *, dtype: str = "auto", **settings: Any) -> Generator:
    """The L2S model in a directory, ready to answer: `load(DIR).generate(["..."])`.

    Args:
      directory: what a run left in RUN/l2s/model, or `python -m l2s_jax.convert` made of it.
      dtype: as config.dtype.
      settings: arguments of `Generator` to use instead of the model's own.

    Raises:
      ValueError: no L2S model is there, or its LLM is gone or no longer the same.
    """
    loaded = bundle.load(directory, dtype=compute_dtype(dtype))
    settings = {**bundle.generation_settings(directory), **settings}
    return Generator(*loaded, *bundle.load_tokenizers(directory), **settings)


def load_generator(config: ConfigDict, workdir: str, name: str) -> Generator:
    """The Generator of system `name` ("llm", "slm" or "l2s") that a run left in `workdir`.

    Raises:
      ValueError: the workdir holds no such system.
    """
    directory = os.path.join(workdir, name, "model")
    if name == "llm" and not config.llm.train.steps:
        directory = config.llm.path
    if not os.path.isdir(directory):
        raise ValueError(f"{directory}: no such directory; expected the result of a finished run")
    dtype = compute_dtype(config.dtype)
    if name == "l2s":
        return make_generator(
            config, bundle.load(directory, dtype=dtype), *bundle.load_tokenizers(directory)
        )
    module, params = convert.load(directory, dtype=dtype)
    tokenizer = load_tokenizer(directory)
    config_of_model = with_tokens(module.config, tokenizer.pad_id, tokenizer.eos_id, directory)
    loaded = LanguageModel(name, config_of_model), {name: params}, {}
    return make_generator(config, loaded, tokenizer, tokenizer)


def generate_file(
    config: ConfigDict, workdir: str, *, system: str, source: str, target: str, jsonl: bool
) -> None:
    """Answers every line of `source` into `target`, in order; "-" stands for stdin and stdout.

    Lines are the text of the task's one prompt field. In JSON Lines (`jsonl`, or a name that ends
    in .jsonl) a line holds the prompt's fields, and comes back with "response" and "cut" added.
    Nothing is written unless all of the input can be read, and `target` appears whole or not at
    all.

    Raises:
      ValueError: the input cannot be read, or a line holds no prompt (named file:line).
    """
    task = load_task(config.task)
    jsonl = jsonl or source.endswith(".jsonl")
    records = list(_read_records(source, task, jsonl))
    prompts = [task.render_prompt(record, where) for where, record in records]
    generator = load_generator(config, workdir, system)
    outputs = generator.generate(prompts, description="generating")
    with _open_output(target) as file:
        for (_, record), output in zip(records, outputs, strict=True):
            if jsonl:
                answer = {**record, "response": output.text, "cut": output.cut}
                file.write(json.dumps(answer, ensure_ascii=False) + "\n")
            else:
                file.write(output.text.replace("\n", " ") + "\n")


def _read_records(source: str, task: Task, jsonl: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, fields) of each line."""
    if not jsonl and len(task.prompt_fields) != 1:
        raise ValueError(
            f"the prompt of task {task.name!r} has the fields {', '.join(task.prompt_fields)}: "
            "expected JSON Lines with them as input (--jsonl)"
        )
    name = "stdin" if source == "-" else source
    try:
        with contextlib.ExitStack() as stack:
            file = sys.stdin.buffer if source == "-" else stack.enter_context(open(source, "rb"))
            for number, line in enumerate(file, start=1):
                where = f"{name}:{number}"
                yield where, _parse(line, where, None if jsonl else task.prompt_fields[0])
    except OSError as error:
        raise ValueError(f"{name}: cannot read the input: {error.strerror}") from None


def _parse(line: bytes, where: str, field: str | None) -> dict[str, Any]:
    try:
        text = line.decode("utf-8").rstrip("\r\n")
        record = json.loads(text) if field is None else {field: text}
    except UnicodeDecodeError:
        raise ValueError(f"{where}: expected UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected a JSON object: {error.msg}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {text[:60]!r}")
    return record


@contextlib.contextmanager
def _open_output(target: str) -> Iterator[TextIO]:
    if target == "-":
        yield sys.stdout
        return
    temporary = f"{target}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
        os.replace(temporary, target)
    except OSError as error:
        raise ValueError(f"{target}: cannot write the output: {error.strerror}") from None
