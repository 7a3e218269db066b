"""A RAY_ADDRESS where no Ray lets us in is refused in words and in bounded time, whatever listens there."""

import socket
import sys
import threading
import time

import pytest

from harness.api import ConfigError
from harness.execution import head_node
from harness.execution.head_node import require_head_node

SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(head_node, "ANSWER_S", 0.5)


@pytest.fixture
def listener():
    """`listener(answer)` is the address of a socket that says `answer` to everyone and then nothing."""
    sockets = []

    def start(answer: bytes = b"", close: bool = False) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        sockets.append(server)

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                sockets.append(connection)
                connection.sendall(answer)
                if close:
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        return f"127.0.0.1:{server.getsockname()[1]}"

    yield start
    for one in sockets:
        one.close()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0\0"])
def test_a_port_that_is_silent_or_speaks_otherwise_is_refused(listener, answer):
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS=127.0.0.1:\d+: something listens there, but in 0.5 s it did not answer"):
        require_head_node(listener(answer))
    assert time.monotonic() - began < 5


def test_a_port_that_hangs_up_is_refused(listener):
    with pytest.raises(ConfigError, match="did not answer as a head node"):
        require_head_node(listener(close=True))


@pytest.mark.processes
@pytest.mark.parametrize("encrypted", [False, True])
def test_a_port_that_answers_and_then_falls_silent_is_given_up(listener, monkeypatch, encrypted):
    """By ending the process that connects: a call into Ray cannot be ended, and took more than 400 s here."""
    monkeypatch.setattr(head_node, "CONNECT_S", 1.0)
    if encrypted:
        monkeypatch.setenv("RAY_USE_TLS", "1")
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"does not let us in \(no connection in 1 s\); check RAY_AUTH_MODE"):
        require_head_node(listener(b"" if encrypted else SETTINGS))
    assert time.monotonic() - began < 10


def test_nothing_at_the_address_is_refused(listener):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConfigError, match=r"no answer \(.*Start the head node"):
        require_head_node(f"127.0.0.1:{port}")
    with pytest.raises(ConfigError, match="no answer"):
        require_head_node("127.0.0.1:99999")


@pytest.mark.parametrize("address", ["auto", "127.0.0.1", ":6379", "ray://127.0.0.1:10001", "127.0.0.1:port"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ConfigError, match="expected host:port of a running head node"):
        require_head_node(address)


@pytest.mark.processes
def test_what_ray_says_is_told(listener, monkeypatch):
    monkeypatch.setattr(head_node, "_CONNECT", "raise SystemExit('RuntimeError: Version mismatch')")
    with pytest.raises(ConfigError, match=r"does not let us in \(RuntimeError: Version mismatch\)"):
        require_head_node(listener(SETTINGS))
    monkeypatch.setattr(head_node, "_CONNECT", "import os; os.abort()")
    with pytest.raises(ConfigError, match=r"does not let us in \(exit code -6\)"):
        require_head_node(listener(SETTINGS))
    monkeypatch.setattr(head_node, "_CONNECT", "print('connected')")
    require_head_node(listener(SETTINGS))
    assert sys.executable


def test_a_token_file_that_is_missing_or_empty_is_named_before_anything_is_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"RAY_AUTH_MODE=token: .*\.ray/auth_token: cannot be read \(No such file.*copy"):
        require_head_node("127.0.0.1:1")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "~/token")
    with pytest.raises(ConfigError, match=r"RAY_AUTH_TOKEN_PATH=~/token: cannot be read \(No such file"):
        require_head_node("127.0.0.1:1")
    (tmp_path / "token").write_text(" \n")
    with pytest.raises(ConfigError, match="is empty"):
        require_head_node("127.0.0.1:1")
    (tmp_path / "token").write_text("secret")
    with pytest.raises(ConfigError, match="no answer"):
        require_head_node("127.0.0.1:1")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="cannot be read"):
        require_head_node("127.0.0.1:1")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    with pytest.raises(ConfigError, match="no answer"):
        require_head_node("127.0.0.1:1")
