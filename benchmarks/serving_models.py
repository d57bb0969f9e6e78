"""Models of published geometries with random weights, for `benchmarks/serve.py`.

    python benchmarks/serving_models.py --llm=t5-base --slm=t5-small --output=/tmp/t5

Random weights are as fast as trained ones. They end no response: each has as many tokens as it may.
Written are `llm/`, a checkpoint in Hugging Face's format that peers take too; `l2s/`, the L2S model
of it; and `prompts.txt`, prompts of made-up words, each a token.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Sequence

import jax

from l2s_jax.arguments import Parser, count
from l2s_jax.bench.geometry import random_like, write_random
from l2s_jax.checkpoints import pretrained
from l2s_jax.checkpoints.files import content_hash
from l2s_jax.models.geometries import GEOMETRIES
from l2s_jax.models.systems import LlmToSlm
from l2s_jax.serving import bundle
from l2s_jax.tokenizers.tokenizer import load_tokenizer


def write(options: argparse.Namespace) -> None:
    """Writes both models and the prompts."""
    llm, directory = os.path.join(options.output, "llm"), os.path.join(options.output, "l2s")
    write_random(options.llm, llm)
    encoder, _ = pretrained.load_encoder(llm)
    system = LlmToSlm(encoder.config, GEOMETRIES[options.slm], options.projector_width)
    trained = random_like(jax.eval_shape(system.init, jax.random.key(0)))
    tokenizer = load_tokenizer(llm)
    bundle.save(
        system,
        trained,
        directory,
        llm_path=os.path.join("..", "llm"),
        llm_hash=content_hash(llm),
        layer=0.0,
        llm_tokenizer=tokenizer,
        slm_tokenizer=tokenizer,
        generation={
            "max_new_tokens": options.new_tokens,
            "prompt_lengths": [options.prompt_tokens],
            "batch_size": 32,
        },
    )
    chance = random.Random(0)
    words = [piece for piece in tokenizer.pieces if piece and not piece.startswith("<")]
    with open(os.path.join(options.output, "prompts.txt"), "w", encoding="utf-8") as file:
        for _ in range(options.prompts):
            print(*chance.sample(words, options.prompt_tokens), file=file)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a folder that is not there yet."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--llm", default="t5-base", choices=sorted(GEOMETRIES))
    add("--slm", default="t5-small", choices=sorted(GEOMETRIES))
    add("--projector_width", type=count, default=768)
    add("--prompt_tokens", type=count, default=24)
    add("--new_tokens", type=count, default=32)
    add("--prompts", type=count, default=500)
    add("--output", required=True, help="a new folder")
    options = parser.parse_args(argv)
    if os.path.exists(options.output):
        parser.error(f"--output={options.output}: it is there already; expected a new folder")
    write(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
