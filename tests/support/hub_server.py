"""A Hub in small for tests: the few requests that huggingface_hub makes of one, answered from folders on this
machine.

`Hub(folder)` serves folder/models/OWNER/NAME and folder/datasets/OWNER/NAME; point HF_ENDPOINT at its `url`.
What was downloaded whole stands in `taken`.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    def __init__(self, folder: Path, gated=(), stall_at: str = ""):
        """`gated`: repositories that list their files but give them to nobody; `stall_at`: a file that is
        never sent whole."""
        self.folder, self.gated, self.stall_at, self.taken, self.stalling = (
            folder,
            gated,
            stall_at,
            [],
            threading.Event(),
        )
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *words):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request) -> None:
        path = unquote(request.path.partition("?")[0])
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0)).decode()
        if listing := re.fullmatch(
            rf"/api/(models|datasets)/([^/]+/[^/]+)(?:/(tree|paths-info|revision)/(?:{COMMIT}|main)(/.*)?)?",
            path,
        ):
            kind, repo, what, folder = listing.groups()
            if not (self.folder / kind / repo).is_dir():
                self.send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
                return
            files = [p for p in sorted((self.folder / kind / repo).rglob("*")) if p.is_file()]
            rows = [self.describe(p, (self.folder / kind / repo)) for p in files]
            if what == "paths-info":
                rows = [row for row in rows if row["path"] in parse_qs(body)["paths"]]
            if what in ("revision", None):  # what `datasets` asks first
                siblings = [{"rfilename": row["path"]} for row in rows]
                rows = {
                    "id": repo,
                    "sha": COMMIT,
                    "private": False,
                    "tags": [],
                    "downloads": 0,
                    "siblings": siblings,
                }
            if what == "tree":
                inside = f"{folder[1:]}/" if folder else ""
                rows = [row for row in [*folders_of(rows), *rows] if row["path"].startswith(inside)]
                if parse_qs(request.path.partition("?")[2]).get("recursive", ["false"])[0].lower() == "false":
                    rows = [row for row in rows if "/" not in row["path"].removeprefix(inside)]
            self.send(request, 200, json.dumps(rows).encode(), {"Content-Type": "application/json"})
        elif file := re.fullmatch(rf"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/(?:{COMMIT}|main)/(.+)", path):
            kind, repo, name = file.groups()
            place = self.folder / (kind or "models") / repo / name
            if repo in self.gated:
                self.send(
                    request,
                    401,
                    b"",
                    {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."},
                )
            elif not place.is_file():
                self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            else:
                self.send_file(request, place, name)
        else:
            self.send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})

    def describe(self, path: Path, repo: Path) -> dict:
        return {
            "type": "file",
            "path": path.relative_to(repo).as_posix(),
            "size": path.stat().st_size,
            "oid": etag(path),
        }

    def send_file(self, request, place: Path, name: str) -> None:
        content = place.read_bytes()
        headers = {"ETag": f'"{etag(place)}"', "X-Repo-Commit": COMMIT}
        if request.command == "GET" and name == self.stall_at:
            request.send_response(200)
            for key, value in {**headers, "Content-Length": len(content)}.items():
                request.send_header(key, str(value))
            request.end_headers()
            request.wfile.write(content[: len(content) // 2])
            request.wfile.flush()
            self.stalling.set()
            threading.Event().wait(60)
            return
        self.send(request, 200, content, headers)
        if request.command == "GET":
            self.taken.append(name)

    def send(self, request, status: int, content: bytes, headers: dict) -> None:
        request.send_response(status)
        for key, value in {"Content-Length": len(content), **headers}.items():
            request.send_header(key, str(value))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)


def folders_of(rows: list[dict]) -> list[dict]:
    """The entries of the folders that hold these files."""
    found = {str(place) for row in rows for place in Path(row["path"]).parents} - {"."}
    return [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(found)]


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
