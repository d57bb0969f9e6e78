"""`--mode=generate`: a file of prompts in, a file of responses out, from a finished run."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from l2s_jax import buckets
from l2s_jax.cluster import distributed, sharding
from l2s_jax.config import make_mesh
from l2s_jax.data import sources
from l2s_jax.data.parquet import read_parquet
from l2s_jax.data.tasks import Blank, Task, load_task
from l2s_jax.files import is_bucket, is_file, replacing, signature
from l2s_jax.serving.loading import load_generator
from l2s_jax.serving.output import Output, by_place
from l2s_jax.serving.refilled import Refilled
from l2s_jax.settings.search import Search, alone, changed

log = logging.getLogger(__name__)

_SEEDS = 2**32
# Fields of an answer.
_ANSWER = {"response", "cut", "score", "others"}
# What a blank prompt is answered with.
_NOTHING = Output("", 0, False)


def generate_file(
    config: ConfigDict,
    workdir: str,
    *,
    system: str,
    source: str,
    target: str,
    jsonl: bool,
    search: Mapping[str, str] | None = None,
    stop: Sequence[str] = (),
    max_new_tokens: int | None = None,
    seed: int = 0,
    stream: bool = False,
    warm_up: bool = False,
    weights: str | None = None,
) -> None:
    """Answers every line of `source` into `target`, in order; "-" stands for stdin and stdout.

    Lines are the text of the task's one prompt field. In JSON Lines (`jsonl`, or a name that ends
    in .jsonl or .jsonl.gz) a line holds the prompt's fields, and comes back with "response" and
    "cut" added, and with a beam search's "score" and "others"; a field that had one of these names
    has "input_" before it. A row of a Parquet file, by its name, comes back as such a line too.
    Files are read as those of a task are. A blank prompt gets an empty response, so that the output
    has a line for each prompt; a blank line of JSON Lines is none. Where the task's blank rows are
    errors, so is a blank prompt.

    Nothing is written unless all of the input can be read, and `target` appears whole or not at
    all: what was there is kept if this fails. With `stream`, each line is answered as it is read,
    and its response is written as it is decoded.

    Args:
      system: llm, slm, l2s or exact; l2s is exact where the search is.
      search, stop: settings of `Search` that differ from the config's, values as text.
      max_new_tokens: at most the config's.
      seed: of the first prompt, the next ones have the numbers after it; after 2**32 - 1, 0.
      warm_up: everything is compiled before the first prompt is read.
      weights: other than the config's.

    Raises:
      ValueError: the input cannot be read or the output not written, a line holds no prompt (named
        file:line), or a setting does not fit.
    """
    task = load_task(config.task)
    kind = "jsonl" if jsonl else _kind_of(source)
    if stream and (target != "-" or kind != "text"):
        raise ValueError("--stream writes text to stdout: expected no --output and no JSON Lines")
    if stream and jax.process_count() > 1:
        raise ValueError(f"--stream: expected one process, this job has {jax.process_count()}")
    changes = parse_search(search or {})
    if stop:
        changes["stop"] = stop
    chosen = changed(config.decoding.search.to_dict(), changes)
    if system == "l2s" and chosen.exact:
        system = "exact"
    elif system in ("llm", "slm"):
        if changes.get("exact"):
            raise ValueError(
                f"--search=exact=true with --system={system}: it drafts nothing; expected "
                "--system=exact"
            )
        chosen = alone(chosen)
    if stream and chosen.num_beams > 1:
        raise ValueError(f"--stream with num_beams={chosen.num_beams}: expected one of them")
    if max_new_tokens is not None and max_new_tokens > config.decoding.max_new_tokens:
        raise ValueError(
            f"--max_new_tokens={max_new_tokens}: expected at most config.decoding.max_new_tokens="
            f"{config.decoding.max_new_tokens}"
        )
    if stream:
        records = _read_records(source, task, kind)
    else:
        asked = _asked(source, task, kind, config)
    writes = distributed.is_primary()
    with _open_output(target) if writes else contextlib.nullcontext() as file:
        generator = load_generator(
            config, workdir, system, search=chosen, weights=weights or config.decoding.weights
        )
        if warm_up:
            generator.warm_up(stream=stream)
        if stream:
            for number, (where, record) in enumerate(records):
                prompt = _prompt_of(task, record, where)
                pieces = (
                    ()
                    if prompt is None
                    else generator.stream(
                        prompt, max_new_tokens=max_new_tokens, seed=(seed + number) % _SEEDS
                    )
                )
                for piece in pieces:
                    print(_one_line(piece), end="", flush=True)
                print(flush=True)
            return
        # What is warm are the programs of batches.
        answering = generator if warm_up else Refilled(generator)
        outputs = answering.generate(
            list(asked.prompts.values()),
            max_new_tokens=max_new_tokens,
            seeds=[(seed + place) % _SEEDS for place in asked.prompts],
            description="generating",
            shared=not asked.apart,
        )
        # Process 0 has all of them, or all have their own.
        answers = dict(zip(asked.prompts, outputs, strict=bool(outputs)))
        if asked.apart:
            answers = by_place(answers)
        if file is None:
            return
        with _writing(target):
            for place, (record, is_blank) in enumerate(asked.records):
                output = _NOTHING if is_blank else answers[place]
                if kind == "text":
                    file.write(_one_line(output.text) + "\n")
                else:
                    fields = {**_renamed(record), **_answer(output)}
                    file.write(json.dumps(fields, ensure_ascii=False) + "\n")


def parse_search(values: Mapping[str, str]) -> dict[str, Any]:
    """Settings of `Search` from text, as in {"num_beams": "4"}.

    Raises:
      ValueError: there is no such setting, or the text is not a value of its kind.
    """
    kinds = {
        field.name: type(field.default)
        for field in dataclasses.fields(Search)
        if field.name != "stop"
    }
    parsed = {}
    for name, text in values.items():
        if name not in kinds:
            raise ValueError(f"--search: no setting {name!r}, expected some of {', '.join(kinds)}")
        try:
            parsed[name] = (
                {"true": True, "false": False}[text.lower()]
                if kinds[name] is bool
                else kinds[name](text)
            )
        except (KeyError, ValueError):
            kind = {bool: "true or false", int: "an integer", float: "a number"}[kinds[name]]
            raise ValueError(f"--search: {name}={text!r}: expected {kind}") from None
    return parsed


def _one_line(text: str) -> str:
    return text.replace("\n", " ")


def _renamed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an input, of which none has a name that an answer's has."""
    named = {name: value for name, value in record.items() if name not in _ANSWER}
    for name in _ANSWER & record.keys():
        other = name
        while other in record or other in named:
            other = f"input_{other}"
        named[other] = record[name]
    return named


def _answer(output: Output) -> dict[str, Any]:
    answer = {"response": output.text, "cut": output.cut}
    if output.score is not None:
        answer["score"] = output.score
    if output.others:
        answer["others"] = [_answer(other) for other in output.others]
    return answer


def _kind_of(source: str) -> str:
    name = source.removesuffix(".gz")
    return (
        "jsonl" if name.endswith(".jsonl") else "parquet" if name.endswith(".parquet") else "text"
    )


def _prompt_of(task: Task, record: Mapping[str, Any], where: str) -> str | None:
    """The prompt of a record; None where it is blank and that is no error."""
    try:
        return task.render_prompt(record, where)
    except Blank:
        if task.skips_blank:
            return None
        raise


class _Asked(NamedTuple):
    """What an input asks.

    records: (fields, whether the prompt is blank) of all lines; none where nothing is written.
    prompts: those that are not blank, by their places among the lines.
    apart: whether each process of a job has prompts of its own, in the place of all.
    """

    records: list[tuple[dict[str, Any], bool]]
    prompts: dict[int, str]
    apart: bool


def _asked(source: str, task: Task, kind: str, config: ConfigDict) -> _Asked:
    """Of a file that all processes of a job see, each reads its own prompts, if it answers alone.

    What one alone sees, such as stdin, process 0 reads for all.
    """
    count = jax.process_count()
    if count == 1 or _is_seen_by_all(source):
        apart = count > 1 and not _decoding_mesh(config).is_multi_process
        return _read(source, task, kind, (jax.process_index(), count) if apart else (0, 1))
    whole: list[_Asked] = []

    def read() -> list[tuple[int, str]]:
        whole.append(_read(source, task, kind, (0, 1)))
        return list(whole[0].prompts.items())

    prompts = distributed.on_primary(read)
    return whole[0] if whole else _Asked([], {place: text for place, text in prompts}, False)


def _decoding_mesh(config: ConfigDict) -> Mesh:
    return sharding.decoding_mesh(make_mesh(config, "decoding"))


def _is_seen_by_all(source: str) -> bool:
    """Whether the processes of a job find the same file under its name."""

    found, path = None, os.path.expanduser(source)
    with contextlib.suppress(OSError, ValueError):  # who reads it says what is wrong
        if source != sources.STDIN and is_file(path):
            found = signature(path)
    first, *others = distributed.exchange(found)
    return first is not None and all(other == first for other in others)


def _read(source: str, task: Task, kind: str, part: tuple[int, int]) -> _Asked:
    """All records where they are written, and the prompts of a part (i, n), each n-th line."""
    asked, writes, blank, place = _Asked([], {}, part[1] > 1), distributed.is_primary(), 0, -1
    for place, (where, record) in enumerate(_read_records(source, task, kind)):
        prompt = _prompt_of(task, record, where)
        if prompt is None:
            blank += 1
        elif place % part[1] == part[0]:
            asked.prompts[place] = prompt
        if writes:
            asked.records.append((record, prompt is None))
    if blank:
        name = sources.name_of(source)
        log.warning("%s: %d of %d prompts are blank", name, blank, place + 1)
    return asked


def _read_records(source: str, task: Task, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, fields) of each line."""
    if kind == "text" and len(task.prompt_fields) != 1:
        raise ValueError(
            f"the prompt of task {task.name!r} has the fields {', '.join(task.prompt_fields)}: "
            "expected JSON Lines with them as input (--jsonl)"
        )
    read = {
        "jsonl": sources.read_jsonl,
        "parquet": read_parquet,
        "text": lambda path: sources.read_text({task.prompt_fields[0]: path}),
    }[kind]
    for record in read(source):
        yield record.where(), dict(record.fields)


@contextlib.contextmanager
def _open_output(target: str) -> Iterator[TextIO]:
    """A file that becomes `target` when the block ends without an error, else disappears.

    It is opened at once, next to `target`: what cannot be written there is known before the block.
    """
    if target == "-":
        # As what comes in; a locale that lacks a character must not lose all answers.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")
        yield sys.stdout
        return
    with contextlib.ExitStack() as stack:
        with _writing(target):
            if is_bucket(target):
                buckets.check(os.path.dirname(target), write=True)
            elif os.path.isdir(target):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            temporary = stack.enter_context(replacing(target))
            file = open(temporary, "w", encoding="utf-8")  # noqa: SIM115  closed below
        try:
            yield file
        except BaseException:
            # The error of the block is what counts: closing may fail for the same reason.
            with contextlib.suppress(OSError):
                file.close()
            raise
        with _writing(target):
            file.close()
            stack.close()


@contextlib.contextmanager
def _writing(target: str) -> Iterator[None]:
    """Errors of the file system name `target`."""
    try:
        yield
    except OSError as error:
        name = "stdout" if target == "-" else target
        raise ValueError(f"{name}: cannot write the output: {error.strerror}") from None
