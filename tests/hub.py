"""A stand-in for the Hub on this machine: as much of its HTTP API as creating, uploading and downloading a repository takes."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What was uploaded.

    Attributes:
        endpoint: Address, for HF_ENDPOINT.
        files: File contents by repository and path.
        tokens: Authorisation headers that came with uploads.
    """

    def __init__(self, endpoint: str):
        self.endpoint = endpoint
        self.files: dict[str, dict[str, bytes]] = {}
        self.tokens: set[str | None] = set()


@contextmanager
def local_hub():
    """A running Hub that takes any upload and serves it again."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    server.hub = hub  # pyright: ignore[reportAttributeAccessIssue]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        """Silent."""

    def do_POST(self):
        hub = self.server.hub
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.tokens.add(self.headers.get("Authorization"))
        parts = self.path.strip("/").split("/")
        if parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            hub.files.setdefault(repo, {})
            return self._json({"url": f"{hub.endpoint}/{repo}", "name": repo, "id": repo})
        if parts == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        repo = "/".join(parts[2:4])
        if repo not in hub.files:
            return self._json({"error": f"no repository {repo}"}, status=404)
        if parts[4] == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self._json({"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]})
        if parts[4] == "commit":
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    hub.files[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self._json({"commitUrl": f"{hub.endpoint}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})
        return self._json({"error": f"unknown request {self.path}"}, status=404)

    def do_GET(self):
        self._answer(send=True)

    def do_HEAD(self):
        self._answer(send=False)

    def _answer(self, *, send):
        hub = self.server.hub
        parts = self.path.split("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        files = hub.files.get(repo)
        if files is None:
            return self._json({"error": "Repository not found"}, status=404, code="RepoNotFound")
        if api and "tree" in parts:
            sizes = [
                {"type": "file", "path": path, "size": len(data), "oid": _oid(data)} for path, data in files.items()
            ]
            return self._json(sizes)
        if api:
            siblings = [{"rfilename": path} for path in files]
            return self._json({"id": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})
        data = files.get("/".join(parts[4:]))
        if data is None:
            return self._json({"error": "Entry not found"}, status=404, code="EntryNotFound")
        self.send_response(200)
        self.send_header("ETag", f'"{_oid(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if send:
            self.wfile.write(data)
        return None

    def _json(self, value, *, status=200, code=None):
        data = json.dumps(value).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(data):
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
