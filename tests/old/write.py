"""Writes v0.1.tar.xz: what version 0.1.0 left in workdirs and a bundle, for test_old_files.

    git worktree add ../v0.1 dffc461 && cd ../v0.1 && python PATH/TO/tests/old/write.py

Run it with that commit, since a newer one leaves newer files. In the archive:

    data/             the task of tests/tiny.py
    finished/         a workdir with data labels, one tokenizer, LLM, SLM and L2S from nothing
    interrupted/      labels by the LLM, a tokenizer of the SLM's own; stopped after L2S's step 120
    bundle/           the L2S model of finished/ with its LLM inside
    expected/         answers.jsonl of finished/, and l2s.safetensors: what interrupted/ was to be
    config.py         of both
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
OWN = ("--config.labels=llm", "--config.slm.tokenizer.train_vocab_size=28")
INTERRUPTED = """
import sys
from unittest import mock
from l2s_jax import main, train
calls, scores = [], train.validation_scores
def stopped(*arguments):
    calls.append(arguments)
    # LLM and SLM take two validations each.
    if len(calls) == 6:
        raise KeyboardInterrupt
    return scores(*arguments)
with mock.patch.object(train, "validation_scores", stopped):
    sys.exit(main.main(sys.argv))
"""


def command(root: Path, *arguments: str, status: int = 0) -> None:
    """One command in `root`, with the version that this process would import."""
    flags = "--xla_force_host_platform_device_count=1"
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "XLA_FLAGS": flags}
    found = subprocess.run([sys.executable, *arguments], cwd=root, env=environment).returncode
    if found != status:
        sys.exit(f"{arguments}: exit status {found}, expected {status}")


def write(root: Path) -> None:
    """All that goes into the archive."""
    sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
    import tiny

    tiny.write_task(root / "data").unlink()
    # Enough steps for models that say something.
    config = tiny.CONFIG.format(data_dir="data").replace("steps=4", "steps=240")
    config = config.replace("evaluate_every=2", "evaluate_every=120")
    (root / "config.py").write_text(config, encoding="utf-8")
    run = ("-m", "l2s_jax.main", "--config=config.py")
    command(root, *run, "--workdir=finished")
    generate = ("--mode=generate", "--workdir=finished", "--input=data/test.jsonl")
    (root / "expected").mkdir()
    command(root, "-m", "l2s_jax.main", *generate, "--output=expected/answers.jsonl")
    copy = ("--input=finished/l2s/model", "--output=bundle", "--include-llm")
    command(root, "-m", "l2s_jax.convert", *copy)

    command(root, *run, "--workdir=whole", *OWN)
    model = root / "whole/l2s/model/params.safetensors"
    model.rename(root / "expected/l2s.safetensors")
    shutil.rmtree(root / "whole")
    command(root, "-c", INTERRUPTED, *run[2:], "--workdir=interrupted", *OWN, status=130)

    for events in root.glob("**/events.out.tfevents.*"):
        events.unlink()
    for pictures in root.glob("**/*.svg"):
        pictures.unlink()


def main() -> None:
    """Writes the archive beside this file."""
    with tempfile.TemporaryDirectory() as root:
        write(Path(root))
        with tarfile.open(HERE / "v0.1.tar.xz", "w:xz") as archive:
            archive.add(root, arcname=".")


if __name__ == "__main__":
    main()
