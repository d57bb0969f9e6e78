"""Bad input: one clear line on stderr, exit status 2, and nothing half-written."""

import contextlib
import gzip
import io
import json
import re
import shutil
import sys
from unittest import mock

import jax.numpy as jnp
import pyarrow
import pytest
import tiny
from pyarrow import parquet

from l2s_jax.decoding.logits import truncate
from l2s_jax.files import read_json
from l2s_jax.settings.search import Search, changed

ROWS_OF_PEOPLE = (
    '{"words": "a", "reversed": ""}',
    '{"words": " ", "reversed": "a"}',
    '{"words": null, "reversed": "a"}',
    "",
    '{"words": "ok \\ud83d bad", "reversed": "bad \\ude00 ok"}',
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    config = tiny.write_task(root / "data")
    for split in ("train", "validation", "test"):
        with open(root / "data" / f"{split}.jsonl", "a", encoding="utf-8") as file:
            file.writelines(f"{row}\n" for row in ROWS_OF_PEOPLE)
    assert tiny.run(f"--config={config}", f"--workdir={root / 'run'}") == 0
    return root / "run"


@pytest.fixture
def task(tmp_path):
    return tiny.write_task(tmp_path / "data")


def refuse(capfd, *arguments):
    """Runs the command, which must fail; gives its one line."""
    capfd.readouterr()
    assert tiny.run(*arguments) == 2
    lines = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


OVERRIDES = {
    "unknown config key": ("--config.llm.model.widht=3", "no such setting, 'widht', .* 'width'"),
    "unknown config key of another kind": (
        "--config.slm.lora.dropout=0.1",
        "no such setting, 'dropout'; there are alpha, pattern, rank",
    ),
    "a field that the family lacks": ("--config.slm.model.num_layers=3", "num_layers"),
    "a number of more than 32 bits": (
        "--config.l2s.train.steps=3000000000",
        "config.l2s.train.steps=3000000000: it does not fit into 32 bits; expected an integer >= 1",
    ),
    "distances without buckets": (
        "--config.slm.model.max_distance=16",
        "config.slm.model.max_distance=16: expected more than half of num_buckets=32",
    ),
    "a pattern that matches nothing": (
        "--config.l2s.train.trainable=('nothing',)",
        r"config.l2s.train.trainable: 'nothing' matches none of \d+ parameters; the nearest: ",
    ),
    "a pattern of rates that matches nothing": (
        "--config.slm.train.learning_rate_scales=(('nothing',2.0),)",
        "config.slm.train.learning_rate_scales: 'nothing' matches none",
    ),
    "a metric without its checkpoint": (
        "--config.evaluation.metrics=('comet',)",
        r"config.evaluation.comet='' with metrics=\('comet',\): expected the folder",
    ),
    "no language": ("--config.task.language=Chinese", "language='Chinese': expected a code of"),
    "a tokenizer that sacreBLEU lacks": (
        "--config.evaluation.bleu_tokenizer=mecab",
        "bleu_tokenizer='mecab': expected one of .*ja-mecab",
    ),
    "value of the wrong type": ("--config.seed=abc", "config.seed=abc"),
    "unknown task source": ("--config.task.source=csv", "'csv'.*jsonl"),
    "unknown template field": ("--config.task.prompt={word}", "word"),
    "wrong response field": ("--config.task.response=answer", r"jsonl:1.*answer.*words"),
    "missing data directory": ("--config.task.data_dir=/nowhere", "/nowhere/train.jsonl"),
    "unknown label source": ("--config.labels.source=teacher", "labels.source='teacher'.*'llm'"),
    "a key that has moved": ("--config.labels=llm", "config.labels is now config.labels.source"),
    "a setting without effect": (
        "--config.labels.batch_size=8",
        "config.labels.batch_size=8: no effect with config.labels.source='data'",
    ),
    "unknown fusion": ("--config.l2s.fusion=concat", "concat.*add.*replace.*cross"),
    "unknown metric": ("--config.evaluation.metrics=('bleurt',)", "bleurt.*bleu"),
    "unknown split": ("--config.evaluation.split=dev", "split='dev': expected one of .*'test'"),
    "unknown optimizer": ("--config.l2s.train.optimizer=sgd", "sgd.*adamw"),
    "unknown schedule": ("--config.slm.train.schedule=linear", "linear.*cosine"),
    "unknown activation": ("--config.llm.model.activation=swish", "swish.*gated_gelu"),
    "half precision": ("--config.dtype=float16", "float16.*overflows"),
    "half precision of the encoder": (
        "--config.llm.encoder_dtype=float16",
        "config.llm.encoder_dtype='float16'.*overflows",
    ),
    "unknown dtype": ("--config.dtype=int8", "int8.*bfloat16"),
    "mesh of another size": ("--config.mesh.data=7", "data=7.*number of devices, 8, as in data=8,"),
    "mesh that doesn't divide a batch": (
        "--config.l2s.train.batch_size=12",
        "config.l2s.train.batch_size=12: mesh data=8.*multiple of 8, such as 16",
    ),
    "mesh that doesn't divide what is decoded": (
        "--config.decoding.batch_size=4",
        "config.decoding.batch_size=4: mesh data=8.*multiple of 8, such as 8",
    ),
    "decoding's mesh of another size": (
        "--config.decoding.mesh.tensor=3",
        "error: config.decoding.mesh: mesh data=-1, fsdp=1, tensor=3: the product must be the .* 8",
    ),
    "features' mesh without features": (
        "--config.features.mesh.tensor=2",
        "config.features.mesh.tensor=2: no effect with config.features.cache=''",
    ),
    "accumulation that doesn't divide": (
        "--config.llm.train.accumulation=3",
        "llm.train.batch_size=8: .*multiple of accumulation=3",
    ),
    "no steps": ("--config.slm.train.steps=0", "slm.train.steps=0: expected an integer >= 1"),
    "vocabulary larger than the text": (
        "--config.tokenizer.train_vocab_size=5000",
        "config.tokenizer.train_vocab_size=5000: .*5000.*too large",
    ),
    "vocabulary of the SLM larger than the text": (
        "--config.slm.tokenizer.train_vocab_size=5000",
        "config.slm.tokenizer.train_vocab_size=5000: .*too large: this text gives",
    ),
    "a batch larger than the data": (
        "--config.l2s.train.batch_size=128",
        "config.l2s.train.batch_size is 128, expected at most 64, the examples of the train split",
    ),
    "bucket smaller than the maximum": ("--config.buckets=((8,8),)", "8.*32"),
    "no new tokens": ("--config.decoding.max_new_tokens=0", "max_new_tokens=0"),
    "a layer that the llm does not have": (
        "--config.llm.layer=99",
        "config.llm.layer=99: expected 0, the encoder of a T5 has one output",
    ),
    "a flag of another mode": (
        "--topology=v5e:4x4",
        "--topology=v5e:4x4: expected --mode=plan, not train",
    ),
    "a flag of another mode, that lists": (
        "--search=num_beams=4,temperature=1",
        "--search=num_beams=4,temperature=1: expected --mode=generate, not train",
    ),
    "no such llm": ("--config.llm.path=/nowhere/t5", "/nowhere/t5"),
    "unknown mode": ("--mode=serve", "serve.*train"),
    "unknown flag": ("--wrokdir=x", "wrokdir"),
    "stray argument": ("stray", "stray"),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_refused_before_anything_is_trained(case, task, tmp_path, capfd):
    argument, message = OVERRIDES[case]
    workdir = tmp_path / "run"
    line = refuse(capfd, f"--config={task}", f"--workdir={workdir}", argument)
    assert re.search(message, line), line
    assert not list(workdir.glob("*/checkpoints"))
    assert not [
        path for path in workdir.glob("*/stage.json") if "tokenizer" not in path.parent.name
    ]


def test_a_batch_larger_than_what_is_left_of_the_data_is_named(task, tmp_path, capfd):
    drop = ("--config.task.cut_responses=drop", "--config.max_response_tokens=2")
    batch = "--config.llm.train.batch_size=16"
    line = refuse(capfd, f"--config={task}", f"--workdir={tmp_path / 'run'}", *drop, batch)
    assert "config.llm.train.batch_size is 16, expected at most 11, the" in line


def test_a_finished_run_counts_its_examples_where_batches_are_new(finished, tmp_path, capfd):
    shutil.copytree(finished.parent, tmp_path / "copy")
    data, run = str(tmp_path / "copy/data"), tmp_path / "copy/run"
    config = f"--config={tmp_path / 'copy/data/tiny.py'}"
    path = tmp_path / "copy/data/tiny.py"
    path.write_text(path.read_text().replace(str(finished.parent / "data"), data))
    before = sorted(path.name for path in run.iterdir())
    line = refuse(capfd, config, f"--workdir={run}", "--config.slm.train.batch_size=128")
    assert "config.slm.train.batch_size is 128, expected at most 65," in line
    assert sorted(path.name for path in run.iterdir()) == before
    # What is there needs no data to be read.
    (tmp_path / "copy/data/train.jsonl").unlink()
    assert tiny.run(config, f"--workdir={run}") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["features.cache=CACHE", "features.mesh.data=3"],
            "config.features.mesh: mesh data=3, fsdp=1, tensor=1: the product must be the number",
        ),
        (
            ["mesh.data=2", "mesh.tensor=4", "decoding.mesh.data=8", "decoding.mesh.tensor=1",
             "decoding.batch_size=4"],
            "config.decoding.mesh: config.decoding.batch_size=4: mesh data=8, fsdp=1, tensor=1 "
            "splits a batch between 8 devices",
        ),
        (
            ["mesh.data=2", "mesh.tensor=4", "features.mesh.data=8", "features.mesh.tensor=1",
             "features.cache=CACHE", "l2s.train.batch_size=4"],
            "config.features.mesh: config.l2s.train.batch_size=4: mesh data=8, fsdp=1, tensor=1 "
            "splits a batch between 8 devices",
        ),
        (
            ["slm.model.feed_forward_width=36", "decoding.mesh.data=1", "decoding.mesh.tensor=8"],
            "config.decoding.mesh: mesh data=1, fsdp=1, tensor=8: slm/decoder/layers_0/"
            "feed_forward/wi/kernel [16, 36] does not divide into tensor=8",
        ),
        (
            ["llm.model.feed_forward_width=36", "features.cache=CACHE", "features.mesh.data=1",
             "features.mesh.tensor=8"],
            "config.features.mesh: mesh data=1, fsdp=1, tensor=8: encoder/layers_0/"
            "feed_forward/wi/kernel [16, 36] does not divide into tensor=8",
        ),
        (
            ["slm.model.feed_forward_width=36", "mesh.data=1", "mesh.tensor=8"],
            "error: mesh data=1, fsdp=1, tensor=8: slm/decoder/",
        ),
        (
            ["mesh.data=2", "mesh.sequence=4", "max_prompt_tokens=28"],
            "error: config.max_prompt_tokens: prompts of 28 tokens, which mesh data=2, fsdp=1, "
            "sequence=4, tensor=1 takes in 8 parts; expected a multiple of 8",
        ),
        (
            ["mesh.data=2", "mesh.sequence=4", "buckets=((12, 32), (32, 32))"],
            "error: config.buckets: prompts of 12 tokens, which mesh data=2, fsdp=1, sequence=4",
        ),
        (
            ["max_prompt_tokens=28", "decoding.mesh.data=2", "decoding.mesh.sequence=4"],
            "error: config.decoding.mesh: config.max_prompt_tokens: prompts of 28 tokens, which",
        ),
    ],
)  # fmt: skip
def test_a_mesh_that_a_stage_cannot_use_is_refused_before_anything_is_trained(
    flags, message, task, tmp_path, capfd
):
    given = [f"--config.{flag}".replace("CACHE", str(tmp_path / "cache")) for flag in flags]
    line = refuse(capfd, f"--config={task}", f"--workdir={tmp_path / 'run'}", *given)
    assert message in line
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.parametrize("override", [[], ["--config.l2s.train.steps=5"]])
@pytest.mark.parametrize("is_folder", [False, True])
def test_no_such_config(is_folder, override, tmp_path, capfd):
    config = tmp_path / "none.py"
    if is_folder:
        config.mkdir()
    line = refuse(capfd, f"--config={config}", f"--workdir={tmp_path / 'run'}", *override)
    assert line == f"error: --config={config}: no such file"


def test_no_workdir(task, capfd):
    assert refuse(capfd, f"--config={task}").startswith("error: --workdir: expected a folder")


def lines_of(path):
    return path.read_text().splitlines()


def broken_json(data):
    lines = lines_of(data / "train.jsonl")
    (data / "train.jsonl").write_text("\n".join([*lines[:4], "{", *lines[5:]]))
    return (), r"train\.jsonl:5"


def empty_prompt(data):
    record = json.dumps({"words": " ", "reversed": "x"})
    (data / "train.jsonl").write_text("\n".join([*lines_of(data / "train.jsonl")[:9], record]))
    return ("--config.task.blank_rows=error",), r"train\.jsonl:10.*empty prompt"


def broken_gzip(data):
    whole = gzip.compress((data / "train.jsonl").read_bytes())
    (data / "train.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    return ("--config.task.splits.train=train.jsonl.gz",), r"train\.jsonl\.gz.*gzip"


def missing_file(data):
    (data / "validation.jsonl").unlink()
    return (), r"validation\.jsonl"


def empty_file(data):
    (data / "train.jsonl").write_text("")
    return (), "train.*empty"


def misaligned_lines(data):
    (data / "a.txt").write_text("one\ntwo\n")
    (data / "b.txt").write_text("uno\n")
    text = (data / "tiny.py").read_text()
    text = text.replace('source = "jsonl"', 'source = "text"')
    for split in ("train", "validation", "test"):
        text = text.replace(f'"{split}.jsonl"', '{"words": "a.txt", "reversed": "b.txt"}')
    (data / "tiny.py").write_text(text)
    return (), r"b\.txt has 1, .*a\.txt has 2"


def too_few_examples(data):
    (data / "train.jsonl").write_text("\n".join(lines_of(data / "train.jsonl")[:30]))
    return ("--config.llm.train.batch_size=32",), "batch_size is 32.*30"


@pytest.mark.parametrize(
    "damage",
    [
        broken_json,
        empty_prompt,
        broken_gzip,
        missing_file,
        empty_file,
        misaligned_lines,
        too_few_examples,
    ],
)
def test_bad_data(damage, task, tmp_path, capfd):
    arguments, message = damage(task.parent)
    line = refuse(capfd, f"--config={task}", f"--workdir={tmp_path / 'run'}", *arguments)
    assert re.search(message, line), line
    assert not list((tmp_path / "run").glob("*/checkpoints"))


def test_rows_that_people_have_are_trained_on_and_answered(finished):
    answers = [json.loads(line) for line in lines_of(finished / "predictions" / "l2s.jsonl")]
    assert len(answers) == 11 + 1
    assert answers[-1]["prompt"] == "reverse: ok \ufffd bad"
    assert answers[-1]["references"] == ["bad \ufffd ok"]


def test_json_that_is_nested_too_deep_is_one_line(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[" * 10**5)
    with pytest.raises(ValueError, match=r"config\.json: not readable as JSON: .*recursion"):
        read_json(str(path))


def no_config_file(run):
    (run / "config.json").unlink()
    return "config.json"


def no_model(run):
    shutil.rmtree(run / "l2s/model")
    return "l2s/model"


def truncated_weights(run):
    path = run / "l2s/model/params.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    return r"params\.safetensors"


def another_architecture(run):
    path = run / "llm/model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "bert"}))
    return "model_type is 'bert'"


def another_llm(run):
    # One float of the LLM changes: the file still loads, but it is another model.
    path = run / "llm/model/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    return "not the one that"


def vocabulary_that_does_not_fit(run):
    path = run / "llm/model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 31}))
    return r"shape \[30, 16\], expected \[31, 16\]"


@pytest.mark.parametrize(
    "damage",
    [
        no_config_file,
        no_model,
        truncated_weights,
        another_architecture,
        another_llm,
        vocabulary_that_does_not_fit,
    ],
)
def test_damaged_workdir(damage, finished, tmp_path, capfd):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    message = damage(run)
    source, target = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("one two\n")
    target.write_text("precious\n")
    line = refuse(
        capfd, f"--workdir={run}", "--mode=generate", f"--input={source}", f"--output={target}"
    )
    assert re.search(message, line), line
    assert target.read_text() == "precious\n"


INPUTS = {
    "not UTF-8": (b"one\n\xff\xfe\n", "in.txt", r"in\.txt:2.*UTF-8"),
    "not JSON": (b'{"words": "one"}\n{"words"\n', "in.jsonl", r"in\.jsonl:2.*JSON"),
    "no object": (b'["one"]\n', "in.jsonl", r"in\.jsonl:1.*JSON object"),
    "nested too deep": (b'{"words": ' + b"[" * 10**5, "in.jsonl", r"in\.jsonl:1: malformed JSON"),
    "broken gzip": (gzip.compress(b"one\n" * 99)[:20], "in.txt.gz", r"in\.txt\.gz: broken gzip"),
    "no Parquet": (b"PAR1", "in.parquet", r"in\.parquet: no Parquet file"),
    "missing field": (b'{"text": "one"}\n', "in.jsonl", r"in\.jsonl:1.*words"),
    "field that is no string": (b'{"words": 1}\n', "in.jsonl", r"in\.jsonl:1.*words"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_bad_generation_input(case, finished, tmp_path, capfd):
    content, name, message = INPUTS[case]
    (tmp_path / name).write_bytes(content)
    target = tmp_path / "out"
    line = refuse(
        capfd,
        f"--workdir={finished}",
        "--mode=generate",
        f"--input={tmp_path / name}",
        f"--output={target}",
    )
    assert re.search(message, line), line
    assert not target.exists()


def answers(finished, source, *flags, stdin=None):
    """What the command writes to stdout for a file, or for bytes on stdin."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # whatever the locale
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "stdout", stdout))
        if stdin is not None:
            fake = io.TextIOWrapper(io.BytesIO(stdin))
            stack.enter_context(mock.patch.object(sys, "stdin", fake))
        sampled = "--search=temperature=2,top_k=20"
        flags = (f"--workdir={finished}", "--mode=generate", f"--input={source}", sampled, *flags)
        assert tiny.run(*flags) == 0
        stdout.flush()
        return stdout.buffer.getvalue().decode().split("\n")[:-1]


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_file_is_read_alike_however_it_is_packed_and_ends_its_lines(
    compress, finished, tmp_path, caplog
):
    suffix = ".gz" if compress is gzip.compress else ""
    plain = tmp_path / "plain.txt"
    plain.write_bytes(b"one two\nanother\nthree")
    one, _, three = answers(finished, plain)
    assert one and three
    text = compress(b"\xef\xbb\xbfone two\r\n\r\nthree\n \n")
    (tmp_path / f"in.txt{suffix}").write_bytes(text)
    # A blank line has a line of its own in what comes out.
    expected = [one, "", three, ""]
    assert answers(finished, tmp_path / f"in.txt{suffix}") == expected
    assert caplog.messages[-1].endswith(f"in.txt{suffix}: 2 of 4 prompts are blank")
    assert answers(finished, "-", stdin=text) == expected
    assert answers(finished, "-", "--stream", stdin=text) == expected

    def responses(*arguments, **stdin):
        lines = [json.loads(line) for line in answers(finished, *arguments, **stdin)]
        assert [line["words"] for line in lines] == ["one two", "", "three"]
        return [line["response"] for line in lines]

    # A blank line of JSON Lines is none, as in training; a blank prompt has its line.
    records = b'\xef\xbb\xbf{"words": "one two"}\r\n\r\n{"words": ""}\n{"words": "three"}\n\n'
    (tmp_path / f"in.jsonl{suffix}").write_bytes(compress(records))
    assert responses(tmp_path / f"in.jsonl{suffix}") == [one, "", three]
    assert responses("-", "--jsonl", stdin=compress(records)) == [one, "", three]
    table = pyarrow.table({"words": ["one two", "", "three"], "n": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "in.parquet")
    assert responses(tmp_path / "in.parquet") == [one, "", three]


def test_a_blank_prompt_is_an_error_where_blank_rows_are(finished, tmp_path, capfd):
    source, target = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("one\n\n")
    flags = (f"--input={source}", f"--output={target}", "--config.task.blank_rows=error")
    config = f"--config={finished.parent / 'data' / 'tiny.py'}"
    line = refuse(capfd, config, f"--workdir={finished}", "--mode=generate", *flags)
    assert "in.txt:2: empty prompt" in line
    assert not target.exists()


def test_half_a_character_anywhere_in_a_record_loses_no_answer(finished, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(
        '{"words": "one \\ud83d", "note": ["\\ude00"], "\\udc00": null}\n{"words": "two"}\n'
    )
    first, second = (json.loads(line) for line in answers(finished, source))
    assert set(first) == {"words", "note", "\ufffd", "response", "cut"}
    assert first["words"] == "one \ufffd" and first["note"] == ["\ufffd"]
    assert second["words"] == "two"


def test_fields_of_a_record_with_names_of_an_answers_are_kept(finished, tmp_path):
    source = tmp_path / "in.jsonl"
    own = {"response": "theirs", "score": 3, "input_score": 4, "words": "one two"}
    source.write_text(json.dumps(own) + '\n{"words": "one two"}\n')
    first, second = (json.loads(line) for line in answers(finished, source))
    assert first.pop("input_response") == "theirs"
    assert (first.pop("input_score"), first.pop("input_input_score")) == (4, 3)
    assert first.keys() == second.keys() == {"words", "response", "cut"}
    assert first["response"] != "theirs"


def test_seeds_begin_again_after_the_largest(finished, tmp_path):
    source = tmp_path / "in.txt"
    source.write_text("one\none\n")
    sampled = ("--search=temperature=2.0",)
    _, second = answers(finished, source, *sampled, f"--seed={2**32 - 1}")
    assert second == answers(finished, source, *sampled, "--seed=0")[0]


def test_missing_generation_input(finished, tmp_path, capfd):
    line = refuse(
        capfd, f"--workdir={finished}", "--mode=generate", f"--input={tmp_path / 'none.txt'}"
    )
    assert "none.txt" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--search=beams=4"], "no setting 'beams'.*num_beams"),
        (["--search=num_beams"], "'num_beams': expected settings such as num_beams=4"),
        (["--search=num_beams=four"], "num_beams='four': expected an integer"),
        (["--search=early_stopping=1"], "early_stopping='1': expected true or false"),
        (["--search=top_p=2"], "top_p=2.0: expected a number above 0"),
        (["--search=num_beams=2", "--stop=x"], "num_beams=2 with stop"),
        (["--weights=int4"], "int4.*should be one of|expected one of"),
        (
            ["--max_new_tokens=9"],
            "--max_new_tokens=9: expected at most config.decoding.max_new_tokens=8",
        ),
        (["--stream", "--output=out.txt"], "--stream writes text to stdout"),
        (["--stream", "--jsonl"], "--stream writes text to stdout"),
        (["--stream", "--search=num_beams=2"], "--stream with num_beams=2: expected one of them"),
        (["--search=temperature=1", "--seed=-1"], r"seed=-1.*\[0, 4294967295\]"),
        (
            ["--config.decoding.mesh.tensor=3"],
            "config.decoding.mesh: mesh data=-1, fsdp=1, tensor=3: the product must",
        ),
        (
            ["--config.decoding.mesh.data=8", "--config.decoding.batch_size=4"],
            "config.decoding.mesh: config.decoding.batch_size=4: mesh data=8",
        ),
    ],
)
def test_bad_decoding_settings(flags, message, finished, tmp_path, capfd):
    source = tmp_path / "in.txt"
    source.write_text("one\n")
    if any(flag.startswith("--config.") for flag in flags):
        flags = [f"--config={finished.parent / 'data' / 'tiny.py'}", *flags]
    line = refuse(capfd, f"--workdir={finished}", "--mode=generate", f"--input={source}", *flags)
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("search.num_beams=0", "config.decoding.search.num_beams=0: expected an integer >= 1"),
        ("weights=int4", "config.decoding.weights='int4': expected one of ('float', 'int8')"),
    ],
)
def test_bad_decoding_settings_in_the_config(setting, message, tmp_path, capfd):
    config = tiny.write_task(tmp_path / "task")
    line = refuse(
        capfd,
        f"--config={config}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.decoding.{setting}",
    )
    assert message in line


def test_an_output_that_cannot_be_written_is_found_before_generating(finished, tmp_path, capfd):
    source, kept = tmp_path / "in.txt", tmp_path / "kept"
    source.write_text("one\n")
    kept.mkdir()
    flags = (f"--workdir={finished}", "--mode=generate", f"--input={source}")
    loading = "l2s_jax.serving.generate_file.load_generator"
    for target in (tmp_path / "none" / "out.txt", source / "out.txt", kept):
        with mock.patch(loading, side_effect=AssertionError("read a model")):
            line = refuse(capfd, *flags, f"--output={target}")
        assert f"{target}: cannot write the output: " in line
    assert sorted(tmp_path.iterdir()) == [source, kept] and not list(kept.iterdir())


def test_an_output_that_was_there_is_kept_by_a_run_that_fails(finished, tmp_path, capfd):
    source, target = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("one\n")
    target.write_text("from before\n")
    flags = (f"--workdir={finished}", "--mode=generate", f"--input={source}")
    assert "expected at most" in refuse(capfd, *flags, f"--output={target}", "--max_new_tokens=9")
    assert target.read_text() == "from before\n"
    assert sorted(tmp_path.iterdir()) == [source, target]
    assert tiny.run(*flags, f"--output={target}") == 0
    assert target.read_text() != "from before\n"
    assert sorted(tmp_path.iterdir()) == [source, target]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_p": 0.9}, "top_p=0.9 with temperature=0.0: expected top_p=1.0, or a temperature ab"),
        ({"top_k": 3}, "top_k=3 with temperature=0.0: expected top_k=0, or a temperature above 0"),
        *(
            ({name: value, "num_beams": 2}, f"num_beams=2 with {name}={value}: expected {name}=")
            for name, value in {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1}.items()
        ),
        ({"length_penalty": 0.6}, "length_penalty=0.6 with num_beams=1: expected length_penalty=1"),
        (
            {"early_stopping": True, "temperature": 1.0},
            "early_stopping=True with num_beams=1: expected early_stopping=False, or num_beams ab",
        ),
        ({"temperature": 1e-50}, "temperature=1e-50: expected a number >= 0, and at least 0.001"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Search(**fields)
    assert "\n" not in str(error.value)


def test_a_search_that_is_turned_off_takes_its_settings_with_it():
    beams = {"num_beams": 4, "length_penalty": 0.6, "num_return": 2, "repetition_penalty": 1.2}
    assert changed(beams, {"num_beams": 1}) == Search(repetition_penalty=1.2)
    assert changed({"temperature": 0.8, "top_p": 0.9}, {"temperature": 0.0}) == Search()
    assert changed({"temperature": 0.8}, {"top_p": 0.9}) == Search(temperature=0.8, top_p=0.9)
    for settings, changes, name in (
        (beams, {"num_beams": 1, "length_penalty": 0.6}, "length_penalty"),
        ({"top_p": 0.9}, {"repetition_penalty": 1.2}, "top_p"),
    ):
        with pytest.raises(ValueError, match=name):
            changed(settings, changes)


def test_the_lowest_temperature_gives_numbers():
    logits = jnp.asarray([[3e4, -3e4, 2.9e4, 0.0]])
    search = Search(temperature=1e-3, top_k=3, top_p=0.9, min_p=0.1)
    scaled = truncate(search, logits)
    assert not jnp.isnan(scaled).any() and int(jnp.argmax(scaled)) == 0
    assert jnp.isfinite(scaled[0, 0])
