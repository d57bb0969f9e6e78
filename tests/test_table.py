"""Examples in tables: what went in comes out, from memory and from files."""

import errno
import os
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2s_jax.data import ragged
from l2s_jax.data.ragged import Growing, GrowingRagged
from l2s_jax.data.table import Example, ExampleTable
from l2s_jax.data.templates import Prompt, Span, spans_of

texts = st.text(st.characters(codec=None), max_size=12)


@st.composite
def prompts(draw):
    text = draw(texts)
    if draw(st.booleans()):
        return text
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pairs = zip(places[::2], places[1::2], strict=False)
    names = st.sampled_from(["a", "b"]), st.sampled_from(["start", "end"])
    return Prompt(text, [Span(draw(names[0]), *pair, draw(names[1])) for pair in pairs])


@st.composite
def examples(draw):
    response, others = draw(texts), tuple(draw(st.lists(texts, max_size=3)))
    references = (response, *others) if draw(st.booleans()) else others
    return Example(draw(prompts()), response, references, draw(st.booleans()))


@pytest.mark.parametrize("in_memory", [0, 40, ragged.IN_MEMORY])
@settings(max_examples=60, deadline=None)
@given(st.lists(examples(), max_size=12))
def test_what_went_in_comes_out(in_memory, given_examples):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged, "IN_MEMORY", in_memory)
        patch.setattr("l2s_jax.data.table._AT_ONCE", 5)
        table = ExampleTable(iter(given_examples))
    assert len(table) == len(given_examples)
    for found in (list(table), [table[i] for i in range(len(table))], table[:]):
        assert found == given_examples
        for one, other in zip(found, given_examples, strict=True):
            assert spans_of(one.prompt) == spans_of(other.prompt)
    assert table[-2:] == given_examples[-2:]
    with pytest.raises(IndexError):
        table[len(table)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=4), max_size=5))
def test_sequences_grow_over_the_edge_of_memory(chunks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged, "IN_MEMORY", 48)
        growing = GrowingRagged(np.int32)
        for chunk in chunks:
            growing.append(ragged.numbers(chunk, np.int32), [*map(len, chunk)])
    whole, expected = growing.done(), [one for chunk in chunks for one in chunk]
    assert [one.tolist() for one in whole] == expected
    assert whole.lengths.tolist() == [*map(len, expected)]


def test_a_large_array_is_no_memory_of_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def private_bytes():
        with open("/proc/self/status") as file:
            (line,) = (line for line in file if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    part, growing, before = np.ones(1 << 20, np.int64), Growing(np.int64), private_bytes()
    for _ in range(40):
        growing.append(part)
    whole = growing.array()
    assert whole.sum() == 40 << 20
    assert private_bytes() - before < 160e6 < whole.nbytes
    assert os.listdir(tmp_path) == []  # a file without a name


def test_a_folder_without_room_is_named(monkeypatch, tmp_path):
    class Full:
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ragged, "IN_MEMORY", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    with pytest.raises(OSError) as raised:
        ExampleTable([Example("a", "b", ("b",))])
    assert raised.value.filename == str(tmp_path)
    assert raised.value.errno == errno.ENOSPC
