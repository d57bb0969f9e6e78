"""moto's server for s3 as a process of its own, which can be told to fail.

python tests/emulator.py PORT FAULTS [LOG]

Each request is a line of the file LOG: method, path and query. With FAULTS above 0, one request in
so many fails with 500 or 503, every other time after it has been done, and one in 2.5 times as many
takes two seconds.
"""

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

BUCKET = "bucket"
AT = f"s3://{BUCKET}"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Faulty:
    """A WSGI app in front of another."""

    def __init__(self, app, every, log):
        self.app, self.every, self.log = app, every, log
        self.count, self.failed = itertools.count(1), itertools.count()

    def __call__(self, environ, start_response):
        if environ["PATH_INFO"].startswith("/moto-api"):
            return self.app(environ, start_response)
        if self.log:
            line = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} {environ['QUERY_STRING']}"
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        if not self.every:
            return self.app(environ, start_response)
        number = next(self.count)
        if number % (5 * self.every // 2) == 0:
            time.sleep(2.0)
        if number % self.every:
            return self.app(environ, start_response)
        kind = next(self.failed)
        if kind % 2:
            # It is done, but its answer is lost.
            b"".join(self.app(environ, lambda *_: None))
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) if not kind % 2 else 0)
        start_response(("500 Internal Server Error", "503 Slow Down")[kind // 2 % 2], [])
        return [b""]


def serve(port, every, log=None):
    """Answers requests until the process is killed."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    app = DomainDispatcherApplication(create_backend_app)
    run_simple("127.0.0.1", port, Faulty(app, every, log), threaded=True)


@contextlib.contextmanager
def running(port, every=0, log=None):
    """The emulator, with an empty bucket; gives what the environment has to say to reach it."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(port), str(every), *([str(log)] if log else [])],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parent.parent,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/moto-api/", timeout=5).close()
                break
            time.sleep(0.1)
        variables = {**CREDENTIALS, "AWS_ENDPOINT_URL": url}
        for _ in range(3):
            with contextlib.suppress(OSError):
                request = urllib.request.Request(f"{url}/{BUCKET}", method="PUT")
                request.add_header("Host", "s3.amazonaws.com")
                urllib.request.urlopen(request, timeout=5).close()
                break
        yield variables
    finally:
        process.kill()
        process.wait()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def at(variables, root):
    """Has this process ask the store of an emulator."""
    from l2s_jax import buckets

    os.environ.update(variables, L2S_JAX_CACHE=str(root))
    buckets._system.cache_clear()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store in which a request in twenty fails, and one in fifty takes two seconds."""
    before = dict(os.environ)
    with running(free_port(), 20) as variables:
        at(variables, tmp_path_factory.mktemp("copies"))
        yield
    os.environ.clear()
    at(before, before.get("L2S_JAX_CACHE", ""))


if __name__ == "__main__":
    os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
    serve(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
