"""Serves an L2S model over HTTP, by OpenAI's protocol.

python -m l2s_jax.serve --model=RUN/l2s/model [--port=8000]
python -m l2s_jax.serve --model=RUN/l2s/model --models=l2s,llm,exact,slm --slm=RUN/slm/model

Exit status: 0 after SIGTERM; 1 where the device is gone; 2 for bad input, with one line; 130 after
Ctrl-C.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from l2s_jax.cluster import libtpu
from l2s_jax.serve.flags import make_parser, options_of, told
from l2s_jax.serve.signals import end_at_once


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = make_parser(
        "python -m l2s_jax.serve", "Serves an L2S model over HTTP, by OpenAI's protocol."
    )
    flags = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname).1s %(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        options = options_of(flags)
        libtpu.prepare()
        # Imported here, so that --help and wrong flags don't wait for it.
        from l2s_jax.serve.run import run

        return run(options)
    except (ValueError, OSError) as error:
        return told(error, 2)
    except RuntimeError as error:  # of JAX, before anybody is answered
        return told(error, 1)


if __name__ == "__main__":
    end_at_once()
    sys.exit(main())
