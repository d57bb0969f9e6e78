"""The process that talks to one tracker: JSON lines on stdin, until there are no more.

python -m l2s_jax.training.tracker_process wandb|trackio

The first line says which run it is; trackers.py writes them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any, Protocol

_PROJECT = "l2s_jax"


class _Tracker(Protocol):
    def metrics(self, stage: str, values: dict[str, float]) -> None:
        """`values` by tag, STAGE/step among them."""

    def results(self, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class _Wandb:
    """Weights & Biases, https://docs.wandb.ai; its own environment variables hold."""

    def __init__(self, head: dict[str, Any]):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=head["id"],
            name=head["name"],
            resume="allow",
            dir=head["folder"],
            config=head["config"],
            settings=wandb.Settings(console="off", silent=True),
        )
        self._stages: set[str] = set()

    def metrics(self, stage: str, values: dict[str, float]) -> None:
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log(values)

    def results(self, values: dict[str, Any]) -> None:
        self._run.summary.update(values)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """Trackio, https://huggingface.co/docs/trackio; its own environment variables hold.

    It knows runs by their names, so the id is part of it. It has no summary: results are the
    values of one more step.
    """

    def __init__(self, head: dict[str, Any]):
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=f"{head['name']}-{head['id']}",
            resume="allow",
            config=head["config"],
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def metrics(self, stage: str, values: dict[str, float]) -> None:
        self._run.log(values)

    def results(self, values: dict[str, Any]) -> None:
        self._run.log(values)

    def close(self) -> None:
        self._run.finish()


_KINDS = {"wandb": _Wandb, "trackio": _Trackio}


def _messages() -> Iterator[dict[str, Any]]:
    for line in sys.stdin.buffer:
        if not line.endswith(b"\n"):
            return  # the run was killed while it wrote
        yield json.loads(line)


def follow(tracker: _Tracker, messages: Iterator[dict[str, Any]]) -> None:
    """Tells a tracker what comes."""
    begun: list[str] = []
    for message in messages:
        if name := message.get("begun"):
            begun += [] if name in begun else [name]
            tracker.results({"stage": name, "stages": ", ".join(begun)})
        elif "results" in message:
            tracker.results(message["results"])
        else:
            stage = message["stage"]
            values = {f"{stage}/{key}": value for key, value in message["metrics"].items()}
            tracker.metrics(stage, {**values, f"{stage}/step": message["step"]})
    tracker.close()


if __name__ == "__main__":
    messages = _messages()
    try:
        follow(_KINDS[sys.argv[1]](next(messages)), messages)
    except Exception as error:
        print(" ".join(f"{type(error).__name__}: {error}".split()), file=sys.stderr, flush=True)
        os._exit(1)
