"""Conversion of checkpoints and of L2S models, from Python (`load_hf` and so on) or by a command:

python -m l2s_jax.convert --input=DIR --output=DIR [--to=hf] [--verify]   a model on its own
python -m l2s_jax.convert --input=RUN/l2s/model --output=DIR [--include-llm]   a whole L2S model
python -m l2s_jax.convert --input=RUN/l2s/model --output=DIR --to=hf           its SLM
python -m l2s_jax.convert --input=DIR --inspect                                the parameters

DIR is a folder, a GGUF file, or a name on the Hugging Face hub.

Exit status: 0; 2 for bad input, 130 for Ctrl-C, 143 for SIGTERM, each with one line.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

from l2s_jax import sealed
from l2s_jax.arguments import Parser
from l2s_jax.checkpoints.engine import Params
from l2s_jax.checkpoints.pretrained import (
    family_of,
    inspect,
    load,
    load_encoder,
    load_hf,
    load_native,
    read_config,
    save_hf,
    save_native,
)
from l2s_jax.checkpoints.verify import Agreement, compare
from l2s_jax.cluster.stopping import Stopped, handled
from l2s_jax.copies import local
from l2s_jax.files import atomic_directory, exists, is_folder, listed_names, read_json
from l2s_jax.gguf_file import is_gguf
from l2s_jax.hub import PARTS, TOKENIZER_FILES, VOCABULARY_FILES, find
from l2s_jax.messages import escaped, one_line
from l2s_jax.models.families import make_module
from l2s_jax.models.systems import parameter_count
from l2s_jax.serving import bundle
from l2s_jax.serving.bundle_config import is_bundle
from l2s_jax.tokenizers import load_tokenizer

__all__ = [
    "inspect",
    "load",
    "load_encoder",
    "load_hf",
    "load_native",
    "main",
    "save_hf",
    "save_native",
]


def _parser() -> Parser:
    parser = Parser(
        prog="python -m l2s_jax.convert", description="Converts a checkpoint.", allow_abbrev=False
    )
    parser.add_argument(
        "--input", required=True, help="directory of either format, GGUF file, or name on the hub"
    )
    parser.add_argument("--output", help="directory to make")
    parser.add_argument(
        "--to",
        choices=("l2s_jax", "hf"),
        default="l2s_jax",
        help="format to write: ours (default) or Hugging Face's; of an L2S model, hf takes the SLM",
    )
    parser.add_argument(
        "--include-llm",
        nargs="?",
        const=True,
        default=False,
        choices=("whole",),
        help="of an L2S model: copy what encodes of the LLM too, instead of referring to it; "
        "--include-llm=whole copies all of it, for exact decoding",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare the logits with those of transformers (needs torch and transformers), and "
        "trust no hash of the input that is remembered",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=1e-4,
        help="largest difference, relative to the logits' scale, that --verify lets pass (1e-4)",
    )
    parser.add_argument(
        "--inspect",
        action="store_true",
        help="print each parameter: name, shape, dtype in the file, name in the file",
    )
    return parser


def _check(flags: argparse.Namespace) -> None:
    """One line for flags that make no sense together, before anything is read or written.

    The input becomes what lies on this machine.
    """
    if flags.inspect:
        if flags.output or flags.verify or flags.include_llm:
            raise ValueError("--inspect only prints: expected no other flag than --input")
        flags.input = find(flags.input)
        return
    if not flags.output:
        raise ValueError("--output: expected a directory to make, or --inspect")
    if exists(flags.output) and (not is_folder(flags.output) or listed_names(flags.output)):
        raise ValueError(f"{flags.output}: exists already; give --output a new directory")
    flags.input = find(flags.input)
    whole = is_bundle(flags.input)
    if flags.include_llm and (not whole or flags.to == "hf"):
        raise ValueError(f"--include-llm: expected a whole L2S model as --input, not {flags.input}")
    if not flags.verify:
        return
    # transformers reads a GGUF file with the help of one more.
    more = ("accelerate",) if is_gguf(flags.input) and flags.to != "hf" else ()
    for name in ("torch", "transformers", *more):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--verify needs {name}, which is not installed")
    if is_gguf(flags.input):
        return
    if flags.to != "hf" and "format" in read_json(os.path.join(flags.input, "config.json")):
        raise ValueError(
            f"{flags.input}: --verify compares with transformers, but neither the input nor "
            "the output is in Hugging Face's format"
        )


def _convert(flags: argparse.Namespace) -> None:
    if is_bundle(flags.input) and flags.to != "hf":
        with atomic_directory(flags.output) as temporary:
            bundle.copy(flags.input, temporary, include_llm=flags.include_llm)
        print(f"{flags.output}: an L2S model")
        return
    if not is_bundle(flags.input):
        read_config(flags.input)
    # What can be wrong with small files is said before the weights are read.
    save_tokenizer = _tokenizer(flags)
    module, params = _read(flags)
    with atomic_directory(flags.output) as temporary:
        save = save_hf if flags.to == "hf" else save_native
        save(module.config, params, temporary)
        save_tokenizer(temporary)
    print(
        f"{flags.output}: {family_of(module.config).name}, {parameter_count(params):,} parameters"
    )
    if flags.verify:
        _verify(flags, module, params)


def _read(flags: argparse.Namespace) -> tuple[Any, Params]:
    """The model of the input; of an L2S model, its SLM."""
    if not is_bundle(flags.input):
        return load(flags.input)
    system, trained, _ = bundle.load(flags.input)
    if "encoder" not in trained["slm"] and system.fusion == "cross":
        raise ValueError(
            f"{flags.input}: fusion 'cross' has an SLM without an encoder, which transformers "
            "has no place for"
        )
    return make_module(system.slm_config), trained["slm"]


def _tokenizer(flags: argparse.Namespace) -> Callable[[str], None]:
    """What writes the tokenizer of the input, if it has one, beside the model in a directory.

    Raises:
      ValueError: it has one that cannot be read.
    """
    source = local(flags.input, PARTS["tokenizer"])
    is_theirs = not is_gguf(source) and "model_type" in read_json(
        os.path.join(source, "config.json")
    )
    names = [name for name in TOKENIZER_FILES if os.path.exists(os.path.join(source, name))]
    if is_theirs and flags.to == "hf":

        def copy(directory: str) -> None:
            for name in (*names, *_generation(source)):
                shutil.copyfile(os.path.join(source, name), os.path.join(directory, name))

        return copy
    if is_gguf(source) or set(names) & set(VOCABULARY_FILES):
        # What the files of one format say together, those of another do not.
        return load_tokenizer(source).save
    if names:
        print(
            f"warning: {flags.input}: no tokenizer beside {names[0]}, expected one of "
            f"{', '.join(VOCABULARY_FILES)}; the model is converted without one",
            file=sys.stderr,
        )
    return lambda directory: None


def _generation(directory: str) -> list[str]:
    name = "generation_config.json"
    return [name] if os.path.exists(os.path.join(directory, name)) else []


def _verify(flags: argparse.Namespace, module: Any, params: Params) -> None:
    if flags.to == "hf":
        theirs = local(flags.output, PARTS["all"])
    else:
        theirs = local(flags.input, PARTS["all"])
        module, params = load(flags.output)
    found: Agreement = compare(family_of(module.config), theirs, module, params)
    measured = (
        f"largest difference {found.difference:.1e} of the logits' scale, KL {found.kl:.1e} nats, "
        f"top-1 agreement {found.top1:.1%}"
    )
    if not found.difference <= flags.threshold:
        raise ValueError(
            f"{flags.output}: differs from transformers: {measured}; expected a difference of at "
            f"most {flags.threshold:.0e}"
        )
    print(f"agrees with transformers: {measured}")


def _inspect(directory: str) -> None:
    rows = bundle.inspect(directory) if is_bundle(directory) else inspect(directory)
    cells = [(escaped(r.path), "x".join(map(str, r.shape)), r.dtype, escaped(r.key)) for r in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(padded).rstrip())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    flags = _parser().parse_args(arguments)
    try:
        with handled():
            _check(flags)
            if flags.inspect:
                _inspect(flags.input)
            else:
                with sealed.anew() if flags.verify else contextlib.nullcontext():
                    _convert(flags)
    except BrokenPipeError:
        # Who reads the output, head for one, has all that it wants.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except Stopped as stopped:  # what was being written is gone
        print(f"error: {stopped.word}", file=sys.stderr)
        return stopped.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
