"""MLflow's own server in this process, behind a proxy that loses or holds back chosen answers after the request was obeyed."""

from __future__ import annotations

import base64
import contextlib
import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@contextlib.contextmanager
def mlflow_server(folder: Path, database: Path, monkeypatch):
    """MLflow's server over the SQLite file `database`; yields its port."""
    from werkzeug.serving import make_server

    for name, value in {"_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{database}", "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
                        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
                        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # the server sets it for its process, which is this one
    from mlflow.server import app, handlers

    for name in ("_tracking_store", "_model_registry_store", "_artifact_repo"):
        monkeypatch.setattr(handlers, name, None)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join(10)


class Proxy:
    """Hands requests on to `port`. Of answers to `what`, the first `times` are lost, or come `late` seconds late.

    login: 'user:password' to add to every request, as a browser does once it was told.
    """

    def __init__(self, port: int, what: str = "", times: int = 0, late: float = 0.0, login: str = "") -> None:
        self.left, self.asked = times, 0
        proxy = self
        added = {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"} if login else {}

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hit = self.path.split("?")[0].endswith(what)
                proxy.asked += hit
                lost = hit and proxy.left > 0
                proxy.left -= lost
                upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "origin")}
                upstream.request(self.command, self.path, body, headers | added)
                answer = upstream.getresponse()
                content = answer.read()
                if lost:
                    time.sleep(late)
                    if not late:
                        self.close_connection = True
                        return
                with contextlib.suppress(OSError):  # whoever asked may have gone
                    self.send_response(answer.status)
                    for name, value in answer.getheaders():
                        if name.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                            self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

            def log_message(self, *arguments) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        """End it."""
        self.server.shutdown()
        self.server.server_close()
