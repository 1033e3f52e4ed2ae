"""A chat endpoint on this machine that says what a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Endpoint:
    """replies: what to say, in order; a number is an HTTP status to fail with. requests: (path, headers of any case, body) as they came."""

    def __init__(self, replies: list[str | int]) -> None:
        self.replies, self.requests, self.url = list(replies), [], ""


@contextmanager
def serving(*replies: str | int) -> Iterator[Endpoint]:
    """An `Endpoint` at ``.url`` while the block runs."""
    endpoint = Endpoint(list(replies))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            endpoint.requests.append((self.path, self.headers, body))
            reply = endpoint.replies.pop(0) if endpoint.replies else 500
            if isinstance(reply, int):
                # as badly as a server can behave: it repeats the key
                payload = {"error": {"message": f"refused {self.headers['Authorization']}", "type": "x"}}
            else:
                message = {"role": "assistant", "content": reply}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                payload = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
            sent = json.dumps(payload).encode()
            self.send_response(reply if isinstance(reply, int) else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
