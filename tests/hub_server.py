"""A Hub of its own on 127.0.0.1 that the real huggingface_hub client can create, commit to and download from."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = {}  # "models/you/x", or "models/you/x@branch" -> {file: bytes}
        self.commits = {}  # the same -> commit id
        self.uploads = {}  # sha256 -> bytes
        self.tokens = set()
        self.denied = {}  # repo -> status and error code of every answer
        self.requests = 0
        self.failing: tuple[int, int | str] | None = None  # the number of the first request that fails, and how

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def parse_request(self):
        """With failures: a status; `close`: no answer but the end of the connection; `silence`: nothing."""
        if not super().parse_request():
            return False
        self.server.requests += 1
        if self.server.failing is None or self.server.requests < self.server.failing[0]:
            return True
        how = self.server.failing[1]
        self.close_connection = True
        if how == "silence":
            self.rfile.read()  # until the client gives up
        elif how != "close":
            self.body()
            self.answer({"error": "as the test asked"}, how)
        return False

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content=b"", status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def key(self, parts):
        """Repo of an address: api/models/you/x/... or [datasets/]you/x/resolve/..."""
        if parts[0] == "api":
            return "/".join(parts[1:4])
        return "/".join(parts[:3]) if parts[0] == "datasets" else "models/" + "/".join(parts[:2])

    def do_POST(self):
        self.server.tokens.add(self.headers.get("Authorization"))
        parts, body = self.path.split("?")[0].strip("/").split("/"), self.body()
        if parts[:3] == ["api", "repos", "create"]:
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}" if request.get("organization") else request["name"]
            key = f"{request.get('type') or 'model'}s/{name}"
            self.server.repos.setdefault(key, {})
            self.server.commits.setdefault(key, "0" * 40)
            return self.answer({"url": f"{self.server.url}/{name}", "id": name, "name": name})
        if parts[:2] == ["api", "validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        if "preupload" in parts:
            files = json.loads(body)["files"]
            mode = lambda path: "lfs" if path.endswith(".safetensors") else "regular"  # noqa: E731
            answer = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in files]
            return self.answer({"files": answer})
        if parts[-2:] == ["objects", "batch"]:
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.server.url}/upload/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if "branch" in parts:
            main, key = self.key(parts), f"{self.key(parts)}@{parts[-1]}"
            if key in self.server.repos:
                return self.answer({"error": "exists"}, 409)
            self.server.repos[key], self.server.commits[key] = dict(self.server.repos[main]), "1" * 40
            return self.answer({})
        if "commit" in parts:
            key = self.key(parts) + ("" if parts[-1] == "main" else f"@{parts[-1]}")
            if key not in self.server.repos:
                return self.answer({"error": "no such revision"}, 404, X_Error_Code="RevisionNotFound")
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    self.server.repos[key][value["path"]] = base64.b64decode(value["content"])
                if entry["key"] == "lfsFile":
                    self.server.repos[key][value["path"]] = self.server.uploads[value["oid"]]
            commit = self.server.commits[key] = hashlib.sha1(body).hexdigest()
            url = f"{self.server.url}/{key.removeprefix('models/')}/commit/{commit}"
            return self.answer({"commitUrl": url, "commitOid": commit, "pullRequestUrl": None})
        return self.answer({"error": "unknown"}, 404)

    def do_PUT(self):
        data = self.body()
        oid = self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.uploads[oid] = data
        self.answer()

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        key = self.key(parts)
        branches = [name for name in self.server.repos if name.startswith(f"{key}@")]
        if key in self.server.denied:
            status, code = self.server.denied[key]
            return self.answer(b"", status, X_Error_Code=code)
        key = next((name for name in branches if {name.partition("@")[2], self.server.commits[name]} & set(parts)), key)
        files = self.server.repos.get(key)
        if files is None:
            return self.answer(b"", 404, X_Error_Code="RepoNotFound")
        commit = self.server.commits[key]
        if parts[0] == "api" and "tree" in parts:
            tree = [
                {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for p, d in files.items()
            ]
            return self.answer(tree, content_type="application/json")
        if parts[0] == "api":
            siblings = [{"rfilename": name} for name in files]
            name = key.split("/", 1)[1]
            return self.answer({"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []})
        revision = parts[parts.index("resolve") + 1]
        if revision not in ("main", commit, key.partition("@")[2]):
            return self.answer(b"", 404, X_Error_Code="RevisionNotFound")
        name = "/".join(parts[parts.index("resolve") + 2 :])
        if name not in files:
            return self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
        return self.answer(files[name], X_Repo_Commit=commit, ETag=etag)

    do_HEAD = do_GET


@contextmanager
def local_hub():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
