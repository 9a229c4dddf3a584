"""A server that plays the Hugging Face hub for one dataset, so that its own library is what downloads."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/web"


@contextmanager
def hub_server(files: Mapping[str, bytes], fetched: list[str]) -> Iterator[str]:
    """The address of a hub with this dataset at its branch main; paths that are downloaded are added to `fetched`."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            body, headers, code = _answer_to(path, files)
            if with_body and code == 200 and "/resolve/" in path:
                fetched.append(path.partition(f"/resolve/{COMMIT}/")[2])
            self.send_response(code)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _answer_to(path: str, files: Mapping[str, bytes]) -> tuple[bytes, dict[str, str], int]:
    api, resolve = f"/api/datasets/{REPO}", f"/datasets/{REPO}/resolve/{COMMIT}/"
    if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
        return json.dumps({"id": REPO, "sha": COMMIT}).encode(), {}, 200
    if path == f"{api}/tree/{COMMIT}":
        return json.dumps([_entry(*file) for file in files.items()]).encode(), {}, 200
    if path.startswith(resolve) and path.removeprefix(resolve) in files:
        body = files[path.removeprefix(resolve)]
        return body, {"ETag": f'"{_blob(body)}"', "X-Repo-Commit": COMMIT}, 200
    what = "RevisionNotFound" if path.startswith(f"{api}/revision") else "RepoNotFound"
    return b"", {"X-Error-Code": what, "X-Error-Message": f"{what}: no such thing"}, 404


def _entry(path: str, body: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(body), "oid": _blob(body)}


def _blob(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
