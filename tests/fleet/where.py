"""A web server on the loopback of the network namespace that it is in: ``python -m tests.fleet.where ANSWER``. It says when it listens."""

from __future__ import annotations

import http.server
import sys

PORT = 8077


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers each request with what the program was given."""

    def do_GET(self) -> None:
        body = sys.argv[1].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    with http.server.HTTPServer(("127.0.0.1", PORT), Answer) as server:
        print("listening", flush=True)
        server.serve_forever()
