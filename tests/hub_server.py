"""A small Hub on the loopback interface: enough of its API for huggingface_hub, transformers, PEFT, timm and datasets.

In a test, `with hub() as server:` serves from a thread and `with hub_process(store) as server:` from a process of its
own, which a test may kill and start again on the same store. HF_ENDPOINT is read when huggingface_hub is imported, so
clients run in subprocesses: `server.run(code, token="hf_alice")`. There are two users, alice and bob.

Not imitated: Xet storage, redirects to a CDN, multipart uploads, pull requests, organisations, rate limits.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml


USERS = {"hf_alice": "alice", "hf_bob": "bob"}
BLOCK = 1 << 16
LFS_SUFFIXES = tuple(".safetensors .bin .pt .pth .onnx .npz .parquet .arrow .png .jpg .jpeg .gz .zip".split())
LFS_SIZE = 10_000_000

LICENSES = """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
other""".split()
PIPELINE_TAGS = """text-classification token-classification table-question-answering question-answering
zero-shot-classification translation summarization feature-extraction text-generation text2text-generation fill-mask
sentence-similarity text-to-speech text-to-audio automatic-speech-recognition audio-to-audio audio-classification
audio-text-to-text voice-activity-detection depth-estimation image-classification object-detection image-segmentation
text-to-image image-to-text image-to-image image-to-video unconditional-image-generation video-classification
reinforcement-learning robotics tabular-classification tabular-regression tabular-to-text table-to-text multiple-choice
text-ranking text-retrieval time-series-forecasting text-to-video image-text-to-text visual-question-answering
document-question-answering zero-shot-image-classification graph-ml mask-generation zero-shot-object-detection
text-to-3d image-to-3d image-feature-extraction video-text-to-text keypoint-detection visual-document-retrieval
any-to-any other""".split()
REPO_ID = re.compile(r"(?!.*(--|\.\.))(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}(?<![.-])")
FRONT_MATTER = re.compile(r"\s*---[\r\n]+(.*?)[\r\n]+---(\r\n|\n|$)", re.DOTALL)


CARD = {  # A question mark: may be left out.
    "library_name?": str,
    "license_name?": str,
    "license_link?": str,
    "model-index?": [
        {
            "name": str,
            "results": [
                {
                    "task": {"type": str, "name?": str},
                    "dataset": {"type": str, "name": str, "config?": str, "split?": str, "revision?": str},
                    "metrics": [{"type": str, "value": object, "name?": str, "config?": str}],
                    "source?": {"url": str, "name?": str},
                }
            ],
        }
    ],
}


class CardLoader(yaml.SafeLoader):
    """YAML in which a repeated key is an error, as it is for the Hub."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [str(self.construct_object(key, deep=True)) for key, _ in node.value]
        if len(keys) != len(set(keys)):
            raise yaml.YAMLError(f"duplicated mapping key among {keys}")
        return super().construct_mapping(node, deep)


def card_metadata(text: str) -> Any:
    """The metadata of a card, `None` where it has none; raises `yaml.YAMLError`."""
    block = FRONT_MATTER.match(text)
    return yaml.load(block[1], CardLoader) if block else None


def shape_errors(value: Any, rule: Any, where: str = "") -> Iterator[str]:
    """What a part of the metadata lacks of the shape that the rule describes."""
    if isinstance(rule, type):
        if not isinstance(value, rule):
            yield f'"{where}" must be a string'
    elif not isinstance(value, type(rule)):
        yield f'"{where}" must be {"an array" if isinstance(rule, list) else "of type object"}'
    elif isinstance(rule, list):
        for i, item in enumerate(value):
            yield from shape_errors(item, rule[0], f"{where}[{i}]")
    else:
        for key, inner in rule.items():
            name = key.rstrip("?")
            path = f"{where}.{name}".lstrip(".")
            if value.get(name) is not None:
                yield from shape_errors(value[name], inner, path)
            elif name == key:
                yield f'"{path}" is required'


def card_problems(text: str) -> dict[str, list[dict]]:
    """Errors and warnings about the metadata of a card, as the Hub answers them.

    These are the rules that the Hub's documentation states; its own may be stricter. For an unknown `pipeline_tag` it
    only warns, but no program should write such a card.
    """
    try:
        data = card_metadata(text)
    except yaml.YAMLError as error:
        return {"errors": [{"message": f"Invalid YAML in README.md: {error}"}], "warnings": []}
    if data is None:
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
    if not isinstance(data, dict):
        return {"errors": [{"message": "The YAML metadata of your README.md is invalid."}], "warnings": []}
    errors = list(shape_errors(data, CARD))

    def check(key: str, valid: Callable[[Any], Any], complaint: str) -> None:
        many = isinstance(data.get(key), list)
        for i, value in enumerate(data[key] if many else [data[key]] if key in data else []):
            if not valid(value):
                errors.append(f'"{key}[{i}]" {complaint}' if many else f'"{key}" {complaint}')

    check("license", lambda v: v in LICENSES, f"must be one of [{', '.join(LICENSES)}]")
    check("pipeline_tag", lambda v: v in PIPELINE_TAGS, f"must be one of [{', '.join(PIPELINE_TAGS)}]")
    check("tags", lambda v: v and isinstance(v, str), "must be a string")
    for key, page in (("base_model", "models"), ("datasets", "datasets")):
        check(key, lambda v: REPO_ID.fullmatch(str(v)), f"is not valid. Use an id from https://hf.co/{page}.")
    return {"errors": [{"message": error} for error in errors], "warnings": []}


class Store:
    """Everything the server keeps, in a folder: `objects/` by SHA-256, `commits/` with their trees, `repos/`.

    A file is complete or absent, so a store survives a server that is killed. Names of files in a repository never
    become names on disk, so hostile ones are harmless here.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.lock = threading.RLock()
        for name in ("objects", "commits", "repos", "incoming"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, content: bytes) -> None:
        temporary = self.root / "incoming" / secrets.token_hex(8)
        temporary.write_bytes(content)
        os.replace(temporary, path)

    def object(self, sha256: str) -> Path:
        return self.root / "objects" / sha256

    def _repo_path(self, kind: str, repo_id: str) -> Path:
        return self.root / "repos" / f"{kind}--{quote(repo_id, safe='')}.json"

    def repo(self, repo_id: str, kind: str = "model") -> dict | None:
        with contextlib.suppress(FileNotFoundError):
            return json.loads(self._repo_path(kind, repo_id).read_bytes())
        return None

    def repos(self, kind: str) -> list[dict]:
        return [json.loads(path.read_bytes()) for path in sorted((self.root / "repos").glob(f"{kind}--*.json"))]

    def save(self, repo: dict) -> None:
        self.write(self._repo_path(repo["type"], repo["id"]), json.dumps(repo).encode())

    def delete(self, repo: dict) -> None:
        self._repo_path(repo["type"], repo["id"]).unlink()

    def create(self, repo_id: str, kind: str = "model", private: bool = False, gated: str | bool = False) -> dict:
        repo = {"id": repo_id, "type": kind, "private": private, "gated": gated, "granted": [], "created": now()}
        repo |= {"_id": secrets.token_hex(12), "branches": {}, "tags": {}, "commits": []}
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.commit(repo, "main", {".gitattributes": self.entry(attributes.encode())}, "initial commit")
        return repo

    def entry(self, content: bytes | None = None, lfs: bool = False, sha256: str = "") -> dict:
        """The entry in a tree of a file with this content, or with that of a stored object."""
        if content is not None:
            sha256 = hashlib.sha256(content).hexdigest()
            if not self.object(sha256).exists():
                self.write(self.object(sha256), content)
        size = self.object(sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        blob = pointer if lfs else self.object(sha256).read_bytes()
        oid = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
        return {"sha256": sha256, "oid": oid, "size": size} | ({"pointerSize": len(pointer)} if lfs else {})

    def commit(self, repo: dict, branch: str, tree: dict, title: str, message: str = "", user: str = "") -> str:
        parent, owner = repo["branches"].get(branch), repo["id"].split("/")[0]
        value = {"parent": parent, "title": title, "message": message, "date": now(), "repo": repo["_id"]}
        value |= {"user": user or owner, "tree": tree}
        sha = hashlib.sha1(json.dumps([value, time.time_ns()]).encode()).hexdigest()
        for file in tree.values():
            file.setdefault("commit", sha)
        self.write(self.root / "commits" / f"{sha}.json", json.dumps(value).encode())
        repo["branches"][branch] = sha
        repo["commits"].append(sha)
        self.save(repo)
        return sha

    def load(self, sha: str) -> dict:
        return json.loads((self.root / "commits" / f"{sha}.json").read_bytes())

    def resolve(self, repo: dict, revision: str) -> str | None:
        """The commit that a branch, a tag or the beginning of a commit's hash names."""
        for refs, prefix in ((repo["branches"], "refs/heads/"), (repo["tags"], "refs/tags/")):
            if revision.removeprefix(prefix) in refs:
                return refs[revision.removeprefix(prefix)]
        known = [sha for sha in repo["commits"] if len(revision) >= 7 and sha.startswith(revision)]
        return known[0] if len(known) == 1 else None

    def put(self, repo_id: str, files: Mapping[str, bytes], kind: str = "model", **settings: Any) -> str:
        """Commits files of any name, also one that no client would send; creates the repository, with `settings`.

        Only while no client pushes, where the server runs in another process.
        """
        with self.lock:
            repo = self.repo(repo_id, kind) or self.create(repo_id, kind, **settings)
            tree = self.load(repo["branches"]["main"])["tree"]
            tree |= {name: self.entry(data, is_lfs(name, len(data), data)) for name, data in files.items()}
            return self.commit(repo, "main", tree, "put")

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """The files of a revision without `.gitattributes`."""
        repo = self.repo(repo_id, kind)
        assert repo is not None, repo_id
        tree = self.load(self.resolve(repo, revision) or revision)["tree"]
        return {k: self.object(v["sha256"]).read_bytes() for k, v in tree.items() if k != ".gitattributes"}

    def log(self, record: dict) -> None:
        with self.lock, (self.root / "requests.jsonl").open("a") as stream:
            stream.write(json.dumps(record) + "\n")

    def requests(self, method: str = "", pattern: str = "") -> list[dict]:
        """What was asked so far, over all runs of the server: method, path, status, user, range, bytes in and out."""
        path = self.root / "requests.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [r for r in found if r["method"].startswith(method) and re.search(pattern, r["path"])]


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{time.time_ns() // 10**6 % 1000:03d}Z"


def is_true(value: Any) -> bool:
    """Whether a flag is set: JSON, or the values of a query or a form."""
    return value is True or (isinstance(value, list) and value[0].lower() in ("true", "1"))


def is_lfs(name: str, size: int, sample: bytes) -> bool:
    return size > 0 and (name.endswith(LFS_SUFFIXES) or size >= LFS_SIZE or b"\0" in sample[:512])


@dataclass
class Faults:
    """What goes wrong on purpose. Counts are bytes of file content, over all requests; a cut happens once."""

    cut_upload_after: int | None = None
    cut_download_after: int | None = None
    die: bool = False
    """A cut ends the whole process instead of one connection."""
    delay: float = 0.0
    """Seconds to wait before every 64 KiB of file content."""
    answers: list[tuple[str, str, int]] = field(default_factory=list)
    """(method, pattern of the path, status): answered once each. Status 0: carried out, but the answer is lost."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def allow(self, direction: str, wanted: int) -> int:
        """How many of the wanted bytes may pass before the cut."""
        time.sleep(self.delay)
        name = f"cut_{direction}_after"
        with self.lock:
            left = getattr(self, name)
            allowed = wanted if left is None else min(left, wanted)
            setattr(self, name, None if left is None else left - allowed)
            if allowed < wanted and not self.die:
                setattr(self, name, None)
        return allowed

    def answer(self, method: str, path: str) -> int | None:
        with self.lock:
            for fault in self.answers:
                if fault[0] == method and re.search(fault[1], path):
                    self.answers.remove(fault)
                    return fault[2]
        return None


class Refusal(Exception):
    """An answer that is an error, with the headers by which huggingface_hub tells what kind."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


class HubServer(ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self, store: Store, port: int = 0, faults: Faults | None = None) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.store, self.faults = store, faults or Faults()
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Clients that a test killed are nothing to report.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # With unbuffered writes and Nagle's algorithm every answer takes 40 ms. Room for more than a block keeps the end
    # of every answer back until the request is in the log, so whoever has an answer finds its request there.
    wbufsize = 2 * BLOCK
    disable_nagle_algorithm = True
    server: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.status, self.sent, self.received, self.lost, self.user = 0, 0, 0, False, None
        self.store = self.server.store
        length = int(self.headers.get("Content-Length") or 0)
        segments = [unquote(part) for part in url.path.strip("/").split("/")]
        try:
            self.body = b"" if segments[0] == "lfs" else self.rfile.read(length)
            try:
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                self.user = USERS.get(token)
                if token and self.user is None:
                    raise Refusal(401, "Invalid credentials in Authorization header")
                fault = self.server.faults.answer(self.command, url.path)
                self.lost = fault == 0
                if fault:
                    raise Refusal(fault, "refused on purpose")
                self.route(segments)
            except Refusal as refusal:
                # An upload that was not read cannot be skipped, so the connection cannot be used again.
                self.close_connection = segments[0] == "lfs"
                self.send_json(refusal.body, refusal.status, refusal.headers)
            complete = True
        except ConnectionError:
            complete = False
        record = {"method": self.command, "path": unquote(url.path), "status": self.status, "user": self.user}
        record |= {"range": self.headers.get("Range"), "sent": self.sent, "received": self.received}
        self.store.log(record)
        if not complete:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def send_json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(value, default=str).encode()
        self.send_head(status, len(body), {"Content-Type": "application/json", **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        if self.lost:
            raise ConnectionAbortedError
        self.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, re.sub(r"[^ -~]", "?", value))
        self.end_headers()

    def cut(self) -> None:
        self.wfile.flush()
        if self.server.faults.die:
            os._exit(9)
        raise ConnectionAbortedError

    def url(self, repo: dict) -> str:
        return f"{self.server.endpoint}/{'datasets/' if repo['type'] == 'dataset' else ''}{repo['id']}"

    def route(self, segments: list[str]) -> None:
        match self.command, segments:
            case "GET", ["api", "whoami-v2"]:
                token = {"displayName": "test", "role": "write"}
                user = {"type": "user", "name": self.need_user(), "fullname": self.user, "orgs": []}
                self.send_json(user | {"auth": {"type": "access_token", "accessToken": token}})
            case "GET", ["api", "agent-harnesses"]:
                self.send_json({})
            case "POST", ["api", "validate-yaml"]:
                problems = card_problems(json.loads(self.body)["content"])
                self.send_json(problems, 400 if problems["errors"] else 200)
            case "POST", ["api", "repos", "create"]:
                self.create()
            case "DELETE", ["api", "repos", "delete"]:
                value = json.loads(self.body)
                repo_id = f"{value.get('organization') or self.need_user()}/{value['name']}"
                with self.store.lock:
                    self.store.delete(self.find(repo_id, value.get("type") or "model", write=True))
                self.send_json({})
            case "GET", ["api", ("models" | "datasets") as kinds]:
                self.list_repos(kinds[:-1])
            case _, ["api", ("models" | "datasets") as kinds, namespace, name, *rest]:
                write = self.command != "GET" and rest[:1] != ["paths-info"]
                with self.store.lock if write else contextlib.nullcontext():
                    self.repo_api(self.find(f"{namespace}/{name}", kinds[:-1], write), rest)
            case _, ["api", "models" | "datasets", name]:
                self.find(name, "model")
            case "PUT", ["lfs", sha256]:
                self.receive(sha256)
            case "POST", [*prefix, namespace, git, "info", "lfs", "objects", ("batch" | "verify") as what]:
                kind = "dataset" if prefix == ["datasets"] else "model"
                self.lfs(self.find(f"{namespace}/{git.removesuffix('.git')}", kind, write=True), what)
            case "GET" | "HEAD", ["datasets", namespace, name, "resolve", revision, *path]:
                self.send_file(self.find(f"{namespace}/{name}", "dataset"), revision, "/".join(path))
            case "GET" | "HEAD", [namespace, name, "resolve", revision, *path]:
                self.send_file(self.find(f"{namespace}/{name}", "model"), revision, "/".join(path))
            case "GET" | "HEAD", [name, "resolve", *_]:
                self.find(name, "model")
            case _:
                raise Refusal(404, f"Not supported by this server: {self.command} {self.path}")

    # Who may do what

    def need_user(self) -> str:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        return self.user

    def find(self, repo_id: str, kind: str, write: bool = False) -> dict:
        repo = self.store.repo(repo_id, kind)
        if repo is None or (repo["private"] and not self.owns(repo)):
            # The same answer for both, so that a stranger does not learn of a private repository.
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.need_user()
            if not self.owns(repo):
                raise Refusal(403, f"You don't have the right to write to {repo_id}")
        return repo

    def owns(self, repo: dict) -> bool:
        return self.user == repo["id"].split("/")[0]

    def check_gate(self, repo: dict) -> None:
        if repo["gated"] and not self.owns(repo) and self.user not in repo["granted"]:
            message = f"Access to {repo['type']} {repo['id']} is restricted"
            raise Refusal(403 if self.user else 401, f"{message}. Visit {self.url(repo)} to ask for it.", "GatedRepo")

    # Repositories

    def create(self) -> None:
        value = json.loads(self.body)
        namespace, kind = value.get("organization") or self.need_user(), value.get("type") or "model"
        if namespace != self.need_user():
            raise Refusal(403, f"You don't have the rights to create a {kind} under the namespace {namespace!r}")
        if kind not in ("model", "dataset"):
            raise Refusal(400, f"This server has no repositories of type {kind}")
        with self.store.lock:
            repo = self.store.repo(f"{namespace}/{value['name']}", kind)
            if repo is not None:
                raise Refusal(409, f"You already created this {kind} repo", url=self.url(repo), name=repo["id"])
            private = value.get("visibility") == "private" or bool(value.get("private"))
            repo = self.store.create(f"{namespace}/{value['name']}", kind, private)
        self.send_json({"url": self.url(repo), "name": repo["id"]})

    def list_repos(self, kind: str) -> None:
        repos = [repo for repo in self.store.repos(kind) if not repo["private"] or self.owns(repo)]
        infos = [self.info(repo, repo["branches"]["main"]) for repo in repos]
        if author := self.query.get("author"):
            infos = [info for info in infos if info["author"] in author]
        for words in self.query.get("search", []):
            infos = [info for info in infos if words.lower() in info["id"].lower()]
        for tag in self.query.get("filter", []) + self.query.get("pipeline_tag", []):
            infos = [info for info in infos if tag in info["tags"]]
        infos.sort(key=lambda info: info["lastModified"], reverse=True)
        self.send_json(infos[: int(self.query.get("limit", ["1000"])[0])])

    def info(self, repo: dict, sha: str, blobs: bool = False) -> dict:
        commit = self.store.load(sha)
        siblings = []
        for name, file in sorted(commit["tree"].items()):
            sibling = {"rfilename": name}
            if blobs:
                sibling |= {"size": file["size"], "blobId": file["oid"]}
                if "pointerSize" in file:
                    sibling["lfs"] = {key: file[key] for key in ("sha256", "size", "pointerSize")}
            siblings.append(sibling)
        readme, card = commit["tree"].get("README.md"), None
        if readme:
            with contextlib.suppress(yaml.YAMLError):
                card = card_metadata(self.store.object(readme["sha256"]).read_text(errors="replace"))
        card = card if isinstance(card, dict) else {}
        prefixes = {"library_name": "", "pipeline_tag": "", "tags": "", "language": "", "license": "license:"}
        tags = []
        for key, prefix in (prefixes | {"base_model": "base_model:", "datasets": "dataset:"}).items():
            found = card.get(key) or []
            tags += [f"{prefix}{value}" for value in (found if isinstance(found, list) else [found])]
        value = {key: repo[key] for key in ("_id", "id", "private", "gated")}
        value |= {"author": repo["id"].split("/")[0], "sha": sha, "siblings": siblings, "disabled": False}
        value |= {"createdAt": repo["created"], "lastModified": commit["date"], "downloads": 0, "likes": 0}
        value |= {"tags": list(dict.fromkeys(tags)), "cardData": card or None}
        keys = ("library_name", "pipeline_tag", "model-index") if repo["type"] == "model" else ()
        return value | {key: card[key] for key in keys if key in card}

    def repo_api(self, repo: dict, rest: list[str]) -> None:
        # A commit comes as JSON lines and reads them itself; paths-info comes as a form.
        is_json = self.headers.get_content_type() == "application/json"
        value = json.loads(self.body or b"{}") if is_json else parse_qs(self.body.decode(errors="replace"))
        match self.command, rest:
            case "GET", [] | ["revision", _]:
                sha = self.commit_of(repo, rest[1] if rest else "main")
                self.send_json(self.info(repo, sha, "blobs" in self.query))
            case "GET", ["tree", revision, *path]:
                self.send_json(self.tree(repo, self.commit_of(repo, revision), "/".join(path)))
            case "POST", ["paths-info", revision]:
                found = self.entries(self.commit_of(repo, revision), is_true(value.get("expand")))
                self.send_json([found[path] for path in value.get("paths", []) if path in found])
            case "GET", ["refs"]:
                branches, tags = (
                    [{"name": n, "ref": f"refs/{where}/{n}", "targetCommit": sha} for n, sha in repo[key].items()]
                    for where, key in (("heads", "branches"), ("tags", "tags"))
                )
                self.send_json({"branches": branches, "converts": [], "tags": tags, "pullRequests": []})
            case "GET", ["commits", revision]:
                found, sha = [], self.commit_of(repo, revision)
                while sha:
                    commit = self.store.load(sha)
                    found.append({"id": sha, "authors": [{"user": commit["user"]}]})
                    found[-1] |= {key: commit[key] for key in ("title", "message", "date")}
                    sha = commit["parent"]
                self.send_json(found)
            case "GET", ["auth-check", *write]:
                if write:
                    self.find(repo["id"], repo["type"], write=True)
                self.check_gate(repo)
                self.send_json({})
            case "PUT", ["settings"]:
                if "visibility" in value or "private" in value:
                    repo["private"] = value.get("visibility") == "private" or bool(value.get("private"))
                repo["gated"] = value.get("gated", repo["gated"])
                self.store.save(repo)
                self.send_json({"private": repo["private"], "gated": repo["gated"]})
            case "POST", ["user-access-request", "grant"]:
                if not repo["gated"]:
                    raise Refusal(400, "Repository is not gated")
                if value["user"] not in USERS.values():
                    raise Refusal(404, "User not found")
                repo["granted"].append(value["user"])
                self.store.save(repo)
                self.send_json({})
            case (("POST" | "DELETE"), [("branch" | "tag") as what, name]):
                self.ref(repo, what, name, value)
            case "POST", ["preupload", revision]:
                tree = self.store.load(self.commit_of(repo, revision))["tree"]
                self.send_json({"files": [self.preupload(tree, file) for file in value["files"]]})
            case "POST", ["commit", revision]:
                self.commit(repo, revision)
            case _:
                raise Refusal(404, f"Not supported by this server: {self.command} {self.path}")

    def ref(self, repo: dict, what: str, name: str, value: dict) -> None:
        refs = repo["branches" if what == "branch" else "tags"]
        if self.command == "DELETE":
            if name not in refs:
                raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
            if what == "branch" and name == "main":
                raise Refusal(403, "Cannot delete the default branch")
            del refs[name]
        else:
            target = self.commit_of(repo, value.get("startingPoint", "main") if what == "branch" else name)
            name = name if what == "branch" else value["tag"]
            if name in refs:
                raise Refusal(409, f"Reference already exists: {name}")
            refs[name] = target
        self.store.save(repo)
        self.send_json({})

    def commit_of(self, repo: dict, revision: str) -> str:
        sha = self.store.resolve(repo, revision)
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def entries(self, sha: str, expand: bool = False) -> dict[str, dict]:
        """Files and folders of a commit by path, as the API describes them."""
        found: dict[str, dict] = {}
        for path, file in sorted(self.store.load(sha)["tree"].items()):
            parts = path.split("/")
            for depth in range(1, len(parts)):
                folder = "/".join(parts[:depth])
                oid = hashlib.sha1(f"{sha}/{folder}".encode()).hexdigest()
                found.setdefault(folder, {"type": "directory", "path": folder, "oid": oid, "size": 0})
            found[path] = {"type": "file", "path": path, "oid": file["oid"], "size": file["size"]}
            if "pointerSize" in file:
                found[path]["lfs"] = {"oid": file["sha256"], "size": file["size"], "pointerSize": file["pointerSize"]}
            if expand:
                last = self.store.load(file["commit"])
                found[path]["lastCommit"] = {"id": file["commit"], "title": last["title"], "date": last["date"]}
        return found

    def tree(self, repo: dict, sha: str, folder: str) -> list[dict]:
        found = self.entries(sha, is_true(self.query.get("expand")))
        if folder and found.get(folder, {}).get("type") != "directory":
            raise Refusal(404, f"{folder} does not exist on {repo['id']}", "EntryNotFound")
        prefix = f"{folder}/" if folder else ""
        inside = [entry for path, entry in found.items() if path.startswith(prefix)]
        if is_true(self.query.get("recursive")):
            return inside
        return [entry for entry in inside if entry["path"].count("/") == prefix.count("/")]

    # Files

    def preupload(self, tree: dict, file: dict) -> dict:
        """How a file has to be sent, and the hash of the one that is there: clients leave out equal files."""
        known = tree.get(file["path"])
        oid = known and known["sha256" if "pointerSize" in known else "oid"]
        lfs = is_lfs(file["path"], file["size"], base64.b64decode(file["sample"]))
        mode = "lfs" if lfs else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def lfs(self, repo: dict, what: str) -> None:
        value = json.loads(self.body)
        if what == "verify":
            path = self.store.object(value["oid"])
            if not path.exists() or path.stat().st_size != value["size"]:
                raise Refusal(404, "Object not found")
            return self.send_json({})
        objects = []
        for wanted in value["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.store.object(wanted["oid"]).exists():
                upload = {"href": f"{self.server.endpoint}/lfs/{wanted['oid']}", "header": {}}
                verify = {"href": f"{self.url(repo)}.git/info/lfs/objects/verify", "header": {}}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        self.send_json({"transfer": "basic", "objects": objects})

    def receive(self, sha256: str) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", sha256) or "Content-Length" not in self.headers:
            raise Refusal(400, "An upload needs a SHA-256 and a length")
        left, digest = int(self.headers["Content-Length"]), hashlib.sha256()
        temporary = self.store.root / "incoming" / secrets.token_hex(8)
        try:
            with temporary.open("wb") as stream:
                while left:
                    wanted = min(left, BLOCK)
                    block = self.rfile.read(allowed := self.server.faults.allow("upload", wanted))
                    self.received += len(block)
                    if allowed < wanted:
                        self.cut()
                    if len(block) < wanted:
                        raise ConnectionAbortedError
                    digest.update(block)
                    stream.write(block)
                    left -= len(block)
            if digest.hexdigest() != sha256:
                raise Refusal(400, "The content does not have the SHA-256 that was announced")
            os.replace(temporary, self.store.object(sha256))
        finally:
            temporary.unlink(missing_ok=True)
        self.send_head(200, 0, {})

    def commit(self, repo: dict, branch: str) -> None:
        header, *lines = (json.loads(line) for line in self.body.splitlines())
        if "create_pr" in self.query:
            raise Refusal(501, "This server has no pull requests")
        if branch not in repo["branches"]:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head, parent = repo["branches"][branch], header["value"].get("parentCommit")
        if parent and not head.startswith(parent):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        tree = self.store.load(head)["tree"]
        for line in lines:
            key, value = line["key"], line["value"]
            path = value["path"].rstrip("/") if key.startswith("deleted") else value["path"]
            if any(part in ("", ".", "..", ".git") for part in path.split("/")) or re.search(r"[\\\0-\x1f]", path):
                raise Refusal(400, f"Invalid path in repo: {path}")
            if key == "file":
                content = base64.b64decode(value["content"])
                problems = card_problems(content.decode(errors="replace")) if path == "README.md" else {}
                if problems.get("errors"):
                    raise Refusal(400, "Invalid metadata in README.md.", **problems)
                tree[path] = self.store.entry(content)
            elif key == "lfsFile":
                if not self.store.object(value["oid"]).exists():
                    raise Refusal(400, f"LFS pointer of {path} points to an object that was not uploaded")
                tree[path] = self.store.entry(lfs=True, sha256=value["oid"])
            elif key in ("deletedFile", "deletedFolder"):
                gone = [p for p in tree if p == path or (key == "deletedFolder" and p.startswith(f"{path}/"))]
                if not gone:
                    raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for old in gone:
                    del tree[old]
            else:
                raise Refusal(400, f"Unknown operation {key}")
        value = header["value"]
        sha = self.store.commit(repo, branch, tree, value["summary"], value.get("description", ""), self.need_user())
        self.send_json({"success": True, "commitOid": sha, "commitUrl": f"{self.url(repo)}/commit/{sha}"})

    def send_file(self, repo: dict, revision: str, path: str) -> None:
        self.check_gate(repo)
        sha = self.commit_of(repo, revision)
        file = self.store.load(sha)["tree"].get(path)
        if file is None:
            raise Refusal(404, f"Entry not found: {path}", "EntryNotFound", {"X-Repo-Commit": sha})
        size, lfs = file["size"], "pointerSize" in file
        etag = f'"{file["sha256"] if lfs else file["oid"]}"'
        headers = {"X-Repo-Commit": sha, "ETag": etag, "Accept-Ranges": "bytes"}
        headers |= {"Content-Type": "application/octet-stream"}
        headers |= {"Content-Disposition": f"inline; filename*=UTF-8''{quote(path.split('/')[-1])}"}
        if lfs:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(size)}
        start, end, status = 0, size, 200
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = wanted.groups()
            start = int(first) if first else max(size - int(last or 0), 0)
            end = min(int(last) + 1, size) if first and last else size
            if start >= end:
                raise Refusal(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
            status, headers["Content-Range"] = 206, f"bytes {start}-{end - 1}/{size}"
        self.send_head(status, end - start, headers)
        if self.command == "HEAD":
            return
        with self.store.object(file["sha256"]).open("rb") as stream:
            stream.seek(start)
            while start < end:
                wanted = min(end - start, BLOCK)
                allowed = self.server.faults.allow("download", wanted)
                self.wfile.write(stream.read(allowed))
                self.sent += allowed
                start += allowed
                if allowed < wanted:
                    self.cut()


class Hub:
    """A running server, as a test sees it."""

    def __init__(self, store: Store, home: Path) -> None:
        self.store, self.home = store, home
        self.endpoint = ""
        self.faults = Faults()

    def env(self, token: str | None = None, home: str | Path | None = None) -> dict[str, str]:
        """The environment of a client: this server, this token, the caches below `home`, and no proxy."""
        dropped = re.compile(r"HF_|HUGGING|TRANSFORMERS_OFFLINE|(https?|all|no)_proxy$", re.IGNORECASE)
        env = {key: value for key, value in os.environ.items() if not dropped.match(key)}
        env |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home or self.home), "HF_HUB_OFFLINE": "0"}
        # Without a Xet server an upload has to take the LFS way.
        env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        env |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1"}
        paths = [str(Path(__file__).parent), *filter(None, [env.get("PYTHONPATH")])]
        return env | {"PYTHONPATH": os.pathsep.join(paths)} | ({"HF_TOKEN": token} if token else {})

    def popen(
        self, code: str, *args: object, token: str | None = None, home: str | Path | None = None
    ) -> subprocess.Popen:
        """Starts Python code as a client with `sys.argv[1:] == args`."""
        command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.env(token, home), stdout=pipe, stderr=pipe, text=True)

    def run(self, code: str, *args: object, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess:
        """Runs Python code as a client, to its end (`options`: token, home); the caller looks at the exit status."""
        with self.popen(code, *args, **options) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def ask(self, code: str, *args: object, **options: Any) -> Any:
        """Runs client code that has to succeed and gives what the last line of its output says, in JSON."""
        done = self.run(code, *args, **options)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


class HubProcess(Hub):
    """A server in a process of its own. A cut ends the process; `restart` takes the same store and port."""

    process: subprocess.Popen

    def start(self, port: int = 0, **faults: int | float | None) -> None:
        options = [f"--{name.replace('_', '-')}={value}" for name, value in faults.items() if value is not None]
        command = [sys.executable, __file__, f"--port={port}", f"--store={self.store.root}", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.endpoint = self.process.stdout.readline().strip()
        assert self.endpoint, "the server did not start"

    def wait(self, timeout: float = 60) -> int:
        """Waits until the server is dead."""
        return self.process.wait(timeout)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def restart(self, **faults: int | float | None) -> None:
        self.kill()
        self.start(urlsplit(self.endpoint).port or 0, **faults)


@contextlib.contextmanager
def hub(store: str | Path | None = None, faults: Faults | None = None) -> Iterator[Hub]:
    """Serves from a thread of this process; `hub.faults` can be changed while it runs."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        running = Hub(Store(store or Path(folder, "store")), Path(folder, "home"))
        server = HubServer(running.store, faults=faults)
        running.endpoint, running.faults = server.endpoint, server.faults
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield running
        finally:
            server.shutdown()
            server.server_close()


@contextlib.contextmanager
def hub_process(
    store: str | Path,
    port: int = 0,
    die_after_upload_bytes: int | None = None,
    die_after_download_bytes: int | None = None,
    delay: float | None = None,
) -> Iterator[HubProcess]:
    """Serves from a process of its own, which ends itself after so many bytes of file content."""
    faults = {"die_after_upload_bytes": die_after_upload_bytes, "die_after_download_bytes": die_after_download_bytes}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        running = HubProcess(Store(store), Path(home))
        running.start(port, **faults, delay=delay)
        try:
            yield running
        finally:
            running.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--die-after-upload-bytes", type=int)
    parser.add_argument("--die-after-download-bytes", type=int)
    parser.add_argument("--delay", type=float, default=0.0)
    args = parser.parse_args()
    faults = Faults(args.die_after_upload_bytes, args.die_after_download_bytes, die=True, delay=args.delay)
    server = HubServer(Store(args.store), args.port, faults)
    print(server.endpoint, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
