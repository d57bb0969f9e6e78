"""Serves an L2S model by several replicas behind one address, as a Ray Serve application.

python launch/ray_serve.py --model=RUN/l2s/model --replicas=2
python launch/ray_serve.py --model=RUN/l2s/model --replicas=2 --max_replicas=8 --num_gpus=1 \
  --address=auto

It takes the flags of `python -m l2s_jax.serve` too: each replica is such a server, with slots and a
queue of its own. Ray starts another where one is lost, and as many as the load wants. The servers
live as long as this command.

Exit status: 0 after SIGTERM; 1 where Ray fails; 2 for bad input, with one line; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib.util
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from l2s_jax.serve.flags import make_parser, number, options_of, told
from l2s_jax.serve.signals import STATUSES, end_at_once, heard

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from l2s_jax.serve.run import Options

_NAME = "l2s"
_RETRY_S = 1.0
# Seconds between two looks at a replica; one that fails three times is replaced.
_LOOK_S = 2.0
# Seconds for Ray to end, when all requests have.
_GRACE_S = 15.0
# Ray keeps requests and answers there, which are small.
_STORE_BYTES = 100 << 20
# What Ray's proxies put around themselves, and where they are told: their environment.
_AROUND_PROXIES = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "l2s_jax.serve.proxy.middlewares"}


class Replica:
    """One server, in a process of its own; Ray sends it no request before it is warm."""

    async def __init__(self, options: Options):  # type: ignore[misc]  # Ray awaits it
        from l2s_jax.serve.run import start
        from l2s_jax.serve.service import Service

        self._lost = ""
        self._service = Service(options.limits, options.examples)
        await asyncio.to_thread(start, self._service, options, self._on_end)

    def _on_end(self, reason: str) -> None:
        self._lost = reason
        self._service.state = "stopping"

    def __serve_build_asgi_app__(self) -> Starlette:
        from l2s_jax.serve.app import make_app

        return make_app(self._service)

    def check_health(self) -> None:
        """
        Raises:
          RuntimeError: the device is gone; Ray replaces a replica that says so.
        """
        if self._lost:
            raise RuntimeError(f"the device is gone: {self._lost}")


def _flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(
        "python launch/ray_serve.py", "Serves an L2S model by several replicas, on Ray."
    )
    add, some = parser.add_argument, number(float, 0, 1e6)
    whole = number(int, 1, 10_000)
    add("--replicas", type=whole, default=1, help="how many, at least (default: 1)")
    add("--max_replicas", type=whole, help="how many, at most (default: --replicas)")
    add(
        "--target_ongoing",
        type=number(float, 0.1, 1e6),
        help="requests of a replica, beyond which another is started (default: --slots of each "
        "model)",
    )
    add("--upscale_s", type=some, help="for how long, beyond it (default: 30)")
    add("--downscale_s", type=some, help="for how long, below it (default: 600)")
    add("--num_cpus", type=some, default=1.0, help="that a replica reserves (default: 1)")
    add("--num_gpus", type=some, default=0.0, help="that a replica has (default: 0)")
    add("--num_tpus", type=some, default=0.0, help="chips that a replica has (default: 0)")
    add("--address", default="local", help="of a Ray cluster, as auto (default: one of its own)")
    flags = parser.parse_args(arguments)
    flags.max_replicas = flags.max_replicas or flags.replicas
    return flags


def _checked(flags: argparse.Namespace) -> Options:
    """What each replica is.

    Raises:
      ValueError: flags that do not go together, or don't fit the model; Ray is not installed; or
        the address is taken.
    """
    if importlib.util.find_spec("ray") is None:
        raise ValueError("this needs ray, which is not installed: pip install 'l2s-jax[ray]'")
    if flags.max_replicas < flags.replicas:
        raise ValueError(
            f"--max_replicas={flags.max_replicas} with --replicas={flags.replicas}: expected no "
            "fewer"
        )
    for name in ("target_ongoing", "upscale_s", "downscale_s"):
        if flags.max_replicas == flags.replicas and getattr(flags, name) is not None:
            raise ValueError(
                f"--{name}={getattr(flags, name):g} with --max_replicas={flags.max_replicas}: "
                f"expected more than --replicas={flags.replicas}"
            )
    wanted, there = flags.max_replicas * flags.num_cpus, os.cpu_count() or 1
    if flags.address == "local" and wanted > there:
        raise ValueError(
            f"--max_replicas={flags.max_replicas} --num_cpus={flags.num_cpus:g}: expected no more "
            f"than this machine's {there} processors in all, or --address of a cluster"
        )
    options = options_of(flags)
    # The model is where a cluster's machines see it, which this one need not; and Ray Serve may
    # listen there already.
    if flags.address != "local":
        return options
    from l2s_jax.serve.models import settings_of

    settings_of(options.models)
    return _listening(options)


def _listening(options: Options) -> Options:
    """Of a port that is free.

    Raises:
      ValueError: none is, or not the one that is asked for.
    """
    from l2s_jax.serve.run import listen

    with listen(options.host, options.port) as listener:
        return dataclasses.replace(options, port=listener.getsockname()[1])


def _application(flags: argparse.Namespace, options: Options) -> Any:
    """What Ray deploys."""
    from ray import serve

    slots = flags.slots * len(flags.models)
    scaling = {
        "min_replicas": flags.replicas,
        "max_replicas": flags.max_replicas,
        "target_ongoing_requests": flags.target_ongoing or slots,
        "upscale_delay_s": 30.0 if flags.upscale_s is None else flags.upscale_s,
        "downscale_delay_s": 600.0 if flags.downscale_s is None else flags.downscale_s,
    }
    deployment = serve.deployment(
        name=_NAME,
        autoscaling_config=scaling,
        # A slot that gets free finds a request; others wait for whichever replica is free.
        max_ongoing_requests=slots + min(slots, flags.max_waiting),
        max_queued_requests=max(1, flags.max_waiting),
        backpressure_config={"status_code": 429, "retry_after_s": _RETRY_S},
        graceful_shutdown_timeout_s=flags.drain_s,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=_LOOK_S,
        # What is wrong with a model is as wrong at the next attempt.
        max_constructor_retry_count=1,
        ray_actor_options={
            "num_cpus": flags.num_cpus,
            "num_gpus": flags.num_gpus,
            "resources": {"TPU": flags.num_tpus} if flags.num_tpus else {},
        },
    )
    return deployment(serve.ingress()(Replica)).bind(options)


def _connect(address: str) -> None:
    import ray

    # Ray tells its makers how it is used, unless the user says otherwise.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
    ray.init(
        address=address,
        log_to_driver=False,
        logging_level=logging.ERROR,
        **(local if address == "local" else {}),
    )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _why(error: Exception) -> Exception:
    """Why the replicas don't start: what the first of them says."""
    from ray import serve

    application = serve.status().applications.get(_NAME)
    messages = [one.message for one in application.deployments.values()] if application else []
    # Of a traceback, the last of the lines that begin with the name of an error.
    found = re.findall(r"^(\w*Error): (.*)", "\n".join(messages), re.MULTILINE)
    kind, said = found[-1] if found else ("", str(error))
    return ValueError(said) if kind == "ValueError" else RuntimeError(said)


def _end_on_signals(drain_s: float) -> None:
    """Raises SystemExit at the first signal; the next one waits for nobody."""

    def end(which: int, frame: object) -> NoReturn:
        status = STATUSES[signal.Signals(which)]
        signal.signal(which, signal.SIG_DFL)
        # Where Ray's own processes were told to end too, it would wait for them for a minute.
        late = threading.Timer(drain_s + _GRACE_S, os._exit, [status])
        late.daemon = True
        late.start()
        raise SystemExit(status)

    for one in heard():
        signal.signal(one, end)


def _serve(flags: argparse.Namespace, options: Options) -> NoReturn:
    """Until a signal.

    Raises:
      ValueError: a model can't be loaded; or the address is taken.
      RuntimeError: Ray failed.
    """
    import ray
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from l2s_jax.serve.run import ready_line

    _connect(flags.address)
    is_there = bool(serve.status().proxies)
    if flags.address != "local" and not is_there:
        options = _listening(options)
    _end_on_signals(options.drain_s)
    print("starting; Ray's logs are in /tmp/ray/session_latest/logs", file=sys.stderr, flush=True)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    try:
        serve.start(
            proxy_location="EveryNode",
            http_options={"host": options.host, "port": options.port},
            # The controller starts the proxies, which inherit it.
            controller_options={"runtime_env": {"env_vars": _AROUND_PROXIES}},
            logging_config=quiet,
        )
        application = _application(flags, options)
        try:
            serve.run(application, name=_NAME, logging_config=quiet)
        except RuntimeError as error:
            raise _why(error) from None
        line = ready_line(options, options.port)
        if is_there:  # its address is what it was started with
            line = f"Ray Serve, where it listens already, serves {', '.join(options.models.names)}"
        print(line, flush=True)
        while True:
            signal.pause()
    finally:
        serve.delete(_NAME)
        # What others have on the cluster stays; a cluster of our own ends as a whole.
        if flags.address != "local" and not serve.status().applications:
            serve.shutdown()
        ray.shutdown()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    flags = _flags(arguments)
    try:
        _serve(flags, _checked(flags))
    except (ValueError, OSError) as error:
        return told(error, 2)
    except RuntimeError as error:
        return told(error, 1)


if __name__ == "__main__":
    end_at_once()
    sys.exit(main())
