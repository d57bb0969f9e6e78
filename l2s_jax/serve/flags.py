"""What the commands that serve are told: their flags, and what becomes of them."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

from l2s_jax.arguments import Parser
from l2s_jax.messages import one_line

if TYPE_CHECKING:
    from l2s_jax.serve.run import Options

_NEEDED = ("starlette", "uvicorn", "httptools", "uvloop", "prometheus_client", "pydantic")
_MODELS = ("l2s", "llm", "exact", "slm")
_AXES = ("data", "fsdp", "sequence", "tensor")


def number(kind: type, least: float, most: float = float("inf")) -> Any:
    """Of a flag: what makes a number of its text."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            what = "an integer" if kind is int else "a number"
            upto = f" to {most:g}" if most < float("inf") else " or more"
            raise argparse.ArgumentTypeError(f"{text!r}: expected {what}, {least:g}{upto}")
        return value

    return parse


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in _MODELS:
            raise argparse.ArgumentTypeError(
                f"{name!r}: no such model, expected some of {', '.join(_MODELS)}"
            )
    return names


def _lengths(text: str) -> list[int]:
    values = [int(value) if value.isdecimal() else 0 for value in text.split(",")]
    if min(values) < 1 or max(values) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r}: expected positive integers, as in 64,256")
    return sorted(set(values))


def _mesh(text: str) -> dict[str, int]:
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in _AXES or not size.removeprefix("-").isdecimal():
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected sizes of {', '.join(_AXES)}, as in data=2,tensor=4"
            )
        sizes[axis] = int(size)
    return sizes


def _search(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(equals for _, equals, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}: expected settings, as in temperature=0.7")
    return {name: value for name, _, value in pairs}


def make_parser(prog: str, description: str) -> Parser:
    """One that takes the flags of a server."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    add = parser.add_argument
    whole, seconds = number(int, 1, 2**31 - 1), number(float, 0, 1e9)
    add("--model", required=True, help="directory of an L2S model, or its name on the hub")
    add("--models", type=_names, default="l2s", help=f"of {', '.join(_MODELS)} (default: l2s)")
    add("--llm", default="", help="where the LLM lies (default: where the model says)")
    add("--slm", default="", help="the SLM that --models=slm offers, a directory")
    add("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    add("--port", type=number(int, 0, 65535), default=8000, help="0: a free one (default: 8000)")
    add("--api_key", help="what clients must send (default: L2S_API_KEY of the environment)")
    add("--slots", type=whole, default=32, help="responses at once, of a model (default: 32)")
    add(
        "--max_waiting",
        type=number(int, 0, 2**31 - 1),
        default=256,
        help="responses that may wait for a slot; others get 429 (default: 256)",
    )
    add(
        "--pause_ms",
        type=seconds,
        default=1000.0,
        help="for how long new prompts may hold up responses at a time (default: 1000)",
    )
    add("--time_s", type=number(float, 0.001, 1e9), default=600.0, help="of a request (600)")
    add("--drain_s", type=seconds, default=30.0, help="SIGTERM: at most so long (default: 30)")
    add("--body_bytes", type=whole, default=1 << 20, help="of a request (default: 1 MiB)")
    add("--prompt_tokens", type=_lengths, help="to which prompts are padded; more are refused")
    add("--max_new_tokens", type=whole, help="the most of a response (default: the model's)")
    add("--search", type=_search, default={}, help="other than the model's, as temperature=0.7")
    add("--weights", choices=("float", "int8"), help="(default: the model's)")
    dtypes = ("auto", "float32", "bfloat16")
    add("--dtype", choices=dtypes, default="auto", help="of products (default: auto)")
    add("--encoder_dtype", choices=dtypes, default="auto", help="of the LLM (default: --dtype)")
    add("--mesh", type=_mesh, default={}, help="of devices, as data=2,tensor=4 (default: one)")
    add("--examples", default="", help="a file of prompts, a line each, that the page offers")
    add("--compilation_cache", help="folder for compiled programs, for later starts")
    return parser


def options_of(flags: argparse.Namespace) -> Options:
    """What the server is that the flags ask for; nothing of JAX is begun.

    Raises:
      ValueError: flags that do not go together, or a part of the server that is not installed.
    """
    for name in _NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"the server needs {name}, which is not installed: pip install 'l2s-jax[serve]'"
            )
    if ("slm" in flags.models) != bool(flags.slm):
        raise ValueError(
            f"--models={','.join(flags.models)} with --slm={flags.slm!r}: expected both or neither "
            "of slm and its directory"
        )
    # Imported here, so that --help and wrong flags don't wait for them.
    from l2s_jax.serve.models import Models
    from l2s_jax.serve.pages import read_examples
    from l2s_jax.serve.run import Options
    from l2s_jax.serve.service import Limits
    from l2s_jax.serving.generate_file import parse_search

    given = {
        "prompt_lengths": flags.prompt_tokens,
        "max_new_tokens": flags.max_new_tokens,
        "weights": flags.weights,
    }
    models = Models(
        flags.model,
        flags.models,
        llm=flags.llm,
        slm=flags.slm,
        dtype=flags.dtype,
        encoder_dtype=flags.encoder_dtype,
        mesh=flags.mesh,
        # A batch of `generate`, which nobody calls here, is as large as there are slots.
        settings={
            "batch_size": flags.slots,
            **{name: value for name, value in given.items() if value is not None},
        },
        search=parse_search(flags.search),
    )
    limits = Limits(
        slots=flags.slots,
        max_waiting=flags.max_waiting,
        pause_s=flags.pause_ms / 1000,
        time_s=flags.time_s,
        body_bytes=flags.body_bytes,
        api_key=flags.api_key or os.environ.get("L2S_API_KEY", ""),
    )
    return Options(
        models,
        limits,
        read_examples(flags.examples) if flags.examples else [],
        flags.host,
        flags.port,
        flags.drain_s,
        flags.compilation_cache or "",
    )


def told(error: Exception, status: int) -> int:
    """Says in one line what was wrong; gives the exit status."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    return status
