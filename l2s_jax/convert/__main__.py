"""The command `python -m l2s_jax.convert --input=DIR --output=DIR [--to=hf] [--verify]`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax

from l2s_jax.convert import family_of, load, read_json, save_hf, save_native
from l2s_jax.convert.verify import Agreement, compare

TOLERANCE = 1e-4  # of the logits' scale
# Beside the weights in a Hugging Face directory, and of use with either format.
TOKENIZER_FILES = (
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m l2s_jax.convert", description="Converts a checkpoint.", allow_abbrev=False
    )
    parser.add_argument("--input", required=True, help="directory of either format")
    parser.add_argument("--output", required=True, help="directory to make")
    parser.add_argument(
        "--to",
        choices=("l2s_jax", "hf"),
        default="l2s_jax",
        help="format to write: ours (default) or Hugging Face's",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare the logits with those of transformers (needs torch and transformers)",
    )
    return parser


def _verify(input_directory: str, output_directory: str, to: str) -> Agreement:
    """Output against input."""
    ours, theirs = output_directory, input_directory
    if to == "hf":
        ours, theirs = theirs, ours
    module, params = load(ours)
    return compare(family_of(module.config), theirs, module, params)


def convert(input_directory: str, output_directory: str, to: str, verify: bool) -> None:
    """Reads `input_directory`, writes `output_directory`; ValueError where either cannot be."""
    if os.path.exists(output_directory) and (
        not os.path.isdir(output_directory) or os.listdir(output_directory)
    ):
        raise ValueError(f"{output_directory}: exists already; give --output a new directory")
    if verify:
        for name in ("torch", "transformers"):
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"--verify needs {name}, which is not installed")
    if (
        verify
        and to != "hf"
        and "format" in read_json(os.path.join(input_directory, "config.json"))
    ):
        raise ValueError(
            f"{input_directory}: --verify compares with transformers, but neither the input nor "
            "the output is in Hugging Face's format"
        )
    module, params = load(input_directory)
    save = save_hf if to == "hf" else save_native
    save(module.config, params, output_directory)
    for name in TOKENIZER_FILES:
        if os.path.exists(os.path.join(input_directory, name)):
            shutil.copyfile(
                os.path.join(input_directory, name), os.path.join(output_directory, name)
            )
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{output_directory}: {family_of(module.config).name}, {count:,} parameters")
    if verify:
        found = _verify(input_directory, output_directory, to)
        measured = (
            f"largest difference {found.difference:.1e} of the logits' scale, KL {found.kl:.1e} "
            f"nats, top-1 agreement {found.top1:.1%}"
        )
        if not found.difference <= TOLERANCE:
            raise ValueError(
                f"{output_directory}: differs from transformers: {measured}; expected a "
                f"difference of at most {TOLERANCE:.0e}"
            )
        print(f"agrees with transformers: {measured}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    flags = _parser().parse_args(arguments)
    try:
        convert(flags.input, flags.output, flags.to, flags.verify)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
