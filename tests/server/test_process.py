"""``ms-quant serve`` in a process: ports, signals, and what it says."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from server_process import served

from ms_quant.errors import MsQuantError
from ms_quant.server import run

MODEL = Path(__file__).parents[2] / "models" / "stdlib-qwen3-6m"
LONG = {"prompt": "a", "max_tokens": 900, "temperature": 0, "ignore_eos": True, "stream": True}


def post(address: str, **body: object):
    data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    return urlopen(Request(f"{address}/v1/completions", data, kind), timeout=30)


@pytest.mark.parametrize("grace", [60, 0])
def test_signals_end_it_in_good_order(grace):
    """Running answers end first or are ended, new ones are refused, the status is 0."""
    with served(MODEL, "--grace", grace) as server:
        answer = post(server.address, **LONG)
        first = answer.readline()
        rest: list[bytes] = []
        reader = threading.Thread(target=lambda: rest.extend(answer), daemon=True)
        reader.start()
        server.process.send_signal(signal.SIGTERM if grace else signal.SIGINT)
        assert server.process.wait(60) == 0
        reader.join(10)
        events = [line for line in (first, *rest) if line.strip()]
        assert events[-1].strip() == b"data: [DONE]"
        last = json.loads(events[-2].removeprefix(b"data: "))
        if grace:
            assert last["choices"][0]["finish_reason"] == "length"
        else:
            assert last["error"]["message"] == "the server is stopping"
        assert server.lines[-1] == "stopped\n"


def test_a_client_that_goes_ends_its_text():
    """In the middle of a stream, and where it waits for the whole."""
    with served(MODEL) as server:
        for stream in (True, False):
            host, port = server.address.removeprefix("http://").split(":")
            raw = json.dumps({**LONG, "n": 8, "stream": stream}).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(raw)}\r\n\r\n"
            with socket.create_connection((host, int(port))) as client:
                client.sendall(head.encode() + raw)
                if stream:
                    assert client.recv(10)
                else:
                    time.sleep(0.3)
            until = time.monotonic() + 8
            while b"cache_tokens_reserved 0.0" not in urlopen(f"{server.address}/metrics").read():
                assert time.monotonic() < until
                time.sleep(0.05)
        assert json.load(urlopen(f"{server.address}/health")) == {"status": "ok"}


def test_addresses_that_cannot_be_listened_on():
    with run.listening("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(MsQuantError, match=f"port {port} of 127.0.0.1 is in use, expected"):
            run.listening("127.0.0.1", port)
    with pytest.raises(MsQuantError, match=r"--host 192\.0\.2\.1 --port 0: "):
        run.listening("192.0.2.1", 0)
    with pytest.raises(MsQuantError, match=r"--host nowhere\.invalid: "):
        run.listening("nowhere.invalid", 0)


def test_a_missing_extra_is_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    with pytest.raises(MsQuantError, match=r"serve needs uvicorn, .* 'ms-quant\[server\]'"):
        run.require_extra()
