"""SmolLM2-135M-Instruct, a real model, from the GGUF file that `launch/smollm2.sh` fetches.

Once fetched, it stays in ~/.cache/l2s_jax.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import gguf
import ggufs
import hf
import jax
import numpy as np
import pytest
import tiny
import torch
import transformers
import xla
from ml_collections import ConfigDict

import l2s_jax
from l2s_jax.checkpoints.pretrained import content_hash, load_hf
from l2s_jax.checkpoints.verify import agreement
from l2s_jax.data.fitting import fit
from l2s_jax.data.tasks import load_task
from l2s_jax.models.systems import LanguageModel
from l2s_jax.serving.generator import Generator
from l2s_jax.tokenizers import for_chat, load_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]


@pytest.fixture(scope="module")
def path():
    environment = os.environ | {"PYTHON": sys.executable}
    command = [ROOT / "launch/smollm2.sh"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def theirs(path):
    """(model, tokenizer) as transformers reads the file."""
    transformers.utils.logging.set_verbosity_error()
    folder, name = os.path.split(path)
    # transformers opens the file three times, which takes seconds each.
    with mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
        return ggufs.read_by_transformers(path), tokenizer


@pytest.fixture(scope="module")
def ours(path):
    return load_hf(path)


def test_logits(ours, theirs):
    module, params = ours
    ids = np.random.default_rng(0).integers(0, 49152, (2, 24), dtype=np.int32)
    mask = np.arange(24) < np.array([[24], [16]])
    inputs = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask).long()}
    with torch.no_grad():
        expected = theirs[0](**inputs).logits.numpy()
    with jax.default_matmul_precision("highest"):
        found = jax.jit(module.apply, compiler_options=hf.COMPILATION)(
            {"params": params}, ids, mask
        )
    compared = agreement(np.asarray(found)[mask], expected[mask])
    assert compared.difference < 2e-5 and compared.kl < 1e-8 and compared.top1 == 1


def test_tokenizer(path, theirs):
    tokenizer = load_tokenizer(path)
    texts = [paragraph for page in PAGES for paragraph in page.read_text().split("\n\n")]
    assert len(texts) > 300
    # A space before a digit's space: transformers doesn't split digits off first, as the tokenizer
    # that the file was made of does.
    texts = [" ".join(line.split(" ")) for line in texts if "  " not in line]
    assert tokenizer.encode_prompts(texts) == theirs[1](texts)["input_ids"]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_prompts(texts)] == texts
    turn = "<|im_start|>user\nHi<|im_end|>\n"
    assert tokenizer.encode_prompts([turn]) == [[1, 4093, 198, 26843, 2, 198]]
    split = [tokenizer.decode([i]) for i in tokenizer.encode_prompts(["a  12"])[0]]
    assert split == ["a", "  ", "1", "2"]


def test_a_long_chat_keeps_its_format(path, theirs):
    """A page that is too long loses its end, and the model is still asked for an answer."""
    system = "You are a helpful assistant."
    chat = for_chat(load_tokenizer(path), system)
    task = {"name": "t", "source": "jsonl", "splits": {"test": "f"}, "response": "y"}
    task = load_task(ConfigDict(task | {"chat": {"user": "A title for this:\n\n{page}\n\nTitle:"}}))
    pages = [page.read_text() for page in PAGES]
    texts = [*pages, *(page[:200] for page in pages)]
    prompts = [task.render_prompt({"page": text}) for text in texts]
    fitted = fit(prompts, chat, 128)
    assert (fitted.cut, fitted.hopeless) == (len(pages), 0)
    reference = theirs[1]
    for prompt, text, ids in zip(prompts, texts, fitted.ids, strict=True):
        said = reference.decode(ids)
        assert said.endswith("\n\nTitle:<|im_end|>\n<|im_start|>assistant\n")
        assert said.startswith(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nA title")
        if len(text) <= 200:
            messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
            whole = reference.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            assert said == whole
        else:
            assert 118 <= len(ids) <= 128


def test_greedy_text(path, ours, theirs):
    model, tokenizer = theirs
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    made = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
    expected = tokenizer.decode(made, skip_special_tokens=True)
    assert "Paris" in expected
    module, params = ours
    mine = load_tokenizer(path)
    generator = Generator(
        LanguageModel("llm", module.config),
        {"llm": params},
        {},
        mine,
        mine,
        prompt_lengths=[64],
        max_new_tokens=16,
        batch_size=1,
    )
    assert generator.generate([prompt])[0].text == expected


CHANGES = """

import l2s_jax.config
base_config = get_config


def get_config():
    config = base_config()
    config.llm = default().llm
    config.llm.path = "PATH"
    config.llm.layer = 2
    config.scan_layers = True
    config.tokenizer.train_vocab_size = 0
    config.slm.tokenizer.train_vocab_size = 28
    config.slm.train.steps = 2
    config.decoding.max_new_tokens = 4
    return config
"""


def test_it_teaches_a_small_model(path, tmp_path):
    config = tiny.write_task(tmp_path / "task")
    config.write_text(config.read_text() + CHANGES.replace("PATH", path))
    workdir = tmp_path / "run"
    # On one device: eight have eight copies of a real model's embedding.
    changes = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla.flags()}
    command = [sys.executable, "-m", "l2s_jax.main", f"--config={config}", f"--workdir={workdir}"]
    done = subprocess.run(
        [*command, "--until=l2s"], env=os.environ | changes, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    fields = json.loads((workdir / "l2s/model/config.json").read_text())
    assert fields["llm"] == {"path": path, "content_hash": content_hash(path), "layer": 2.0}
    answers = l2s_jax.load(str(workdir / "l2s/model")).generate(["reverse: one two"])
    assert len(answers) == 1
