"""As much of W&B's server as a run needs, on this machine; it can stop answering."""

import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """The server.

    `silent` is set to answer no request any more. Like old servers, this one does not know clients'
    ids, so wandb waits for the artifact of every table; and it cannot keep artifacts.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.silent, self.closed = threading.Event(), threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        entity = {"id": "RW50OjE=", "name": "me"}
        if "viewer" in query:
            return {"viewer": {"id": "1", "entity": "me", "flags": "{}", "teams": {"edges": []}}}
        if "__type" in query:
            return {"QueryType": {"fields": []}, "__type": {"fields": [], "inputFields": []}}
        if "upsertBucket" in query:
            name = variables.get("name") or "one"
            project = {"id": "1", "name": "p", "entity": entity}
            bucket = {"id": "1", "name": name, "displayName": name, "config": "{}"}
            return {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": True}}
        if "createRunFiles" in query:
            url = f"{self.address}/put"
            files = [{"name": name, "uploadUrl": url} for name in variables.get("files", [])]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return {}

    def receive(self, path: str, body: bytes) -> None:
        """Take the body of a request that is no query: a run's history, or a file."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def read_body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(parts)
        else:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
        return gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body

    def handle_request(self) -> None:
        body = self.read_body()
        if self.server.silent.is_set():
            self.server.closed.wait()
            return
        content: dict[str, Any] = {"exitcode": None, "limits": {}}
        if self.path.startswith("/graphql"):
            asked = json.loads(body)
            content = {"data": self.server.answer(asked["query"], asked.get("variables") or {})}
        else:
            self.server.receive(self.path, body)
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = handle_request


@contextlib.contextmanager
def serving(server: Server | None = None) -> Iterator[Server]:
    server = server or Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.closed.set()
        server.shutdown()
        server.server_close()
