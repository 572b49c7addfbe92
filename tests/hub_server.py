"""
A Hub on 127.0.0.1: the part of its HTTP protocol that creating a repository, committing to it and reading it needs.

    with HubServer() as hub:                      # hub.url is the HF_ENDPOINT of other processes
        HfApi(endpoint=hub.url, token=hub.token).create_repo("me/model")
        hub.fail(503, times=2, kind="commit")     # the next two commits

Everything is in memory. A client that has hf_xet uploads with it whatever a server answers; this one speaks plain
LFS, so clients need HF_HUB_DISABLE_XET=1 (`hub.environment` has all that they need).
"""

import base64
import collections
import hashlib
import http.server
import json
import os
import re
import threading
import urllib.parse
from dataclasses import dataclass, field

import yaml


KINDS = {  # of request: its method and the form of its path
    "whoami": ("GET", r"/api/whoami-v2"),
    "yaml": ("POST", r"/api/validate-yaml"),
    "create": ("POST", r"/api/repos/create"),
    "preupload": ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)"),
    "commit": ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)"),
    "tree": ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?"),
    "info": ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?"),
    "batch": ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    "verify": ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/verify"),
    "upload": ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})"),
    "resolve": ("(GET|HEAD)", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
}
LARGE = re.compile(r"\.(safetensors|pt|bin|png)$|tfevents")  # goes through LFS, as the Hub's .gitattributes have it


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Commit:
    """`files` maps paths to contents, `large` are those that came through LFS."""

    oid: str
    message: str
    files: dict[str, bytes]
    large: frozenset[str]


@dataclass
class Repository:
    private: bool
    commits: list[Commit] = field(default_factory=list)

    def at(self, revision: str | None) -> Commit | None:
        if revision in (None, "main"):
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.oid == revision), None)


@dataclass
class Request:
    method: str
    path: str
    kind: str | None
    authorization: str | None
    status: int | str = "unanswered"


class HubServer(http.server.ThreadingHTTPServer):
    """
    `repositories`, `requests` and `large_files` are there to look at. User `me` has the token `token`; another token
    is answered with 401, as none is where one is needed.
    """

    daemon_threads = True
    token = "hf_" + "0123456789abcdef" * 2

    def __init__(self, port: int = 0):
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[dict] = []
        self.lock, self.closing = threading.Lock(), threading.Event()
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def environment(self, home) -> dict[str, str]:
        """Of a process that talks to this Hub, with a cache and a token of its own in the folder `home`."""
        mine = ("HF_", "HUGGING", "TRANSFORMERS_")
        others = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
        return others | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
        }

    # --- Faults: each befalls the next `times` requests of a kind (or of every kind) ---------------------------------

    def fail(self, status: int, times: float = float("inf"), kind: str | None = None):
        """Answers with a status; 401 is how a token is rejected."""
        self.faults.append({"status": status, "times": times, "kind": kind})

    def hang(self, seconds: float, times: float = float("inf"), kind: str | None = None):
        """Accepts, and does not answer for some time; then closes the connection."""
        self.faults.append({"seconds": seconds, "times": times, "kind": kind})

    def cut(self, times: float = float("inf"), kind: str = "upload"):
        """Closes the connection after half of the body."""
        self.faults.append({"cut": True, "times": times, "kind": kind})

    def heal(self):
        self.faults.clear()

    def next_fault(self, kind: str | None) -> dict:
        with self.lock:
            for fault in self.faults:
                if fault["times"] > 0 and fault["kind"] in (None, kind):
                    fault["times"] -= 1
                    return fault
        return {}

    def files(self, repo: str) -> dict[str, bytes]:
        """What is in `main`."""
        return self.repositories[repo].at("main").files

    def seen(self, kind: str) -> list[Request]:
        return [request for request in self.requests if request.kind == kind]

    def everything(self) -> bytes:
        """All that clients have stored, in one piece, to search it."""
        commits = [commit for repository in self.repositories.values() for commit in repository.commits]
        texts = [commit.message.encode() for commit in commits]
        return b"\n".join(
            [*texts, *(c for commit in commits for c in commit.files.values()), *self.large_files.values()]
        )


class Refusal(Exception):
    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60

    def log_message(self, *arguments):
        pass

    def handle_any(self):
        hub: HubServer = self.server
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        kind, match = next(
            (
                (kind, match)
                for kind, (method, form) in KINDS.items()
                if re.fullmatch(method, self.command) and (match := re.fullmatch(form, path))
            ),
            (None, None),
        )
        request = Request(self.command, self.path, kind, self.headers.get("Authorization"))
        hub.requests.append(request)
        fault = hub.next_fault(kind)
        if "cut" in fault:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            request.status, self.close_connection = "cut", True
            return
        body = self.body()
        if "seconds" in fault:
            hub.closing.wait(fault["seconds"])
            request.status, self.close_connection = "hung", True
            return
        try:
            if "status" in fault:
                raise Refusal(fault["status"], "", "a fault that a test has set")
            if kind is None:
                raise Refusal(404, "", f"this server knows no {self.command} {path}")
            if request.authorization not in (None, f"Bearer {hub.token}"):
                # Indiscreet, more than the Hub is: no client may print this.
                raise Refusal(401, "", f"Invalid credentials in Authorization header: {request.authorization}")
            with hub.lock:
                status, headers, answer = getattr(self, kind)(body, **match.groupdict())
        except Refusal as refusal:
            status, headers = refusal.status, {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
            answer = json.dumps({"error": str(refusal)}).encode()
        request.status = status
        self.answer(status, headers, answer)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, status: int, headers: dict, content: bytes):
        first, last = 0, len(content) - 1
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and status == 200:
            first, last = int(asked[1]), min(int(asked[2] or last), last)
            status, headers = 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
        content = content[first : last + 1]
        self.send_response(status)
        for name, value in {"Accept-Ranges": "bytes", "Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, value) -> tuple[int, dict, bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()

    def found(self, repo: str, revision: str | None = None) -> tuple[Repository, Commit]:
        repository = self.server.repositories.get(repo)
        if repository is None or (repository.private and not self.headers.get("Authorization")):
            raise Refusal(404 if self.headers.get("Authorization") else 401, "RepoNotFound", "Repository not found")
        commit = repository.at(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit

    def need_token(self):
        if not self.headers.get("Authorization"):
            raise Refusal(401, "", "Invalid username or password.")

    # --- Writing -----------------------------------------------------------------------------------------------------

    def whoami(self, body):
        self.need_token()
        return self.json({"type": "user", "name": "me", "fullname": "Me", "orgs": [{"type": "org", "name": "org"}]})

    def yaml(self, body):
        front_matter = re.match(r"---\n(.*?)\n---", json.loads(body)["content"], re.DOTALL)
        try:
            yaml.safe_load(front_matter[1] if front_matter else "")
        except yaml.YAMLError as error:
            answer = json.dumps({"errors": [{"message": str(error)}], "warnings": []})
            return 400, {"Content-Type": "application/json"}, answer.encode()
        return self.json({"errors": [], "warnings": []})

    def create(self, body):
        self.need_token()
        wanted = json.loads(body)
        if wanted.get("organization") not in (None, "me", "org"):
            raise Refusal(403, "", f"You don't have the rights to create a model under {wanted['organization']}")
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        status = 409 if name in self.server.repositories else 200
        if status == 200:
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            first = Commit(hashlib.sha1(name.encode()).hexdigest(), "initial commit", {}, frozenset())
            self.server.repositories[name] = Repository(private, [first])
        answer = {"url": f"{self.server.url}/{name}", "name": name}
        return status, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    def preupload(self, body, repo, revision):
        self.need_token()
        _, commit = self.found(repo, revision)
        files = []
        for wanted in json.loads(body)["files"]:
            path = wanted["path"]
            answer = {"path": path, "uploadMode": "lfs" if LARGE.search(path) else "regular", "shouldIgnore": False}
            if path in commit.files:
                content, is_large = commit.files[path], path in commit.large
                answer["oid"] = hashlib.sha256(content).hexdigest() if is_large else git_hash(content)
            files.append(answer)
        return self.json({"files": files})

    def batch(self, body, repo):
        self.need_token()
        objects = []
        for wanted in json.loads(body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.large_files:
                answer["actions"] = {
                    "upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.server.url}/{repo}.git/info/lfs/verify"},
                }
            objects.append(answer)
        return self.json({"transfer": "basic", "objects": objects})

    def upload(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "", "The content is not what its hash says")
        self.server.large_files[oid] = body
        return 200, {}, b""

    def verify(self, body, repo):
        wanted = json.loads(body)
        if len(self.server.large_files.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, "", "The file was not uploaded")
        return 200, {}, b""

    def commit(self, body, repo, revision):
        self.need_token()
        repository, parent = self.found(repo, revision)
        files, large, message = dict(parent.files), set(parent.large), ""
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                large.discard(value["path"])
            elif key == "lfsFile":
                if value["oid"] not in self.server.large_files:
                    raise Refusal(400, "", f"{value['path']} points to a large file that was not uploaded")
                files[value["path"]] = self.server.large_files[value["oid"]]
                large.add(value["path"])
            elif key == "deletedFile":
                files.pop(value["path"])
            else:
                raise Refusal(400, "", f"this server knows no {key} in a commit")
        oid = hashlib.sha1(parent.oid.encode() + body).hexdigest()
        repository.commits.append(Commit(oid, message, files, frozenset(large)))
        return self.json({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"})

    # --- Reading -----------------------------------------------------------------------------------------------------

    def info(self, body, repo, revision):
        repository, commit = self.found(repo, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        facts = {"_id": "0" * 24, "id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": commit.oid}
        return self.json({**facts, "private": repository.private, "siblings": siblings, "tags": [], "downloads": 0})

    def tree(self, body, repo, revision, path):
        _, commit = self.found(repo, revision)
        entries, folders = [], collections.Counter()
        is_recursive = "recursive=true" in self.path.lower() or "recursive=1" in self.path
        for name, content in commit.files.items():
            if path and not name.startswith(f"{path}/"):
                continue
            below = name[len(path) + 1 :] if path else name
            if "/" in below:
                folders[f"{path}/" * bool(path) + below.split("/")[0]] += 1
                if not is_recursive:
                    continue
            entry = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
            if name in commit.large:
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        if path and not entries and not folders:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist on {revision}")
        entries += [{"type": "directory", "path": name, "oid": git_hash(name.encode())} for name in folders]
        return self.json(entries)

    def resolve(self, body, repo, revision, path):
        _, commit = self.found(repo, revision)
        if path not in commit.files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        content, headers = commit.files[path], {"X-Repo-Commit": commit.oid}
        if path not in commit.large:
            return 200, {**headers, "ETag": f'"{git_hash(content)}"'}, content
        # The Hub redirects to another host, with the same answer in the end.
        oid = hashlib.sha256(content).hexdigest()
        return (
            200,
            {**headers, "ETag": f'"{oid}"', "X-Linked-Etag": f'"{oid}"', "X-Linked-Size": len(content)},
            content,
        )
