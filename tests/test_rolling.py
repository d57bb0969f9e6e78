"""Two servers behind one address: one is replaced, and one is killed, under load."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import socketserver
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

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
      open: how many connections each of those has.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Connection)
        self.servers, self.ready, self.open = [], [], Counter()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def probe(self):
        self.ready = [place_of(one) for one in self.servers if is_ready(one)]


class _Connection(socketserver.BaseRequestHandler):
    def handle(self):
        place = random.choice(self.server.ready)
        self.server.open[place] += 1
        with contextlib.suppress(OSError), socket.create_connection(place) as server:
            back = threading.Thread(target=hand_on, args=(server, self.request))
            back.start()
            hand_on(self.request, server)
            back.join()
        self.server.open[place] -= 1


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


def test_an_update_fails_no_request_and_a_loss_no_answer(service, tmp_path):
    model = server.write_model(tmp_path)[0]
    load = loads.Load(service.address, loads.answers(model))
    with contextlib.ExitStack() as stack:

        def start():
            flag = f"--max_new_tokens={loads.TOKENS}"
            running = stack.enter_context(server.serving(model, flag))
            service.servers.append(running)
            return running

        with ThreadPoolExecutor(2) as pool:
            first, second = [one.result() for one in [pool.submit(start), pool.submit(start)]]
        load.wait_for(lambda: len(service.ready) == 2)
        with load.running(streams=3, officials=2):
            load.wait_for_more(4)
            third = start()
            load.wait_for(lambda: len(service.ready) == 3)
            # As of a pod that is to end: no new connection comes to it, then it is told.
            service.servers.remove(first)
            load.wait_for(lambda: len(service.ready) == 2)
            load.wait_for_more(4)
            first.process.send_signal(signal.SIGTERM)
            assert first.end() == 0
            load.wait_for_more(8)
            assert set(load.counts) <= {"right", "repeated"} and not load.counts["repeated"]
            load.pause_s = 0.0
            load.wait_for_more(4)
            busier = max(second, third, key=lambda one: service.open[place_of(one)])
            busier.process.kill()
            load.wait_for(lambda: len(service.ready) == 1)
            load.wait_for_more(8)
    assert not load.counts["wrong"]
    assert load.counts["broken"] + load.counts["repeated"] + load.counts["refused"]
