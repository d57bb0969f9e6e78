"""A small server that speaks as much of the hub's protocol as `huggingface_hub` asks for."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path


class Repository:
    """Commits, each a dict of path to content, and what names stand for."""

    def __init__(self, *, gated: bool = False, token: str = ""):
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, str] = {}
        self.gated, self.token = gated, token

    def commit(self, files: dict[str, bytes], *refs: str) -> str:
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[sha] = files
        self.refs |= dict.fromkeys(("main", *refs), sha)
        return sha

    def add(self, folder: Path, *refs: str) -> str:
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return self.commit({str(p.relative_to(folder)): p.read_bytes() for p in paths}, *refs)


class Hub:
    """The repositories, and the requests that came."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.url = ""

    def __getitem__(self, name: str) -> Repository:
        return self.repositories.setdefault(name, Repository())

    def fetched(self) -> set[str]:
        """Names of files of which the content was sent."""
        paths = [path for method, path in self.requests if method == "GET"]
        return {
            path.split("/resolve/")[1].split("/", 1)[1] for path in paths if "/resolve/" in path
        }


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, value: object = None, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(body)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status: int, code: str) -> None:
        self._send(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def _repository(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None or found.token not in (self.headers.get("Authorization") or ""):
            self._fail(401, "RepoNotFound")
            return None
        return found

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        parts = path.strip("/").split("/")
        asked = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if asked else parts[:2])
        if (repository := self._repository(name)) is None:
            return
        kind, *rest = (parts[4:] if asked else parts[2:]) or ["revision", "main"]
        # A revision may have a slash.
        known = [*repository.commits, *repository.refs]
        joined = "/".join(rest)
        revision = next((r for r in known if f"{joined}/".startswith(f"{r}/")), None)
        if revision is None:
            return self._fail(404, "RevisionNotFound")
        sha = repository.refs.get(revision, revision)
        files = repository.commits[sha]
        if kind == "revision":
            siblings = [{"rfilename": file} for file in files]
            return self._send(200, {"id": name, "modelId": name, "sha": sha, "siblings": siblings})
        if kind == "tree":
            entries = [
                {
                    "type": "file",
                    "path": file,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for file, data in files.items()
            ]
            return self._send(200, entries)
        if repository.gated:
            return self._fail(403, "GatedRepo")
        file = joined.removeprefix(f"{revision}/")
        if file not in files:
            return self._fail(404, "EntryNotFound")
        etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
        self._send(200, files[file], ETag=etag, X_Repo_Commit=sha)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/repos/create":
            fields = json.loads(body)
            if "hf_pusher" not in (self.headers.get("Authorization") or ""):
                return self._fail(401, "Unauthorized")
            name = f"{fields.get('organization') or 'me'}/{fields['name']}"
            status = 409 if name in self.hub.repositories else 200
            self.hub[name]
            return self._send(status, {"url": f"{self.hub.url}/{name}", "id": name})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        *_, organization, name, action, _ = path.strip("/").split("/")
        repository = self.hub[f"{organization}/{name}"]
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self._send(200, {"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        made = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        sha = repository.commit(made)
        url = f"{self.hub.url}/{organization}/{name}/commit/{sha}"
        self._send(200, {"success": True, "commitOid": sha, "commitUrl": url})


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub on the loopback interface, at `url`."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
