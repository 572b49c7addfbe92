"""A web server on this machine that drops connections, answers 503, stalls, or loses a file."""

import http.server
import re
import time
from pathlib import Path


class FaultyServer(http.server.ThreadingHTTPServer):
    """Serves a folder with range requests; what `faults` says befalls the next bodies that are asked for."""

    daemon_threads = True

    def __init__(self, folder: Path):
        self.folder, self.faults, self.befallen, self.gone, self.is_down = folder, [], [], set(), False
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body: bool):
        if self.server.is_down:
            return self.send_error(503)
        path = self.server.folder / self.path.lstrip("/").split("?")[0]
        if path.name in self.server.gone or not path.is_file():
            return self.send_error(404)
        fault = self.server.faults.pop(0) if self.server.faults and with_body else None
        if fault:
            self.server.befallen.append(fault)
        if fault == "503":
            return self.send_error(503)
        if fault == "stall":
            time.sleep(5)
        content = path.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = 0, len(content) - 1
        if match:
            first, last = int(match[1]), min(int(match[2] or last), last)
        self.send_response(206 if match else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        if match:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        body = content[first : last + 1]
        if with_body:
            self.wfile.write(body[: len(body) // 2] if fault == "drop" else body)
        if fault:
            self.close_connection = True
