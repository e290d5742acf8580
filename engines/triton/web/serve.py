"""The page, and a bridge from it to the server's gRPC, which browsers do not speak. For one person's machine.

    python -m engines.triton.web.serve --triton 127.0.0.1:8001 --port 8080

Listens on 127.0.0.1 alone, and refuses requests of pages from elsewhere. /stream answers with events as the
server sends its own: {"frame": "data:image/png;base64,...", "index": 0}, {"progress": 0.5}, {"error": "..."}.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from collections.abc import Generator
from contextlib import closing
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from numpy.typing import NDArray

from engines.triton.client import stream
from nova_export.errors import NovaExportError

FOLDER = Path(__file__).parent
PAGES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
NUMBERS = ("max_latent_length", "num_inference_steps", "num_diffusion_steps", "seed")
SECONDS = 300.0  # to wait for an answer, in the server's queue too


class Handler(BaseHTTPRequestHandler):
    """GET of the page's files, and of /stream?prompt=...; when the browser leaves, the server stops."""

    def __init__(self, triton: str, *args: Any) -> None:
        self.triton = triton
        super().__init__(*args)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if not self._is_local():
            self.send_error(403, "this is for pages of this machine")
        elif url.path in PAGES:
            name, kind = PAGES[url.path]
            self._begin(f"{kind}; charset=utf-8")
            self.wfile.write((FOLDER / name).read_bytes())
        elif url.path == "/stream":
            self._begin("text/event-stream")
            self._stream({name: values[0] for name, values in parse_qs(url.query).items()})
        else:
            self.send_error(404)

    def _is_local(self) -> bool:
        """Whether it was addressed as this machine: a foreign name may have been made to point here."""
        return (self.headers["Host"] or "").rpartition(":")[0] in ("127.0.0.1", "localhost")

    def _begin(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", "default-src 'self'; img-src 'self' data:")
        self.end_headers()

    def _stream(self, given: dict[str, str]) -> None:
        try:
            with closing(events(self.triton, given)) as found:
                for event in found:
                    self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                    self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            return  # the browser left; closing the events cancelled the request

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: prompts are nobody else's business."""


def events(triton: str, given: dict[str, str]) -> Generator[dict[str, Any], None, None]:
    """What the page shows, in order. Errors are its last event."""
    try:
        arguments: dict[str, Any] = {name: int(given[name]) for name in NUMBERS if given.get(name)}
        answers = stream(
            triton, prompt=given.get("prompt", ""), report_progress=True, timeout=SECONDS, **arguments
        )
        for answer in answers:
            if answer.progress is not None:
                yield {"progress": answer.progress}
            if answer.frame is not None:
                yield {"frame": png(answer.frame[0]), "index": answer.frame_index}
            if answer.seed is not None:
                yield {"seed": str(answer.seed), "notice": answer.notice}
        yield {"done": True}
    except (NovaExportError, ValueError) as error:
        yield {"error": str(error)}


def png(frame: NDArray[np.uint8]) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def web_server(triton: str, port: int) -> ThreadingHTTPServer:
    """One that listens on 127.0.0.1; port 0 takes a free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, triton))


def main() -> None:
    parser = argparse.ArgumentParser(description="A page on 127.0.0.1 that shows videos as they are made.")
    parser.add_argument("--triton", default="127.0.0.1:8001", help="HOST:PORT of the server's gRPC")
    parser.add_argument("--port", type=int, default=8080)
    given = parser.parse_args()
    with web_server(given.triton, given.port) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
