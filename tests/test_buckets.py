"""Everything in a bucket, as on a disk, of a store that fails now and then."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small
import tiny
from emulator import AT
from safetensors.numpy import load

from l2s_jax import buckets, copies, files
from l2s_jax.checkpoints import pretrained
from l2s_jax.tokenizers import load_tokenizer
from l2s_jax.tokenizers.cut import CutTokenizer, choose, count
from l2s_jax.tokenizers.sentencepiece import train_sentencepiece
from l2s_jax.training import meter

TESTS = Path(__file__).parent


def lines_of(directory):
    text = files.read_text(f"{directory}/metrics.jsonl")
    lines = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k not in meter.TIMES} for line in lines]


def flags(config, workdir, data):
    return [
        *(f"--config={config}", f"--workdir={workdir}", f"--config.task.data_dir={data}"),
        *(f"--config.features.cache={workdir}/cache", "--config.labels.source=llm"),
        "--config.distillation.weight=0.5",
    ]


def kill(arguments, workdir, place):
    """A run that is killed as soon as an object is there."""
    code = "import sys, tiny; sys.exit(tiny.run(*sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not buckets.is_object(f"{workdir}/{place}"):
        time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, said
    # Nobody waits for a minute here, after which a lock is stale.
    for name in buckets.names(workdir):
        if name.startswith(".lock"):
            buckets.remove(f"{workdir}/{name}")


@pytest.fixture(scope="module")
def runs(store, tmp_path_factory):
    """The workdirs of a run on a disk, and of the same in a bucket, which also has its data.

    The one in the bucket is killed in two stages, and evaluated by a command of its own.
    """
    root = tmp_path_factory.mktemp("runs")
    config = tiny.write_task(root / "data")
    for path in (root / "data").glob("*.jsonl"):
        buckets.send(str(path), f"{AT}/data/{path.name}")
    disk, bucket = str(root / "disk"), f"{AT}/runs/tiny"
    assert tiny.run(*flags(config, disk, root / "data")) == 0
    arguments = flags(config, bucket, f"{AT}/data")
    kill(arguments, bucket, "llm/checkpoints/2/_CHECKPOINT_METADATA")
    kill(arguments, bucket, "slm/metrics.jsonl")
    assert tiny.run(*arguments, "--until=l2s") == 0
    assert tiny.run(f"--workdir={bucket}", "--mode=evaluate") == 0
    return disk, bucket, root


def test_a_killed_run_in_a_bucket_gives_what_it_gives_on_a_disk(runs):
    disk, bucket, _ = runs
    for stage, stem in (("llm", "model"), ("slm", "model"), ("l2s", "params")):
        path = f"{stage}/model/{stem}.safetensors"
        ours, theirs = (load(files.read_bytes(f"{run}/{path}")) for run in (bucket, disk))
        assert {name: value.tobytes() for name, value in ours.items()} == {
            name: value.tobytes() for name, value in theirs.items()
        }
        assert lines_of(f"{bucket}/{stage}") == lines_of(f"{disk}/{stage}")
        answers = f"predictions/{stage}.jsonl"
        assert files.read_bytes(f"{bucket}/{answers}") == files.read_bytes(f"{disk}/{answers}")
    there = buckets.objects(bucket)
    assert not [name for name in there if ".tmp" in name or ".lock" in name or ".probe" in name]
    assert sum("events.out.tfevents" in name for name in there) >= 3
    ours, theirs = (files.read_json(f"{run}/report.json")["systems"] for run in (bucket, disk))
    assert {name: one["quality"] for name, one in ours.items()} == {
        name: one["quality"] for name, one in theirs.items()
    }


def test_what_is_done_is_found_generated_from_and_copied(runs, capsys):
    disk, bucket, root = runs
    assert tiny.run(f"--workdir={bucket}", "--mode=status") == 0
    states = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert set(states) == {"done"}
    prompts = b"one two\nthree\n"
    buckets.write(f"{AT}/in.txt", prompts)
    (root / "in.txt").write_bytes(prompts)
    for run, place in ((bucket, AT), (disk, root)):
        files_of = (f"--input={place}/in.txt", f"--output={place}/out.txt")
        assert tiny.run(f"--workdir={run}", "--mode=generate", *files_of) == 0
    assert buckets.read(f"{AT}/out.txt") == (root / "out.txt").read_bytes()
    # The content of models is not read again where nothing has changed.
    fetched = []
    fetch = buckets.fetch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            buckets, "fetch", lambda path, file: (fetched.append(path), fetch(path, file))
        )
        patch.setattr(copies, "_KEPT_SECONDS", -1.0)
        assert tiny.run(f"--workdir={bucket}", "--mode=status") == 0
    assert not [path for path in fetched if path.endswith(".safetensors")]


def test_a_model_is_saved_to_a_bucket_and_never_over_another(store):
    config, folder = small.t5_config(), f"{AT}/saved"
    params = small.t5_params(config)
    pretrained.save_native(config, params, folder)
    small.assert_same(pretrained.load_native(folder)[1], params)
    pretrained.save_native(config, params, f"{folder}-in-parts", max_shard_size="5KB")
    small.assert_same(pretrained.load_native(f"{folder}-in-parts")[1], params)
    assert len(files.matching_names(f"{folder}-in-parts", "params-*-of-*.safetensors")) > 1
    with pytest.raises(FileExistsError) as raised:
        pretrained.save_native(config, params, folder)
    assert raised.value.filename == folder
    assert not Path("s3:").exists()
    # A folder may be named with a slash at its end.
    pretrained.save_native(config, params, f"{AT}/slash/")
    with files.atomic_directory(f"{AT}/made/") as temporary:
        Path(temporary, "config.json").write_text("{}")
    assert files.read_json(f"{AT}/made/config.json") == {}
    small.assert_same(pretrained.load_native(f"{AT}/slash/")[1], params)
    names = [name for name in buckets.objects(AT) if name.startswith(("slash", "made"))]
    assert names == ["made/config.json", *(f"slash/{n}" for n in files.listed_names(folder))]
    # What is there without a model is the user's too.
    buckets.write(f"{AT}/theirs/notes.txt", b"notes")
    with pytest.raises(FileExistsError):
        pretrained.save_native(config, params, f"{AT}/theirs")
    assert buckets.read(f"{AT}/theirs/notes.txt") == b"notes"


def test_a_cut_vocabulary_comes_out_of_a_bucket(store, tmp_path):
    whole = train_sentencepiece(["one two three"] * 3, vocab_size=13, directory=str(tmp_path))
    cut = CutTokenizer(whole, choose(whole, count(whole, whole.encode_responses(["one"]))))
    cut.save(str(tmp_path))
    buckets.send_folder(str(tmp_path), f"{AT}/cut", "spiece.model")
    found = load_tokenizer(f"{AT}/cut")
    assert found.identity == cut.identity != whole.identity
