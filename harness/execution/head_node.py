"""Is a Ray head node at an address, and does it let us in? Ray's own answer to no can take minutes, or never come.

First by a look at the port, which costs nothing; then by another process that connects, for a call into Ray cannot be ended.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from harness.api import ConfigError, require

ANSWER_S = 5.0
CONNECT_S = 90.0
"""For importing Ray and connecting: 2 to 5 s where nothing else runs. A wrong token takes Ray half a minute to notice."""
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How HTTP/2 begins, which Ray's gRPC speaks: the client's preface and its empty settings. The server answers with its own."""
_SETTINGS, _HEADER = 4, 9
_CONNECT = """
import logging, os, ray
try:
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.CRITICAL)
    ray.cluster_resources()
except Exception as error:
    raise SystemExit(f"{type(error).__name__}: {' '.join(str(error).split())}")
print("connected")
"""


def require_head_node(address: str) -> None:
    """ConfigError, in bounded time, where no head node at `address` lets us in."""
    host, _, port = address.rpartition(":")
    require(bool(host) and port.isdigit() and "//" not in host,
            f"RAY_ADDRESS={address}: expected host:port of a running head node, such as 10.0.0.1:6379; unset it to run on this "
            "machine")
    _require_token()
    require_answer(address)
    _require_entry(address)


def require_answer(address: str) -> None:
    """ConfigError, within seconds, where nothing at `address` speaks as a head node does."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S) as connection:
            answers = _encrypted() or _answers(connection)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"RAY_ADDRESS={address}: no answer ({error}). Start the head node, or unset RAY_ADDRESS to run on this "
                          "machine") from None
    require(answers, f"RAY_ADDRESS={address}: something listens there, but in {ANSWER_S:g} s it did not answer as a head node of "
            "Ray does. Take the address that `ray start --head` printed, or unset RAY_ADDRESS to run on this machine")


def _answers(connection: socket.socket) -> bool:
    """Whether an HTTP/2 server is at the other end."""
    got = b""
    try:
        connection.sendall(_HELLO)
        while len(got) < _HEADER and (more := connection.recv(_HEADER - len(got))):
            got += more
    except OSError:
        return False
    return len(got) == _HEADER and got[3] == _SETTINGS


def _encrypted() -> bool:
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _require_token() -> None:
    """Ray ends in a traceback, or the process, where the file it is told of is missing."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_MODE", "").lower() not in ("", "token"):
        return
    told = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not told and os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return
    path = Path(told).expanduser() if told else Path.home() / ".ray" / "auth_token"
    name = f"RAY_AUTH_TOKEN_PATH={told}" if told else f"RAY_AUTH_MODE=token: {path}"
    remedy = "copy the head node's token file there, with mode 600, or unset the two variables where the cluster asks for none"
    try:
        require(bool(path.read_bytes().strip()), f"{name}: is empty; {remedy}")
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror}); {remedy}") from None


def _require_entry(address: str) -> None:
    environment = {**os.environ, "RAY_ADDRESS": address}
    try:
        done = subprocess.run([sys.executable, "-c", _CONNECT], env=environment, stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, timeout=CONNECT_S, check=False)
    except subprocess.TimeoutExpired:
        said = f"no connection in {CONNECT_S:g} s"
    else:
        if done.returncode == 0 and "connected" in done.stdout:
            return
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]
    raise ConfigError(f"RAY_ADDRESS={address}: something listens there but does not let us in ({said}); check RAY_AUTH_MODE and "
                      "RAY_AUTH_TOKEN_PATH, and that both sides run the same Ray")
