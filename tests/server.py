"""A real server in a process of its own, on a tiny model."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import small
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import decoders, models, trainers

from l2s_jax.checkpoints import pretrained
from l2s_jax.checkpoints.files import content_hash
from l2s_jax.models.systems import LlmToSlm
from l2s_jax.serving import bundle
from l2s_jax.tokenizers.huggingface import HuggingFaceTokenizer, Special
from l2s_jax.tokenizers.sentencepiece import train_sentencepiece
from l2s_jax.tokenizers.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).parent.parent
PROMPT_TOKENS, NEW_TOKENS, PIECES = 12, 10, 15
WORDS = "abc bca cab abba dabc bcad 1 22 333"


TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
)


def chat_tokenizer() -> HuggingFaceTokenizer:
    """One that knows how a chat is written, of letters and a few words."""
    hub = HubTokenizer(models.BPE(unk_token="<unk>"))
    hub.decoder = decoders.Fuse()
    special = ["<pad>", "<eos>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=48, special_tokens=special, show_progress=False)
    hub.train_from_iterator([WORDS, "system: user: assistant:\n"] * 9, trainer)
    return HuggingFaceTokenizer(
        hub, Special(1, pad_id=0, unk_id=2, chat_template=TEMPLATE), origin="the test's tokenizer"
    )


def write_model(
    root: pathlib.Path, tokenizer: Tokenizer | None = None, seed: int = 9, **generation: object
) -> tuple[str, str]:
    """Directories of an L2S model, which refers to a whole LLM, and of an SLM alone.

    Without a tokenizer, theirs is one that knows no chats.
    """
    tokenizer = tokenizer or train_sentencepiece(
        [WORDS] * 20, vocab_size=PIECES, directory=str(root / "spiece")
    )
    size = tokenizer.vocab_size
    llm_config = small.t5_config(vocab_size=size, width=24, num_encoder_layers=2, head_width=8)
    slm_config = small.t5_config(vocab_size=size, width=12)
    for name, config, seed in (("llm", llm_config, 3), ("slm", slm_config, 4)):
        pretrained.save_native(config, small.t5_params(config, seed), str(root / name))
        tokenizer.save(str(root / name))
    system = LlmToSlm(llm_config, slm_config, projector_width=5)
    trained = small.random_like(jax.eval_shape(system.init, jax.random.key(0)), seed)
    bundle.save(
        system,
        trained,
        str(root / "l2s"),
        llm_path="../llm",
        llm_hash=content_hash(str(root / "llm")),
        layer=0.0,
        llm_tokenizer=tokenizer,
        slm_tokenizer=tokenizer,
        generation={
            "prompt_lengths": [PROMPT_TOKENS],
            "max_new_tokens": NEW_TOKENS,
            "batch_size": 2,
            **generation,
        },
    )
    return str(root / "l2s"), str(root / "slm")


class Running(NamedTuple):
    """A server that answers; `said` are the lines that it writes to stderr."""

    address: str
    models: list[str]
    process: subprocess.Popen[str]
    said: list[str]

    def end(self, timeout: float = 60) -> int:
        """Waits for it; the exit status."""
        return self.process.wait(timeout)


@contextlib.contextmanager
def serving(
    model: str, *flags: str, program: Sequence[str] = ("-m", "l2s_jax.serve"), **environment: str
) -> Iterator[Running]:
    """A server with two slots, until the block ends."""
    process = subprocess.Popen(
        [sys.executable, *program, f"--model={model}", "--port=0", "--slots=2", *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said: list[str] = []
    assert process.stdout and process.stderr
    reader = threading.Thread(target=said.extend, args=(process.stderr,))
    reader.start()
    try:
        line = process.stdout.readline()
        if not line:
            process.wait()
            reader.join()
            raise AssertionError(f"the server ended with {process.returncode}: {said}")
        address, _, names = line.strip().partition(" serves ")
        yield Running(address, names.split(", "), process, said)
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()
        process.stderr.close()
