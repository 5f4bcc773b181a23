"""A replica that answers with its host's name, late where it is asked to: python slow_replica.py ADDRESS PORT"""

import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from platform import node


class Replica(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if f"slow on {node()}".encode() in body:
            time.sleep(120)
        self.answer()

    def answer(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(node())))
        self.end_headers()
        self.wfile.write(node().encode())

    def log_message(self, *arguments: object) -> None:
        pass


ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Replica).serve_forever()
