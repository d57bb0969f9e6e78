"""Two servers behind one address: under load the second takes the place of the first."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import socketserver
import threading

import httpx
import loads
import pytest
import server


class Service(socketserver.ThreadingTCPServer):
    """To clients what a Service of Kubernetes is: a new connection comes to one of the servers that
    were ready when they were last asked.

    Attributes:
      servers: those that may be asked.
      ready: (host, port) of those that were ready.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Connection)
        self.servers, self.ready = [], []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def probe(self):
        self.ready = [place_of(one) for one in self.servers if is_ready(one)]


class _Connection(socketserver.BaseRequestHandler):
    def handle(self):
        place = random.choice(self.server.ready)
        with contextlib.suppress(OSError), socket.create_connection(place) as server:
            back = threading.Thread(target=hand_on, args=(server, self.request))
            back.start()
            hand_on(self.request, server)
            back.join()


def hand_on(source, target):
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def place_of(running):
    host, port = running.address.removeprefix("http://").split(":")
    return host, int(port)


def is_ready(running):
    try:
        return httpx.get(f"{running.address}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def service():
    with Service() as made:
        ended = threading.Event()

        def probe():
            while not ended.wait(0.1):
                made.probe()

        threads = [threading.Thread(target=work) for work in (made.serve_forever, probe)]
        for one in threads:
            one.start()
        yield made
        ended.set()
        made.shutdown()
        for one in threads:
            one.join()


def test_an_update_fails_no_request(service, tmp_path):
    model = server.write_model(tmp_path)[0]
    load = loads.Load(service.address, loads.answers(model))
    load.pause_s = 1.0
    flag = f"--max_new_tokens={loads.TOKENS}"
    with server.serving(model, flag) as first:
        service.servers = [first]
        load.wait_for(lambda: len(service.ready) == 1)
        with contextlib.ExitStack() as stack, load.running(streams=3, officials=2):
            # It outlives the clients.
            second = stack.enter_context(server.serving(model, flag))
            service.servers = [first, second]
            load.wait_for(lambda: len(service.ready) == 2)
            # As of a pod that is to end: no new connection comes to it, then it is told.
            service.servers = [second]
            load.wait_for(lambda: service.ready == [place_of(second)])
            load.wait_for_more(5)
            first.process.send_signal(signal.SIGTERM)
            assert first.end() == 0
            load.wait_for_more(5)
    assert load.counts["right"] == sum(load.counts.values())
