"""Names on the hub in the place of folders, and models of ours published there.

Against a small server on this machine, each process with a cache of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ggufs
import hf
import hub_server
import pytest
import tiny
import yaml

from l2s_jax.checkpoints.files import content_hash
from l2s_jax.tokenizers import load_tokenizer
from l2s_jax.tokenizers.cut import CutTokenizer, choose, count
from l2s_jax.tokenizers.sentencepiece import train_sentencepiece

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hub():
    with hub_server.serving() as hub:
        yield hub


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A T5 with a tokenizer, with pickles and a card beside it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "t5"
    hf.make_t5(str(folder), vocab_size=30)
    train_sentencepiece(
        [*tiny.WORDS, "reverse:"], vocab_size=24, directory=str(folder), model_type="unigram"
    )
    (folder / "pytorch_model.bin").write_bytes(b"\0" * 100)
    (folder / "tf_model.h5").write_bytes(b"\0" * 100)
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# A T5\n")
    return folder


def environment(hub, home, **changes):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    paths = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    return kept | paths | {"HF_HUB_DISABLE_XET": "1"} | changes


def run(hub, home, *arguments, module="l2s_jax.convert", **changes):
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
        command, env=environment(hub, home, **changes), capture_output=True, text=True
    )


def python(hub, home, program, *arguments, **changes):
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(
        command, env=environment(hub, home, **changes), capture_output=True, text=True
    )


HASHES = """
import sys
from l2s_jax.checkpoints.files import content_hash
from l2s_jax.tokenizers import load_tokenizer
for name in sys.argv[1:]:
    try:
        print(content_hash(name), load_tokenizer(name).fingerprint)
    except ValueError as error:
        print(error)
"""


def test_a_name_is_enough(hub, checkpoint, tmp_path):
    first = hub["org/t5"].add(checkpoint, "v1.0")
    changed = shutil.copytree(checkpoint, tmp_path / "changed")
    hf.make_t5(str(changed), vocab_size=30, seed=1)
    second = hub["org/t5"].add(changed, "main")
    hub["org/t5"].refs["v1.0"] = first
    home = tmp_path / "home"
    tokenizer = load_tokenizer(str(checkpoint)).fingerprint
    new, old = (f"{content_hash(str(folder))} {tokenizer}" for folder in (changed, checkpoint))
    done = python(hub, home, HASHES, "org/t5", "org/t5@v1.0", f"org/t5@{first}")
    assert done.stdout.splitlines() == [new, old, old], done.stderr
    assert not {name for name in hub.fetched() if name.endswith((".bin", ".h5"))}
    # What is in the cache is there without the hub too, and nothing else is.
    hub.requests.clear()
    names = ("org/t5", f"org/t5@{second}", "org/other")
    done = python(hub, home, HASHES, *names, HF_HUB_OFFLINE="1")
    assert done.stdout.splitlines()[:2] == [new, new] and not hub.requests
    assert "HF_HUB_OFFLINE" in done.stdout.splitlines()[2]
    done = python(hub, home, HASHES, *names, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.stdout.splitlines()[:2] == [new, new], done.stderr
    assert "can't be reached" in done.stdout.splitlines()[2]
    output = tmp_path / "output"
    done = run(hub, home, "--input=org/t5@v1.0", f"--output={output}", "--to=hf")
    assert done.returncode == 0, done.stderr
    assert (output / "spiece.model").read_bytes() == (checkpoint / "spiece.model").read_bytes()


def test_only_what_is_needed_is_fetched(hub, checkpoint, tmp_path):
    hub["org/parts"].add(checkpoint)
    hub.requests.clear()
    program = (
        "from l2s_jax.checkpoints.pretrained import read_config\n"
        "from l2s_jax.tokenizers import load_tokenizer\n"
        "print(read_config('org/parts').vocab_size)\n"
    )
    done = python(hub, tmp_path / "home", program)
    assert done.stdout == "30\n", done.stderr
    assert hub.fetched() <= {"config.json", "generation_config.json", "SHA256SUMS"}
    done = python(hub, tmp_path / "home", program + "print(load_tokenizer('org/parts').eos_id)")
    assert done.stdout == "30\n1\n", done.stderr
    assert "spiece.model" in hub.fetched()
    assert not {name for name in hub.fetched() if name.endswith(".safetensors")}


def test_a_cut_vocabulary_comes_along(hub, checkpoint, tmp_path):
    whole = load_tokenizer(str(checkpoint))
    folder = shutil.copytree(checkpoint, tmp_path / "cut")
    CutTokenizer(whole, choose(whole, count(whole, whole.encode_responses(["one"])))).save(
        str(folder)
    )
    cut = load_tokenizer(str(folder))
    assert cut.vocab_size < whole.vocab_size
    hub["org/cut"].add(folder)
    program = (
        "import os\n"
        "from l2s_jax.hub import find\n"
        "from l2s_jax.tokenizers import load_tokenizer\n"
        "print(load_tokenizer('org/cut').identity)\n"
        "print('vocabulary.json' in os.listdir(find('org/cut')))\n"
    )
    done = python(hub, tmp_path / "home", program)
    assert done.stdout.split() == [cut.identity, "True"], done.stderr


def test_what_goes_wrong_is_one_line(hub, checkpoint, tmp_path):
    hub["org/gated"].add(checkpoint)
    hub["org/gated"].gated = True
    hub["org/pickles"].commit({"config.json": b"{}", "pytorch_model.bin": b"x"})
    hub["org/ggufs"].commit({"README.md": b"", "model.Q4_K.gguf": b"x"})
    hub["org/private"].add(checkpoint)
    hub["org/private"].token = "hf_secret"
    hub["org/there"].add(checkpoint)
    expected = {
        "org/none": ("no such directory", "no such repository"),
        "org/private": ("wants a token",),
        "org/gated": ("gated", "hf auth login"),
        "org/there@v9": ("no revision 'v9'",),
        "org/pickles": ("pytorch_model.bin", "safetensors"),
        "org/ggufs": ("GGUF files only", "model.Q4_K.gguf"),
        "./org/there": ("no such directory",),
        "/org/there": ("no such directory",),
        "a/b/c": ("no such directory",),
    }
    program = f"""
import sys
from l2s_jax import convert
for name in sys.argv[1:]:
    status = convert.main([f"--input={{name}}", "--output={tmp_path / "out"}"])
    print(status, file=sys.stderr)
"""
    done = python(hub, tmp_path / "home", program, *expected)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ") or line == "2"]
    assert lines[1::2] == ["2"] * len(expected) and len(lines) == 2 * len(expected), done.stderr
    for line, (name, texts) in zip(lines[::2], expected.items(), strict=True):
        assert line.startswith(f"error: {name}: ") and all(text in line for text in texts), line
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    done = python(hub, tmp_path / "home", HASHES, "org/private", HF_TOKEN="hf_secret")
    assert done.stdout.startswith(content_hash(str(checkpoint))), done.stdout


def test_a_full_disk(hub, checkpoint, tmp_path):
    hub["org/full"].add(checkpoint)
    program = (
        "import builtins, errno, sys\n"
        "from l2s_jax.checkpoints.files import content_hash\n"
        "real = builtins.open\n"
        "class Full:\n"
        "    def __init__(self, file): self._file = file\n"
        "    def __getattr__(self, name): return getattr(self._file, name)\n"
        "    def __enter__(self): return self\n"
        "    def __exit__(self, *_): self._file.close()\n"
        "    def write(self, data): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "import pathlib\n"
        "def opened(path, mode='r', *a, **k):\n"
        "    file = real(path, mode, *a, **k)\n"
        "    return Full(file) if str(path).endswith('.incomplete') else file\n"
        "builtins.open = opened\n"
        "pathlib.Path.open = lambda self, mode='r', *a, **k: opened(self, mode, *a, **k)\n"
        "try:\n"
        "    content_hash('org/full')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    home = tmp_path / "home"
    done = python(hub, home, program)
    assert done.stdout.startswith("org/full: the disk is full"), done.stdout + done.stderr
    # What did not come is not taken for what there is.
    done = python(hub, home, HASHES, "org/full", HF_HUB_OFFLINE="1")
    assert "not as a whole" in done.stdout
    done = python(hub, home, HASHES, "org/full")
    assert done.stdout.startswith(content_hash(str(checkpoint))), done.stdout


def test_a_prepared_cache_needs_no_server(hub, checkpoint, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "home/hub/models--org--prepared"
    shutil.copytree(checkpoint, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = run(hub, tmp_path / "home", "--input=org/prepared", "--inspect", **offline)
    assert done.returncode == 0 and "token_embedding" in done.stdout, done.stderr


CHANGES = """

base_config = get_config


def get_config():
    config = base_config()
    config.llm = default().llm
    config.llm.path = "org/llm@v2"
    config.tokenizer.train_vocab_size = 0
    return config
"""


def test_a_run_from_the_hub_and_back(hub, checkpoint, tmp_path):
    commit = hub["org/llm"].add(checkpoint, "v2")
    config = tiny.write_task(tmp_path / "task")
    config.write_text(config.read_text() + CHANGES)
    workdir, home = tmp_path / "run", tmp_path / "home"
    flags = (f"--config={config}", f"--workdir={workdir}")
    done = run(hub, home, *flags, module="l2s_jax.main")
    assert done.returncode == 0, done.stderr
    name = f"org/llm@{commit}"
    for stage in ("slm", "l2s"):
        assert json.loads((workdir / stage / "stage.json").read_text())["sources"] == {"llm": name}
    model = workdir / "l2s/model"
    assert json.loads((model / "config.json").read_text())["llm"]["path"] == name
    made = json.loads((model / "generation_config.json").read_text())
    assert made == {
        "max_new_tokens": 8,
        "do_sample": False,
        "num_beams": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "min_new_tokens": 0,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
    }
    card = (model / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert name in card
    assert head["library_name"] == "l2s_jax" and head["pipeline_tag"] == "text-generation"
    assert head["base_model"] == ["org/llm"] and head["datasets"] == ["reverse"]
    assert (head["license"], head["language"]) == ("mit", ["en"])
    (result,) = head["model-index"][0]["results"]
    report = json.loads((workdir / "report.json").read_text())
    assert {m["type"]: m["value"] for m in result["metrics"]} == {
        metric: round(value, 2) for metric, value in report["systems"]["l2s"]["quality"].items()
    }
    # A later run, without the hub, finds all of it done.
    offline = {"HF_HUB_OFFLINE": "1"}
    done = run(hub, home, *flags, "--mode=status", module="l2s_jax.main", **offline)
    assert done.returncode == 0 and "stale" not in done.stdout, done.stdout + done.stderr
    done = run(hub, tmp_path / "empty", *flags, "--mode=status", module="l2s_jax.main", **offline)
    assert "Traceback" not in done.stderr
    # Published, and copied.
    program = f"""
import l2s_jax
model = l2s_jax.load({str(model)!r})
before = model.generate(["reverse: one two three"])
print(model.push_to_hub("me/small", private=True))
model.push_to_hub("me/parts", include_llm=True, max_shard_size="5KB")
model.save_pretrained({str(tmp_path / "copy")!r}, include_llm=True)
for where in ("me/small", "me/parts", {str(tmp_path / "copy")!r}):
    assert l2s_jax.load(where).generate(["reverse: one two three"]) == before
try:
    model.save_pretrained({str(tmp_path / "copy")!r})
except ValueError as error:
    print(error)
"""
    done = python(hub, home, program, HF_TOKEN="hf_pusher")
    assert done.returncode == 0, done.stderr
    pushed = hub["me/small"].commits[hub["me/small"].refs["main"]]
    first, second = done.stdout.splitlines()
    assert first == f"me/small@{hub['me/small'].refs['main']}" and "exists already" in second
    assert b'l2s_jax.load("me/small")' in pushed["README.md"]
    parts = hub["me/parts"].commits[hub["me/parts"].refs["main"]]
    for folder in ("", "llm/"):
        assert f"{folder}params.safetensors.index.json" in parts
        assert len([path for path in parts if path.startswith(f"{folder}params-0")]) > 1
    # The LLM is where it was.
    assert not [path for path in pushed if path.startswith("llm/")]
    assert (tmp_path / "copy/llm/params.safetensors").exists()
    program = f"import l2s_jax; l2s_jax.load({str(model)!r}).push_to_hub('me/other')"
    done = python(hub, home, program)
    assert "ValueError: me/other: not published: " in done.stderr
    done = run(hub, home, *flags, "--config.llm.path=org/none", module="l2s_jax.main")
    assert done.returncode == 2 and done.stderr.count("Traceback") == 0, done.stderr


def test_a_plan_asks_for_a_config_only(hub, tmp_path):
    model = ggufs.make_model("Llama")
    model.save_pretrained(tmp_path / "llama")
    hub["org/planned"].add(tmp_path / "llama")
    hub.requests.clear()
    program = (
        "from l2s_jax.config import default\n"
        "from l2s_jax.plan.models import make_plan\n"
        "config = default()\n"
        "config.llm.path = config.slm.path = 'org/planned'\n"
        "print(make_plan(config, 'cpu').system.llm_config.width)\n"
    )
    done = python(hub, tmp_path / "home", program)
    assert done.stdout == "256\n", done.stderr
    assert not {name for name in hub.fetched() if name.endswith(".safetensors")}
