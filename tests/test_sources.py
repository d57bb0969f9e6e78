"""Sources and tasks: all kinds give the same examples; bad input gives one clear line."""

import gzip
import json
import os

import fsspec
import numpy as np
import pyarrow
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from pyarrow import parquet

from l2s_jax.cluster import distributed
from l2s_jax.config import default
from l2s_jax.data import parquet as parquet_module
from l2s_jax.data import sources, tasks
from l2s_jax.data import text as text_module
from l2s_jax.experiment.context import Context

ROWS = [
    {"en": "a dog", "de": "ein Hund", "more": ["der Hund", "Hund"]},
    {"en": "two birds", "de": "zwei Vögel", "more": []},
    {"en": "snow\u2028falls\x0bhere\x85now", "de": "es\u2029schneit", "more": ["Schnee\u2028fall"]},
]
TEMPLATE = "translate {{x}}: {en}"


class TinyPairs(tfds.core.GeneratorBasedBuilder):
    """ROWS as a TFDS dataset, with fields that no task can use."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        features = {"en": text, "de": text, "more": tfds.features.Sequence(text), "id": np.int64}
        features["raw"] = tfds.features.Tensor(shape=(), dtype=np.object_)
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        for index, row in enumerate(ROWS):
            yield index, row | {"id": index, "raw": b"\xff\xfe"}


def write(path, content):
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def write_rows(directory, rows=ROWS, suffix=""):
    write(directory / f"d.jsonl{suffix}", "".join(json.dumps(row) + "\n" for row in rows))
    write(
        directory / f"d.tsv{suffix}", "en\tde\n" + "".join(f"{r['en']}\t{r['de']}\n" for r in rows)
    )
    parquet.write_table(pyarrow.Table.from_pylist(rows), directory / "d.parquet")
    for field in ("en", "de"):
        write(directory / f"d.{field}{suffix}", "".join(row[field] + "\n" for row in rows))


def config_of(kind, directory, suffix="", **changes):
    split = {
        "text": {"en": f"d.en{suffix}", "de": f"d.de{suffix}"},
        "jsonl": f"d.jsonl{suffix}",
        "tsv": f"d.tsv{suffix}",
        "parquet": "d.parquet",
        "tfds": "test",
    }[kind]
    values = {
        "name": "tiny",
        "source": kind,
        "data_dir": str(directory),
        "splits": {"test": split},
        "tfds_name": "tiny_pairs" if kind == "tfds" else "",
        "prompt": TEMPLATE,
        "response": "de",
        "references": "",
    }
    return ConfigDict(values | changes)


def expected_examples(references=False):
    return [
        tasks.Example(
            f"translate {{x}}: {row['en']}",
            row["de"],
            (row["de"], *(row["more"] if references else ())),
        )
        for row in ROWS
    ]


def fails_with_one_line(call, *parts):
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    assert len(tasks.load_task(config_of("tfds", directory)).examples("test")) == len(ROWS)
    return directory


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("source", ["text", "jsonl", "tsv", "parquet"])
def test_files_give_the_rows(tmp_path, source, suffix):
    write_rows(tmp_path, suffix=suffix)
    examples = tasks.load_task(config_of(source, tmp_path, suffix)).examples("test")
    assert list(examples) == expected_examples()
    assert examples[1] == expected_examples()[1]


def test_tfds_gives_the_rows_by_index_and_in_turn(tfds_dir):
    task = tasks.load_task(config_of("tfds", tfds_dir, references="more"))
    examples = task.examples("test")
    by_index = [examples[i] for i in range(len(examples))]
    assert list(examples) == by_index
    assert sorted(by_index) == sorted(expected_examples(references=True))
    assert examples[-1] == by_index[-1]
    with pytest.raises(IndexError):
        examples[len(examples)]


def test_tfds_takes_split_expressions(tfds_dir):
    config = config_of("tfds", tfds_dir, splits={"train": "train[:2]", "test": "train[2:]+test"})
    task = tasks.load_task(config)
    assert [len(task.examples(split)) for split in ("train", "test")] == [2, 4]


def test_iteration_over_tfds_crosses_its_read_size(tfds_dir, monkeypatch):
    monkeypatch.setattr(sources, "_READ_AT_ONCE", 2)
    records = sources.TfdsRecords("tiny_pairs", "test", str(tfds_dir))
    assert [record.line for record in records] == [0, 1, 2]
    assert [record.fields for record in records] == [records[i].fields for i in range(3)]


def test_the_bundled_dataset_is_known_to_tfds(tmp_path):
    config = config_of("tfds", tmp_path, tfds_name="l2s_synthetic", splits={"test": "no_such"})
    fails_with_one_line(
        lambda: tasks.load_task(config).examples("test"), "l2s_synthetic", "no_such", "train"
    )


def test_any_fsspec_url_is_read():
    memory = fsspec.filesystem("memory")
    memory.pipe("/set/d.jsonl.gz", gzip.compress(json.dumps(ROWS[0]).encode()))
    config = config_of("jsonl", "memory://set", ".gz")
    assert list(tasks.load_task(config).examples("test")) == expected_examples()[:1]


def test_resolve():
    assert sources.resolve("data/", "a.tsv") == "data/a.tsv"
    assert sources.resolve("gs://bucket/x", "a.tsv") == "gs://bucket/x/a.tsv"
    assert sources.resolve("data", "/abs/a.tsv") == "/abs/a.tsv"
    assert sources.resolve("data", "s3://bucket/a.tsv") == "s3://bucket/a.tsv"
    assert sources.resolve("", "a.tsv") == "a.tsv"


def test_line_endings_and_byte_order_mark(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n\nfour")
    assert list(sources.read_lines(path)) == ["one", "two\rthree", "", "four"]


@settings(max_examples=100, deadline=None)
@given(lines=st.lists(st.text(st.characters(exclude_characters="\n\r\ufeff", codec="utf-8"))))
def test_lines_survive_a_file(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("lines") / "a.gz"
    write(path, "".join(line + "\n" for line in lines))
    assert list(sources.read_lines(str(path))) == lines


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_gzip_is_read_right_or_told_in_one_line(tmp_path_factory, position, value, cut):
    lines = [f"line {i} of the file" for i in range(50)]
    data = bytearray(gzip.compress("\n".join(lines).encode(), mtime=0))
    position %= len(data)
    data[position:] = b"" if cut else bytes([value]) + data[position + 1 :]
    path = tmp_path_factory.mktemp("damaged") / "a.txt.gz"
    path.write_bytes(data)
    try:
        read = list(sources.read_lines(str(path)))
    except ValueError as error:
        assert "\n" not in str(error)
        assert str(path) in str(error)
    else:
        assert read == lines or (cut and position == 0 and read == [])


def test_extra_references(tmp_path):
    write_rows(tmp_path)
    config = config_of("jsonl", tmp_path, references="more")
    config.splits.train = "d.jsonl"
    task = tasks.load_task(config)
    assert list(task.examples("test")) == expected_examples(references=True)
    assert list(task.examples("train")) == expected_examples()
    one = config_of("tsv", tmp_path, references="en")
    assert tasks.load_task(one).examples("test")[0].references == ("ein Hund", "a dog")


def test_render_prompt(tmp_path):
    task = tasks.load_task(config_of("jsonl", tmp_path))
    assert task.name == "tiny"
    assert task.render_prompt({"en": "a {cat}", "id": 3}) == "translate {x}: a {cat}"
    fails_with_one_line(lambda: task.render_prompt({"de": "x"}, "in:4"), "in:4", "'en'", "de")
    fails_with_one_line(lambda: task.render_prompt({"en": " \t"}, "in:4"), "in:4", "empty")
    fails_with_one_line(lambda: task.render_prompt({}), "the record", "'en'", "none")


def test_one_of_several_prompt_fields_may_be_blank(tmp_path):
    task = tasks.load_task(config_of("jsonl", tmp_path, prompt="{a} | {b}{a}"))
    assert task.render_prompt({"a": "", "b": "x"}) == " | x"
    fails_with_one_line(lambda: task.render_prompt({"a": "", "b": " "}), "'a', 'b'")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"source": "csv"}, ["config.task.source", "'csv'", "tfds, jsonl, tsv, parquet, text"]),
        ({"splits": {"dev": "d.jsonl"}}, ["splits.dev", "train, validation, test"]),
        ({"splits": {"test": {"en": "x"}}}, ["splits.test", "'en'", "a file"]),
        ({"splits": {"test": ""}}, ["splits.test", "''"]),
        ({"splits": {}}, ["config.task.splits is not set"]),
        ({"prompt": ""}, ["config.task.prompt is not set"]),
        ({"response": ""}, ["config.task.response is not set"]),
        ({"prompt": "no fields"}, ["config.task.prompt", "'no fields'"]),
        ({"prompt": "{en"}, ["config.task.prompt", "'{en'"]),
        ({"prompt": "{}"}, ["config.task.prompt", "{}"]),
        ({"prompt": "{0}"}, ["config.task.prompt", "{0}"]),
        ({"prompt": "{en.x}"}, ["config.task.prompt", "{en.x}"]),
        ({"prompt": "{en[0]}"}, ["config.task.prompt", "{en[0]}"]),
        ({"prompt": "{en!r:>9}"}, ["config.task.prompt", "{en!r:>9}"]),
        ({"source": "tfds"}, ["config.task.tfds_name is not set"]),
        ({"source": "text"}, ["splits.test", "'d.jsonl'", "a file for each field"]),
        ({"source": "text", "splits": {"test": {"en": 3}}}, ["splits.test", "3"]),
        (
            {"source": "text", "splits": {"test": {"en": "a", "fr": "b"}}},
            ["config.task.response", "'de'", "splits.test", "en, fr"],
        ),
        (
            {"source": "text", "splits": {"test": {"xx": "a", "de": "b"}}},
            ["config.task.prompt", "'en'", "splits.test", "de, xx"],
        ),
    ],
)
def test_config_errors_need_no_data(tmp_path, changes, parts):
    fails_with_one_line(lambda: tasks.load_task(config_of("jsonl", tmp_path, **changes)), *parts)


def test_unknown_split(tmp_path):
    task = tasks.load_task(config_of("jsonl", tmp_path))
    fails_with_one_line(lambda: task.examples("train"), "'train'", "it has: test")


@pytest.mark.parametrize("source", ["text", "jsonl", "tsv"])
def test_missing_file(tmp_path, source):
    task = tasks.load_task(config_of(source, tmp_path))
    fails_with_one_line(lambda: task.examples("test"), tmp_path / "d.", "no such file")


def test_unreadable_paths(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (str(tmp_path / "folder"), "nosuchscheme://x/y.txt"):
        fails_with_one_line(lambda path=path: list(sources.read_lines(path)), path)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("d.jsonl", '{"en": "a", "de": "b"}\n{"en": \n', [":2", "malformed JSON"]),
        ("d.jsonl", '\n\n["en"]\n', [":3", "JSON object", "list"]),
        ("d.jsonl", "[" * 100_000, [":1", "malformed JSON"]),
        ("d.jsonl", '{"en": "a", "fr": "b"}\n', [":1", "no field 'de'", "en, fr"]),
        ("d.jsonl", '{"en": "a", "de": 7}\n', [":1", "'de'", "7", "a string"]),
        ("d.jsonl", '{"en": {"a": 1}, "de": "b"}\n', [":1", "'en'", "{'a': 1}", "a string"]),
        ("d.jsonl", f'{{"en": {"[" * 101 + "]" * 101}}}', [":1", "malformed JSON", "100 deep"]),
        ("d.jsonl", f'{{"en": {"1" * 5000}}}', [":1", "malformed JSON", "digits"]),
        ("d.jsonl", '{"en": "a", "de": " "}\n{"en": "", "de": "b"}', ["'test'", "rows are blank"]),
        ("d.jsonl", "", ["'test'", "d.jsonl", "is empty"]),
        ("d.jsonl", b'{"en": "a", "de": "b"}\n\xff\n', [":2", "not UTF-8"]),
        ("d.tsv", "en\tde\na\tb\na\tb\tc\n", [":3", "2 columns (en, de)", "found 3"]),
        ("d.tsv", "en\tde\na\n", [":2", "2 columns", "found 1"]),
        ("d.tsv", "en\tde\ten\n", [":1", "'en'", "more than once"]),
        ("d.tsv", "en\tde\na\t \n", ["'test'", "rows are blank"]),
        ("d.tsv", "en\tfr\na\tb\n", [":2", "no field 'de'", "en, fr"]),
        ("d.tsv", "", [":1", "header"]),
        ("d.tsv", "en\tde\n", ["'test'", "is empty"]),
    ],
)
def test_bad_files(tmp_path, name, content, parts):
    path = write(tmp_path / name, content)
    task = tasks.load_task(config_of(name.split(".")[1], tmp_path))
    location, rest = (path + parts[0], parts[1:]) if parts[0][0] == ":" else (name, parts)
    fails_with_one_line(lambda: task.examples("test"), location, *rest)


@pytest.mark.parametrize("value", ["[1]", "[null]", "7", '{"a": "b"}'])
def test_bad_references(tmp_path, value):
    path = write(tmp_path / "d.jsonl", f'{{"en": "a", "de": "b", "more": {value}}}\n')
    task = tasks.load_task(config_of("jsonl", tmp_path, references="more"))
    fails_with_one_line(lambda: task.examples("test"), f"{path}:1", "'more'", "list of strings")


def test_missing_references(tmp_path):
    path = write(tmp_path / "d.jsonl", '{"en": "a", "de": "b"}\n')
    task = tasks.load_task(config_of("jsonl", tmp_path, references="more"))
    fails_with_one_line(lambda: task.examples("test"), f"{path}:1", "'more'", "en, de")


@pytest.mark.parametrize("longer", ["en", "de"])
def test_misaligned_files(tmp_path, longer):
    counts = {"en": 3, "de": 3} | {longer: 8}
    for field, count in counts.items():
        write(tmp_path / f"d.{field}.gz", "x\n" * count)
    fails_with_one_line(
        lambda: tasks.load_task(config_of("text", tmp_path, ".gz")).examples("test"),
        f"{tmp_path}/d.en.gz has {counts['en']}",
        f"{tmp_path}/d.de.gz has {counts['de']}",
    )


BLANK = [
    {"en": "a", "de": "", "more": ["x"]},
    {"en": " \u3000", "de": "b", "more": ["x"]},
    {"en": "", "de": " ", "more": []},
]


@pytest.mark.parametrize("split", tasks.SPLITS)
@pytest.mark.parametrize("source", ["text", "jsonl", "tsv", "parquet"])
def test_blank_rows_are_left_out_and_counted_or_refused(tmp_path, source, split, caplog):
    rows = [BLANK[0], ROWS[0], BLANK[1], ROWS[1], BLANK[2], ROWS[2]]
    write_rows(tmp_path, rows)
    config = config_of(source, tmp_path)
    config.splits = {split: config.splits.test}
    assert list(tasks.load_task(config).examples(split)) == expected_examples()
    (record,) = caplog.records
    assert record.getMessage() == (
        f"tiny: 3 of 6 rows of the {split} split have a blank prompt or response and are left out "
        "(config.task.blank_rows)"
    )
    config.blank_rows = "error"
    line = {"tsv": 2}.get(source, 1)
    name = {"text": "d.de"}.get(source, f"d.{source}")
    fails_with_one_line(
        lambda: tasks.load_task(config).examples(split),
        f"{tmp_path / name}:{line}",
        "empty response",
    )


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
def test_references_stay_with_their_rows_and_blank_ones_are_none(tmp_path, source):
    more = {"en": "x", "de": "y", "more": ["", "z", " "]}
    write_rows(tmp_path, [BLANK[1], ROWS[0], BLANK[0], more, {"en": "v", "de": "w", "more": None}])
    config = config_of(source, tmp_path, references="more")
    assert [e.references for e in tasks.load_task(config).examples("test")] == [
        ("ein Hund", "der Hund", "Hund"),
        ("y", "z"),
        ("w",),
    ]
    write_rows(tmp_path, [ROWS[0], more])
    config.blank_rows = "error"
    fails_with_one_line(
        lambda: tasks.load_task(config).examples("test"), f"d.{source}:2", "'more'", "empty refer"
    )


def test_blank_lines_of_tsv_are_no_rows_but_for_one_column(tmp_path):
    task = tasks.load_task(config_of("tsv", tmp_path, blank_rows="error"))
    rows = "".join(f"{row['en']}\t{row['de']}\n\n" for row in ROWS)
    write(tmp_path / "d.tsv", f"en\tde\n \n{rows}\r\n")
    assert list(task.examples("test")) == expected_examples()
    write(tmp_path / "d.tsv", "en\tde\n\na\tb\n\n\t\n")
    fails_with_one_line(lambda: task.examples("test"), f"{tmp_path / 'd.tsv'}:5", "empty prompt")
    write(tmp_path / "d.tsv", "en\tde\n\na\n")
    fails_with_one_line(lambda: task.examples("test"), f"{tmp_path / 'd.tsv'}:3", "found 1")
    lines = write(tmp_path / "one.tsv", "en\na\n\nb\n")
    found = [(record.fields["en"], record.line) for record in sources.read_tsv(lines)]
    assert found == [("a", 2), ("", 3), ("b", 4)]


def test_empty_lines_of_text_files(tmp_path):
    write(tmp_path / "d.en", "a\nb\n")
    write(tmp_path / "d.de", "a\n\n")
    task = tasks.load_task(config_of("text", tmp_path, blank_rows="error"))
    fails_with_one_line(lambda: task.examples("test"), tmp_path / "d.de:2", "empty response")
    write(tmp_path / "d.en", "a\n \n")
    fails_with_one_line(lambda: task.examples("test"), tmp_path / "d.en:2", "empty prompt")


class HolePairs(TinyPairs):
    """The rows with blank ones between them."""

    def _generate_examples(self):
        for index, row in enumerate([BLANK[0], ROWS[0], BLANK[1], ROWS[1], ROWS[2]]):
            yield index, row | {"id": index, "raw": b"\xff\xfe"}


def test_blank_rows_of_tfds(tmp_path, caplog):
    task = tasks.load_task(config_of("tfds", tmp_path, tfds_name="hole_pairs"))
    examples = task.examples("test")
    assert len(examples) == 3 and not isinstance(examples, list)
    (record,) = (r for r in caplog.records if r.name == tasks.__name__)
    assert "2 of 5 rows of the test split" in record.getMessage()
    assert sorted(examples) == sorted(expected_examples())
    assert [examples[i] for i in range(3)] == list(examples) and examples[-1] == examples[2]
    with pytest.raises(IndexError):
        examples[3]
    # A pass through all of them knows how many there are.
    again = task.examples("test")
    records = again._records
    list(again)
    again._records = None
    assert len(again) == 3
    again._records = records
    strict = tasks.load_task(
        config_of("tfds", tmp_path, tfds_name="hole_pairs", blank_rows="error")
    )
    assert len(strict.examples("test")) == 5
    fails_with_one_line(lambda: list(strict.examples("test")), "hole_pairs", "empty")


def test_the_first_of_a_split_are_those_that_are_not_blank(tmp_path):
    write_rows(tmp_path, [BLANK[0], ROWS[0], BLANK[1], *ROWS[1:]])
    config = default()
    config.task.update(config_of("jsonl", tmp_path))
    context = Context(config, str(tmp_path), "make")
    assert list(context.first("test", 2)) == expected_examples()[:2]
    assert list(context.first("test", 0)) == expected_examples()
    before = context.content("test")
    config.task.blank_rows = "error"
    fails_with_one_line(lambda: Context(config, str(tmp_path), "make").content("test"), "d.jsonl:1")
    write_rows(tmp_path)
    assert Context(config, str(tmp_path), "make").content("test") == before


def test_process_0_hashes_a_checkpoint_for_all_of_a_job(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "on_primary", lambda action: "what process 0 found")
    config = default()
    config.task.update(config_of("jsonl", tmp_path))
    making, looking = (Context(config, str(tmp_path), mode) for mode in ("make", "look"))
    # Nothing is there to read.
    model = str(tmp_path / "model")
    assert making.checkpoint(model) == "what process 0 found"
    fails_with_one_line(lambda: looking.checkpoint(model), f"{model}: no such directory")


HALVES = "ok \\ud83d bad", "ok \ufffd bad"


def test_half_a_character_becomes_a_replacement_character(tmp_path):
    escaped, right = HALVES
    row = f'{{"en": "{escaped}", "de": "\\ude00{escaped}", "more": ["\\ud83d\\ude00", "\\udc00"]}}'
    write(tmp_path / "d.jsonl", row)
    task = tasks.load_task(config_of("jsonl", tmp_path, references="more"))
    (example,) = task.examples("test")
    assert example.prompt == f"translate {{x}}: {right}"
    assert example.references == (f"\ufffd{right}", "\U0001f600", "\ufffd")
    # As some programs write it: each half in three bytes, which is no UTF-8.
    raw = right.encode().replace(b"\xef\xbf\xbd", b"\xed\xa0\xbd")
    write(tmp_path / "d.tsv", b"en\tde\n" + raw + b"\tx\n")
    (example,) = tasks.load_task(config_of("tsv", tmp_path)).examples("test")
    assert example.prompt == f"translate {{x}}: {right}"
    array = pyarrow.array([raw, b"x"]).view(pyarrow.string())
    table = pyarrow.table({"en": array, "de": pyarrow.array([b"b", raw])})
    parquet.write_table(table, tmp_path / "d.parquet")
    examples = tasks.load_task(config_of("parquet", tmp_path)).examples("test")
    assert examples[0].prompt.endswith(right) and examples[1].response == right
    assert sources._to_python(np.array([raw], object)) == [right]


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(categories=["L", "Cs", "P"])))
def test_a_text_is_whole_and_otherwise_as_it_was(text):
    whole = text_module.whole(text)
    assert whole.encode().decode() == whole
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    # Two halves that belong together are one character in JSON, and never meet in a string.
    if all(not "\ud800" <= c <= "\udbff" for c in text):
        assert whole == expected
    assert text_module.all_whole({text: [text, 1]}) == {whole: [whole, 1]}
    assert text_module.decoded(text.encode(errors="surrogatepass")) == whole


def test_lists_of_texts():
    assert text_module.text_list(("a", "\ud83d"), "prompts") == ["a", "\ufffd"]
    assert text_module.text_list(iter(["a"]), "prompts") == ["a"]
    with pytest.raises(TypeError, match=r"prompts: expected a sequence .* \['one'\]"):
        text_module.text_list("one", "prompts")
    with pytest.raises(TypeError, match="prompts: expected strings, number 1 is of type int"):
        text_module.text_list(["one", 2], "prompts")
    assert text_module.integer_list(np.array([3, 4]), "seeds") == [3, 4]
    for wrong in ("12", 3, [1.5], ["1"]):
        with pytest.raises(TypeError, match=r"seeds: expected .*integers"):
            text_module.integer_list(wrong, "seeds")


@pytest.mark.parametrize("source", ["jsonl", "tsv", "parquet"])
def test_shards_are_read_in_order_of_their_names(tmp_path, source):
    for number, row in enumerate(ROWS):
        write_rows(tmp_path, [row])
        (tmp_path / f"d.{source}").rename(tmp_path / f"part-{number}.{source}")
    config = config_of(source, tmp_path, splits={"test": f"part-*.{source}"})
    task = tasks.load_task(config)
    assert list(task.examples("test")) == expected_examples()
    assert task.files("test", prepare=True) == [
        str(tmp_path / f"part-{number}.{source}") for number in range(3)
    ]
    config.splits.test = "none-*.x"
    task = tasks.load_task(config)
    assert task.files("test", prepare=True) == [str(tmp_path / "none-*.x")]
    fails_with_one_line(lambda: task.examples("test"), tmp_path / "none-*.x", "no such file")


@pytest.mark.parametrize("url", ["", "memory://"])
def test_what_is_there_by_its_own_name_is_meant_before_what_a_pattern_means(tmp_path, url):
    """Of run[1]/x, run1/x would be meant."""

    def write_at(name):
        if url:
            fsspec.filesystem("memory").pipe(f"{tmp_path}/{name}", b"")
        else:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            write(tmp_path / name, "")

    def found(name):
        paths = sources.expand(f"{url}{tmp_path}/{name}")
        assert [path for path in paths if not path.startswith(f"{url}{tmp_path}/")] == []
        return [path.removeprefix(f"{url}{tmp_path}/") for path in paths]

    names = ["run[1]/a.x", "run[1]/b.x", "run1/a.x", "run2/a.x", "a[1]-0.x", "a1-0.x", "b1.x"]
    for name in names:
        write_at(name)
    assert found("run[1]/*.x") == ["run[1]/a.x", "run[1]/b.x"]
    assert found("run[12]/*.x") == ["run1/a.x", "run2/a.x"]
    assert found("a[1]-*.x") == ["a[1]-0.x"]
    assert found("b[1]*.x") == ["b1.x"]
    assert found("ru*[1]/a.x") == ["run[1]/a.x"]
    assert found("run?/*.x") == ["run1/a.x", "run2/a.x"]
    if url:
        return
    for name in ("c*.x", "c1.x", "d*/a.x", "d1/a.x"):
        write_at(name)
    assert found("c*.x") == ["c*.x"] and found("d*/*.x") == ["d*/a.x"]
    with pytest.raises(ValueError, match="no such file"):
        found("run[3]/*.x")


def test_shards_may_be_urls():
    memory = fsspec.filesystem("memory")
    for number, row in enumerate(ROWS):
        memory.pipe(f"/shards/d{number}.jsonl", json.dumps(row).encode())
    config = config_of("jsonl", "memory://shards", splits={"test": "d*.jsonl"})
    assert list(tasks.load_task(config).examples("test")) == expected_examples()
    buffer = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), buffer)
    memory.pipe("/shards/d.parquet", buffer.getvalue().to_pybytes())
    config = config_of("parquet", "memory://shards", splits={"test": "d.parquet"})
    assert list(tasks.load_task(config).examples("test")) == expected_examples()


def test_parquet_is_read_by_batches_and_only_the_columns_in_use(tmp_path, monkeypatch, caplog):
    rows = [{"en": f"a {i}", "de": f"b {i}", "raw": b"\xff"} for i in range(50)]
    table = pyarrow.Table.from_pylist(rows)
    table = table.set_column(1, "de", table["de"].dictionary_encode())
    parquet.write_table(table, tmp_path / "d.parquet", row_group_size=20)
    monkeypatch.setattr(parquet_module, "_ROWS_AT_ONCE", 7)
    asked = []
    read = parquet.ParquetFile.iter_batches

    def spy(self, *args, columns, **kwargs):
        asked.append(columns)
        return read(self, *args, columns=columns, **kwargs)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", spy)
    examples = tasks.load_task(config_of("parquet", tmp_path)).examples("test")
    assert [e.response for e in examples] == [row["de"] for row in rows]
    assert asked == [["en", "de"]]
    # What is asked for nowhere is what JSON has words for.
    first = next(iter(parquet_module.read_parquet(str(tmp_path / "d.parquet"))))
    assert first.fields == {"en": "a 0", "de": "b 0"} and first.where() == f"{first.files}:1"
    assert caplog.messages == [
        f"{tmp_path}/d.parquet:1: field 'raw' is not UTF-8: invalid start byte at byte 0; the "
        "column is left out"
    ]


# Of a view, twelve bytes at most lie in itself.
TEXTS = ["a dog", "zwei Vögel", None, "", "more than twelve bytes: " + "\N{SNOWMAN}" * 9]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view"])
@pytest.mark.parametrize("noted", [True, False])
def test_text_of_parquet_is_read_however_it_is_stored(tmp_path, kind, noted):
    path = str(tmp_path / "d.parquet")
    text = getattr(pyarrow, kind)()
    binary = getattr(pyarrow, kind.replace("string", "binary"))()
    column = pyarrow.array([t if t is None else t.encode() for t in TEXTS], binary)
    column = column.cast(text) if noted else column
    lists = pyarrow.ListArray.from_arrays(range(len(TEXTS) + 1), column)
    parquet.write_table(pyarrow.table({"en": column, "more": lists}), path)
    assert parquet.read_schema(path).field("en").type == (text if noted else binary)
    expected = [{"en": t, "more": [t]} for t in TEXTS]
    assert [r.fields for r in parquet_module.read_parquet(path)] == expected
    assert [r.fields for r in parquet_module.read_parquet(path, ["more", "en"])] == expected


@pytest.mark.parametrize("kind", ["string_view", "binary", "binary_view", "large_binary"])
@pytest.mark.parametrize("of_lists", [False, True])
def test_parquet_bytes_that_are_no_text_are_told_by_row(tmp_path, kind, of_lists):
    path = str(tmp_path / "d.parquet")
    column = pyarrow.array([b"a", None, b"b\xff", b"c"], pyarrow.binary())
    column = column.cast(pyarrow.binary_view() if "view" in kind else column.type)
    column = column.view(getattr(pyarrow, kind)()) if "string" in kind else column
    column = column.cast(pyarrow.large_binary()) if "large" in kind else column
    column = pyarrow.ListArray.from_arrays(range(5), column) if of_lists else column
    parquet.write_table(pyarrow.table({"en": column}), path)
    for columns in (None, ["en"]):
        fails_with_one_line(
            lambda columns=columns: list(parquet_module.read_parquet(path, columns)),
            f"{path}:3: field 'en' is not UTF-8: invalid start byte at byte 1",
        )


def test_rows_of_parquet_without_a_column_for_us_are_rows(tmp_path):
    path = str(tmp_path / "d.parquet")
    kind = pyarrow.struct({"en": pyarrow.string()})
    parquet.write_table(pyarrow.table({"row": pyarrow.array([{"en": "a"}] * 3, kind)}), path)
    found = list(parquet_module.read_parquet(path))
    assert [(r.fields, r.line) for r in found] == [({}, 1), ({}, 2), ({}, 3)]
    task = tasks.load_task(config_of("parquet", tmp_path))
    fails_with_one_line(
        lambda: task.render_prompt(found[0].fields, found[0].where()), f"{path}:1", "'en'", "none"
    )


def test_bad_parquet(tmp_path):
    path = tmp_path / "d.parquet"

    def fails(*parts):
        fails_with_one_line(
            lambda: tasks.load_task(config_of("parquet", tmp_path)).examples("test"), path, *parts
        )

    fails("no such file")
    path.write_bytes(b"PAR1 but no more")
    fails("no Parquet file")
    parquet.write_table(pyarrow.table({"en": ["a"], "fr": ["b"]}), path)
    fails("no column 'de' (columns: en, fr)")
    parquet.write_table(pyarrow.table({"en": ["a", "b"], "de": [1, 2]}), path)
    fails(f"{path}:1: field 'de' is 1, expected a string")
    parquet.write_table(pyarrow.table({"en": ["a", "b"], "de": [b"x", b"\xff"]}), path)
    fails(f"{path}:2: field 'de' is not UTF-8: invalid start byte at byte 0")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    fails("no Parquet file")


def test_gzip_is_known_by_its_beginning_too(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode() + b"\r\n"))
    assert (
        list(tasks.load_task(config_of("jsonl", tmp_path)).examples("test"))
        == expected_examples()[:1]
    )


def test_lines_are_given_as_they_come(tmp_path):
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)
    try:
        lines = sources.read_lines(pipe)
        for text in ("one", "two"):
            os.write(writer, f"{text}\n".encode())
            assert next(lines) == text
        lines.close()
    finally:
        os.close(writer)


@pytest.mark.parametrize(
    "content",
    [b"no gzip at all", gzip.compress(b"line\n" * 9000)[:-20]],
    ids=["no gzip", "cut short"],
)
def test_broken_gzip(tmp_path, content):
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(content)
    fails_with_one_line(lambda: list(sources.read_lines(str(path))), path, "broken gzip")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"tfds_name": "no_such_set"}, ["'no_such_set'"]),
        ({"tfds_name": "tiny_pairs/no_such_config"}, ["'tiny_pairs/no_such_config'"]),
        ({"tfds_name": "tiny_pairs:7.0.0"}, ["'tiny_pairs:7.0.0'"]),
        ({"splits": {"test": "no_such"}}, ["tiny_pairs", "'no_such'", "test, train"]),
        ({"splits": {"test": "test[abc"}}, ["tiny_pairs", "'test[abc'"]),
        ({"prompt": "{fr}"}, ["tiny_pairs", "test:0", "no field 'fr'", "de"]),
        ({"prompt": "{id}"}, ["tiny_pairs", "test:0", "'id'", "a string"]),
        ({"prompt": "{raw}"}, ["tiny_pairs", "test:0", "'raw'", "a string"]),
    ],
)
def test_tfds_errors(tfds_dir, changes, parts):
    config = config_of("tfds", tfds_dir, **changes)
    fails_with_one_line(lambda: tasks.load_task(config).examples("test")[0], *parts)


def test_tfds_that_cannot_be_prepared(tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("the server\nis down")

    monkeypatch.setattr(TinyPairs, "_generate_examples", fail)
    config = config_of("tfds", tmp_path)
    fails_with_one_line(
        lambda: tasks.load_task(config).examples("test"), "cannot prepare 'tiny_pairs'", "server"
    )
