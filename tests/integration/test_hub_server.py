"""The test server, asked by the real huggingface_hub client in processes of their own."""

import hashlib
import json
import random
import subprocess
import time
from pathlib import Path

import pytest
from hub_server import Hub, hub, hub_process


pytestmark = pytest.mark.slow


# Before every piece of client code: a probe gives the name of the exception, or the value.
CLIENT = """
import hashlib, json, os, sys, time, warnings
from pathlib import Path
import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
warnings.simplefilter("ignore")
api = HfApi()
def probe(call, *args, **options):
    try:
        return call(*args, **options)
    except Exception as error:
        return type(error).__name__
def status(call, *args, **options):
    try:
        call(*args, **options)
        return 200
    except Exception as error:
        return error.response.status_code
"""


def ask(server: Hub, code: str, *args: object, **options: object):
    return server.ask(CLIENT + code, *args, **options)


def start(server: Hub, code: str, *args: object, **options: object) -> subprocess.Popen:
    return server.popen(CLIENT + code, *args, **options)


def make_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def weights(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture(scope="module")
def server():
    with hub() as running:
        yield running


def test_push_list_and_pull_by_revision(server, tmp_path):
    folder = make_folder(
        tmp_path / "model",
        {
            "README.md": b"---\nlicense: mit\npipeline_tag: image-classification\ntags: [lora]\n---\nA model.\n",
            "config.json": b'{"version": 1}',
            "model.safetensors": weights(200_000),
            "adapter/adapter_config.json": b"{}",
        },
    )
    code = """
folder, out = sys.argv[1:]
answer = {"user": api.whoami()["name"]}
url = api.create_repo("alice/push")
answer["again"] = [status(api.create_repo, "alice/push"), api.create_repo("alice/push", exist_ok=True) == url]
answer["foreign"] = status(api.create_repo, "bob/theirs")
first = api.upload_folder(repo_id="alice/push", folder_path=folder)
answer["unchanged"] = api.upload_folder(repo_id="alice/push", folder_path=folder).oid == first.oid
api.create_tag("alice/push", tag="v1")
answer["tag twice"] = status(api.create_tag, "alice/push", tag="v1")
Path(folder, "config.json").write_text('{"version": 2}')
Path(folder, "adapter/adapter_config.json").unlink()
second = api.upload_folder(repo_id="alice/push", folder_path=folder, delete_patterns="adapter/*")
api.create_branch("alice/push", branch="exp/a", revision="v1")
answer["branch twice"] = status(api.create_branch, "alice/push", branch="exp/a")
api.upload_file(repo_id="alice/push", path_or_fileobj=b"note", path_in_repo="note.txt", revision="exp/a")
refs = api.list_repo_refs("alice/push")
answer["refs"] = [sorted(ref.name for ref in refs.branches), [(ref.name, ref.target_commit) for ref in refs.tags]]
answer["oids"] = [first.oid, second.oid]
answer["commits"] = [(commit.commit_id, commit.authors) for commit in api.list_repo_commits("alice/push")]
answer["files"] = {rev: sorted(api.list_repo_files("alice/push", revision=rev)) for rev in ("main", "v1", "exp/a")}
answer["top"] = sorted(type(e).__name__ + " " + e.path for e in api.list_repo_tree("alice/push", revision="v1"))
deep = api.list_repo_tree("alice/push", revision="v1", recursive=True, expand=True)
answer["deep"] = sorted(e.path for e in deep if e.path.startswith("adapter"))
answer["paths"] = [e.path for e in api.get_paths_info("alice/push", ["config.json", "nothing"])]
info = api.model_info("alice/push", files_metadata=True)
answer["info"] = [info.sha, info.pipeline_tag, info.card_data.license, info.tags, info.private]
answer["lfs"] = {s.rfilename: [s.size, s.lfs.sha256] for s in info.siblings if s.lfs}
found = api.list_models(author="alice", search="pu", filter="lora")
answer["listed"] = [model.id for model in found], [m.id for m in api.list_models(filter="other")]
for rev in ("main", "v1", first.oid, "exp/a"):
    file = hf_hub_download("alice/push", "config.json", revision=rev, local_dir=f"{out}/{rev}")
    answer[f"config {rev}"] = Path(file).read_text()
snapshot = snapshot_download("alice/push", revision="v1", allow_patterns=["*.json", "*.safetensors"])
answer["snapshot"] = sorted(str(p.relative_to(snapshot)) for p in Path(snapshot).rglob("*") if p.is_file())
answer["missing"] = [
    probe(hf_hub_download, "alice/push", "nothing.json"),
    probe(hf_hub_download, "alice/push", "config.json", revision="v9"),
    probe(hf_hub_download, "alice/nothing", "config.json"),
    probe(api.model_info, "nothing"),
    probe(lambda: list(api.list_repo_tree("alice/push", "nothing"))),
]
answer["exists"] = [api.repo_exists("alice/push"), api.file_exists("alice/push", "no"),
                    api.revision_exists("alice/push", "v1"), api.revision_exists("alice/push", "v2")]
answer["stale"] = status(api.upload_file, repo_id="alice/push", path_or_fileobj=b"x", path_in_repo="x",
                         parent_commit=first.oid)
gone = [CommitOperationDelete("config.json")]
api.create_commit("alice/push", gone, commit_message="gone", parent_commit=second.oid)
answer["deleted"] = api.list_repo_files("alice/push")
answer["pull request"] = status(api.upload_file, repo_id="alice/push", path_or_fileobj=b"x", path_in_repo="x",
                                create_pr=True)
answer["private"] = []
for private in (True, False):
    api.update_repo_settings("alice/push", private=private)
    answer["private"] += [api.model_info("alice/push").private, HfApi(token=False).repo_exists("alice/push")]
api.delete_tag("alice/push", tag="v1")
api.delete_branch("alice/push", branch="exp/a")
answer["refs gone"] = [len(refs.branches) + len(refs.tags) for refs in [api.list_repo_refs("alice/push")]]
api.delete_repo("alice/push")
answer["repo gone"] = probe(api.model_info, "alice/push")
print(json.dumps(answer))
"""
    answer = ask(server, code, folder, tmp_path / "out", token="hf_alice")
    first, second = answer["oids"]
    everything = [".gitattributes", "README.md", "adapter/adapter_config.json", "config.json", "model.safetensors"]
    without_adapter = [name for name in everything if not name.startswith("adapter")]
    assert answer["user"] == "alice"
    assert answer["again"] == [409, True] and answer["foreign"] == 403
    assert answer["unchanged"] and answer["tag twice"] == answer["branch twice"] == 409
    assert answer["refs"] == [["exp/a", "main"], [["v1", first]]]
    assert [commit for commit, _ in answer["commits"]][:2] == [second, first] and len(answer["commits"]) == 3
    assert answer["commits"][0][1] == ["alice"]
    files = {"main": without_adapter, "v1": everything, "exp/a": [*everything, "note.txt"]}
    assert answer["files"] == files
    top = [f"RepoFile {name}" for name in everything if "/" not in name]
    assert answer["top"] == [*top, "RepoFolder adapter"]
    assert answer["deep"] == ["adapter", "adapter/adapter_config.json"] and answer["paths"] == ["config.json"]
    tags = ["image-classification", "lora", "license:mit"]
    assert answer["info"] == [second, "image-classification", "mit", tags, False]
    assert answer["lfs"] == {"model.safetensors": [200_000, hashlib.sha256(weights(200_000)).hexdigest()]}
    assert answer["listed"] == [["alice/push"], []]
    assert answer["config main"] == '{"version": 2}'
    assert answer["config v1"] == answer[f"config {first}"] == answer["config exp/a"] == '{"version": 1}'
    assert answer["snapshot"] == everything[2:]
    not_found = ["RemoteEntryNotFoundError", "RevisionNotFoundError", "RepositoryNotFoundError"]
    assert answer["missing"] == [*not_found, "RepositoryNotFoundError", "RemoteEntryNotFoundError"]
    assert answer["exists"] == [True, False, True, False]
    assert answer["stale"] == 412 and answer["pull request"] == 501
    assert answer["deleted"] == [".gitattributes", "README.md", "model.safetensors"]
    assert answer["private"] == [True, False, False, True]
    assert answer["refs gone"] == [1] and answer["repo gone"] == "RepositoryNotFoundError"


def test_private_and_gated(server, tmp_path):
    server.store.put("alice/secret", {"config.json": b"{}"}, private=True)
    server.store.put("alice/gated", {"config.json": b"{}", "model.safetensors": weights(10)})
    code = """
if len(sys.argv) > 1:
    api.update_repo_settings("alice/gated", gated="manual")
answer = {"whoami": probe(lambda: api.whoami()["name"])}
for name in ("secret", "gated"):
    repo = f"alice/{name}"
    answer[name] = [
        probe(lambda: Path(hf_hub_download(repo, "config.json")).name),
        probe(lambda: api.model_info(repo).private),
        status(api.auth_check, repo),
        status(api.upload_file, repo_id=repo, path_or_fileobj=b"x", path_in_repo=sys.argv[0] + "x"),
        probe(lambda: repo in [model.id for model in api.list_models(author="alice")]),
    ]
if len(sys.argv) > 1:
    api.grant_access("alice/gated", "bob")
print(json.dumps(answer))
"""
    owner = ask(server, code, "owner", token="hf_alice", home=tmp_path / "alice")
    anonymous = ask(server, code, home=tmp_path / "nobody")
    bob = ask(server, code, token="hf_bob", home=tmp_path / "bob")
    wrong = ask(server, code, token="hf_mallory", home=tmp_path / "mallory")
    missing = "RepositoryNotFoundError"
    assert owner["whoami"] == "alice" and bob["whoami"] == "bob" and anonymous["whoami"] == "LocalTokenNotFoundError"
    assert owner["secret"] == ["config.json", True, 200, 200, True]
    assert owner["gated"] == ["config.json", False, 200, 200, True]
    assert anonymous["secret"] == [missing, missing, 401, 401, False]
    assert bob["secret"] == [missing, missing, 404, 404, False]
    assert anonymous["gated"] == ["GatedRepoError", False, 401, 401, True]
    assert bob["gated"] == ["config.json", False, 200, 403, True]  # after the owner let bob in
    assert wrong["whoami"] == "HfHubHTTPError" and wrong["secret"][2] == wrong["gated"][2] == 401
    server.store.put("alice/secret2", {"config.json": b"{}"}, gated="auto")
    code = """
answer = probe(hf_hub_download, "alice/secret2", "config.json"), status(api.auth_check, "alice/secret2")
print(json.dumps(answer))
"""
    assert ask(server, code, token="hf_bob") == ["GatedRepoError", 403]


def test_cards_are_checked(server):
    metric = "model-index:\n- name: m\n  results:\n  - task: {type: image-classification}\n"
    cards = {
        "good": metric + "    dataset: {type: folder, name: birds}\n    metrics: [{type: accuracy, value: 0.5}]\n",
        "also good": "license: other\nlicense_name: mine\nbase_model: [timm/resnet18.a1, gpt2]\ndatasets: mnist\n",
        "license": "license: my own\n",
        "pipeline": "pipeline_tag: robust-classification\n",
        "base": "base_model: ./local/folder\n",
        "dataset": "datasets: [ok, two words]\n",
        "no dataset": metric + "    metrics: [{type: accuracy, value: 0.5}]\n",
        "no value": metric + "    dataset: {type: folder, name: birds}\n    metrics: [{type: accuracy}]\n",
        "no results": "model-index:\n- name: m\n",
        "no name": "model-index:\n- results: []\n",
        "no array": "model-index: m\n",
        "twice": "license: mit\nlicense: mit\n",
        "broken": "license: [\n",
        "list": "- license\n",
    }
    code = """
api.create_repo("alice/cards")
answer = {}
for name, metadata in json.loads(sys.argv[1]).items():
    try:
        answer[name] = api._validate_yaml(f"---\\n{metadata}---\\n")
    except Exception as error:
        answer[name] = str(error)
bad = "---\\nlicense: my own\\n---\\n"
answer["push"] = probe(api.upload_file, repo_id="alice/cards", path_or_fileobj=bad.encode(), path_in_repo="README.md")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    api.upload_file(repo_id="alice/cards", path_or_fileobj=b"no metadata", path_in_repo="README.md")
answer["empty"] = str(caught[0].message)
huggingface_hub.ModelCard("---\\nlicense: mit\\n---\\nfine").push_to_hub("alice/cards")
huggingface_hub.metadata_update("alice/cards", {"tags": ["lora"]})
answer["updated"] = huggingface_hub.ModelCard.load("alice/cards").data.to_dict()
print(json.dumps(answer))
"""
    answer = ask(server, code, json.dumps(cards), token="hf_alice")
    assert answer["good"] is answer["also good"] is None
    expected = {
        "license": '"license" must be one of [apache-2.0, mit',
        "pipeline": '"pipeline_tag" must be one of [',
        "base": '"base_model" is not valid. Use an id from https://hf.co/models',
        "dataset": '"datasets[1]" is not valid',
        "no dataset": '"model-index[0].results[0].dataset" is required',
        "no value": '"model-index[0].results[0].metrics[0].value" is required',
        "no results": '"model-index[0].results" is required',
        "no name": '"model-index[0].name" is required',
        "no array": '"model-index" must be an array',
        "twice": "duplicated mapping key",
        "broken": "Invalid YAML in README.md",
        "list": "The YAML metadata of your README.md is invalid.",
    }
    for name, message in expected.items():
        assert message in answer[name], name
    assert answer["push"] == "ValueError"
    assert "empty or missing yaml metadata" in answer["empty"]
    assert answer["updated"] == {"license": "mit", "tags": ["lora"]}


def test_ranges_and_headers(server):
    content = weights(100_000)
    sha = server.store.put("alice/ranges", {"model.safetensors": content, "a b/ü.txt": b"text", "empty.txt": b""})
    code = """
import httpx2
url = f"{api.endpoint}/alice/ranges/resolve/main/model.safetensors"
answer = []
for header in (None, "bytes=0-9", "bytes=99990-", "bytes=-5", "bytes=10-999999999", "bytes=100000-"):
    response = httpx2.get(url, headers={"Range": header} if header else {})
    answer.append([response.status_code, hashlib.sha256(response.content).hexdigest(),
                   response.headers.get("Content-Range")])
head = httpx2.head(url)
meta = huggingface_hub.get_hf_file_metadata(url)
odd = Path(hf_hub_download("alice/ranges", "a b/ü.txt")).read_text()
empty = Path(hf_hub_download("alice/ranges", "empty.txt")).read_text()
headers = ("ETag", "X-Repo-Commit", "Content-Length", "X-Linked-Etag", "X-Linked-Size")
missing = httpx2.get(url + ".index.json").headers
missing = [missing["X-Error-Code"], missing["X-Repo-Commit"]]
head = [head.headers[name] for name in headers]
print(json.dumps([answer, head, [meta.etag, meta.size, meta.commit_hash], odd, empty, missing]))
"""
    ranges, head, meta, odd, empty, missing = ask(server, code)
    digest = hashlib.sha256(content).hexdigest()
    parts = [content, content[:10], content[-10:], content[-5:], content[10:]]
    assert [part[1] for part in ranges[:5]] == [hashlib.sha256(part).hexdigest() for part in parts]
    assert [part[0] for part in ranges] == [200, 206, 206, 206, 206, 416]
    assert ranges[1][2] == "bytes 0-9/100000" and ranges[5][2] == "bytes */100000"
    assert head == [f'"{digest}"', sha, "100000", f'"{digest}"', "100000"]
    assert meta == [digest, 100_000, sha]
    assert [odd, empty, missing] == ["text", "", ["EntryNotFound", sha]]


def test_two_clients_at_once(server, tmp_path):
    server.store.put("alice/race", {"README.md": b"start"})
    code = """
me, folder = sys.argv[1:]
head = api.model_info("alice/race").sha
Path(folder, me).touch()
while len(os.listdir(folder)) < 2:
    time.sleep(0.01)
def push(name, **options):
    return status(api.upload_file, repo_id="alice/race", path_or_fileobj=me.encode(), path_in_repo=name, **options)
print(json.dumps([push("same.txt", parent_commit=head), push(f"{me}.txt"), push(f"sub/{me}.txt")]))
"""
    clients = [start(server, code, name, tmp_path, token="hf_alice") for name in ("one", "two")]
    answers = [json.loads(client.communicate(timeout=60)[0]) for client in clients]
    assert sorted(answer[0] for answer in answers) == [200, 412]
    assert all(answer[1:] == [200, 200] for answer in answers)
    winner = "one" if answers[0][0] == 200 else "two"
    names = [f"{folder}{name}.txt" for folder in ("", "sub/") for name in ("one", "two")]
    files = server.store.files("alice/race")
    assert files.pop("same.txt") == winner.encode() and sorted(files) == sorted(["README.md", *names])


def test_hostile_names_stay_in_the_repository(server):
    server.store.put("alice/evil", {"../../outside.txt": b"x", "model.safetensors": b"y", "a/../../b.txt": b"z"})
    code = """
url = f"{api.endpoint}/api/models/alice/evil/commit/main"
def raw(path):
    lines = [{"key": "header", "value": {"summary": "evil"}},
             {"key": "file", "value": {"path": path, "content": "", "encoding": "base64"}}]
    body = "\\n".join(map(json.dumps, lines))
    return huggingface_hub.get_session().post(url, content=body, headers=api._build_hf_headers()).status_code
answer = [sorted(api.list_repo_files("alice/evil")), probe(snapshot_download, "alice/evil")]
answer.append([raw(path) for path in ("../x", "a/../b", "/x", "a//b", ".git/config", "a\\x00b", "fine.txt")])
print(json.dumps(answer))
"""
    listed, snapshot, commits = ask(server, code, token="hf_alice")
    assert listed == sorted([".gitattributes", "../../outside.txt", "a/../../b.txt", "model.safetensors"])
    assert snapshot not in (None, "") and snapshot.endswith("Error")
    assert commits == [400, 400, 400, 400, 400, 400, 200]
    assert not list(server.home.rglob("outside.txt"))


def test_faults_in_a_thread(server):
    """Cuts, refused requests and lost answers, each once; the client tries again after a second."""
    content = weights(300_000, seed=1)
    faults = server.faults
    code = """
time.sleep = lambda seconds: None  # between two attempts
answer = {"push": status(api.upload_file, repo_id="alice/faults", path_or_fileobj=sys.argv[1], path_in_repo="w.bin")}
answer["pull"] = hashlib.sha256(Path(hf_hub_download("alice/faults", "w.bin")).read_bytes()).hexdigest()
print(json.dumps(answer))
"""
    server.store.put("alice/faults", {"README.md": b"start"})
    file = make_folder(server.home / "faults", {"w.bin": content}) / "w.bin"
    faults.cut_upload_after, faults.cut_download_after = 100_000, 100_000
    faults.answers.append(("POST", "/preupload/", 503))
    assert ask(server, code, file, token="hf_alice") == {"push": 200, "pull": hashlib.sha256(content).hexdigest()}
    assert faults.cut_upload_after is faults.cut_download_after is None and not faults.answers
    puts = server.store.requests("PUT", hashlib.sha256(content).hexdigest())
    assert [request["status"] for request in puts] == [0, 200] and puts[0]["received"] == 100_000
    pulls = server.store.requests("GET", "alice/faults/resolve")
    assert [request["sent"] for request in pulls] == [100_000, 300_000]

    faults.answers += [("POST", "/commit/", 403), ("POST", "/commit/", 0)]
    code = """
push = lambda: status(api.upload_file, repo_id="alice/faults", path_or_fileobj=b"y", path_in_repo="y")
print(json.dumps([push(), probe(api.upload_file, repo_id="alice/faults", path_or_fileobj=b"y", path_in_repo="y")]))
"""
    assert ask(server, code, token="hf_alice") == [403, "RemoteProtocolError"]
    assert server.store.files("alice/faults")["y"] == b"y"


def test_push_goes_on_after_the_server_was_killed(tmp_path):
    files = {f"{name}.safetensors": weights(200_000, seed) for seed, name in enumerate("abc")}
    folder = make_folder(tmp_path / "model", {**files, "README.md": b"---\nlicense: mit\n---\nfine\n"})
    code = """
api.create_repo("alice/killed", exist_ok=True)
operations = [CommitOperationAdd(path.name, path) for path in sorted(Path(sys.argv[1]).iterdir())]
print(api.create_commit("alice/killed", operations, commit_message="push", num_threads=1).oid)
"""
    with hub_process(tmp_path / "store", die_after_upload_bytes=500_000) as server:
        client = start(server, code, folder, token="hf_alice")
        assert server.wait() == 9
        client.kill()
        client.communicate()
        before = [request["path"].split("/")[-1] for request in server.store.requests("PUT")]
        digests = [hashlib.sha256(content).hexdigest() for content in files.values()]
        assert before == digests[:2] and not server.store.files("alice/killed")
        server.restart()
        done = server.run(CLIENT + code, folder, token="hf_alice")
        assert done.returncode == 0, done.stderr
        puts = [request["path"].split("/")[-1] for request in server.store.requests("PUT")]
        assert puts == digests  # the first two were not sent again
        assert server.store.files("alice/killed") == {**files, "README.md": b"---\nlicense: mit\n---\nfine\n"}
        commits = ask(server, 'print(len(api.list_repo_commits("alice/killed")))')
        assert commits == 2
        assert len(list((tmp_path / "store/objects").iterdir())) == 5


def test_pull_goes_on_after_the_server_was_killed(tmp_path):
    content = weights(14_000_000)
    digest = hashlib.sha256(content).hexdigest()
    code = """
file = hf_hub_download("alice/large", "model.safetensors")
print(json.dumps(hashlib.sha256(Path(file).read_bytes()).hexdigest()))
"""
    with hub_process(tmp_path / "store", die_after_download_bytes=12_000_000) as server:
        server.store.put("alice/large", {"model.safetensors": content})
        client = start(server, code, home=tmp_path / "patient")
        assert server.wait() == 9
        server.restart()
        out, err = client.communicate(timeout=60)
        assert json.loads(out) == digest, err
        (resumed,) = server.store.requests("GET", "/resolve/")
        # The client keeps whole blocks of 10 MiB of what it has received.
        assert resumed["range"] == f"bytes={10 * 1024**2}-" and resumed["status"] == 206

        server.restart(delay=0.02)  # four seconds for the file
        client = start(server, code, home=tmp_path / "killed")
        deadline = time.time() + 30
        while not list((tmp_path / "killed").rglob("*.incomplete")) and time.time() < deadline:
            time.sleep(0.02)
        server.kill()
        client.kill()
        client.communicate()
        assert not list((tmp_path / "killed").rglob("model.safetensors"))
        server.restart()
        assert ask(server, code, home=tmp_path / "killed") == digest


def test_models_of_the_libraries(server):
    """transformers, PEFT and timm push a model and load the same one back."""
    code = """
import timm, torch, transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification
x = torch.rand(1, 3, 32, 32)
def same(a, b):
    # Equal weights elsewhere in memory may be multiplied by another kernel.
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)
sizes = {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4, "num_labels": 3}
model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)).eval()
expected = model(x).logits
model.push_to_hub("alice/resnet")
transformers.ViTImageProcessor(size=32).push_to_hub("alice/resnet")
adapter = get_peft_model(model, LoraConfig(target_modules=["convolution"], r=2, init_lora_weights=False)).eval()
adapter.push_to_hub("alice/adapter", private=True)
loaded = AutoModelForImageClassification.from_pretrained("alice/resnet").eval()
answer = [same(loaded(x).logits, expected)]
answer.append(AutoImageProcessor.from_pretrained("alice/resnet").size["height"])
answer.append(same(PeftModel.from_pretrained(loaded, "alice/adapter").eval()(x).logits, adapter(x).logits))
model = timm.create_model("resnet10t", num_classes=3).eval()
timm.models.push_to_hf_hub(model, "alice/timm")
answer.append(same(timm.create_model("hf-hub:alice/timm", pretrained=True).eval()(x), model(x)))
print(json.dumps(answer))
"""
    assert ask(server, code, token="hf_alice") == [True, 32, True, True]
    assert sorted(server.store.files("alice/adapter")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_datasets_library(server):
    code = """
import datasets
datasets.disable_progress_bars()
columns = {"label": [0, 1, 1], "text": ["a", "b", "c"]}
features = datasets.Features({"label": datasets.ClassLabel(names=["cat", "dog"]), "text": datasets.Value("string")})
data = datasets.Dataset.from_dict(columns, features=features)
data.push_to_hub("alice/animals", private=True)
datasets.DatasetDict({"train": data, "test": data}).push_to_hub("alice/splits")
loaded = datasets.load_dataset("alice/animals", split="train")
splits = datasets.load_dataset("alice/splits")
rows = list(datasets.load_dataset("alice/splits", split="test", streaming=True))
print(json.dumps([loaded.to_dict(), loaded.features["label"].names, sorted(splits), rows[0],
                  probe(datasets.load_dataset, "alice/nothing"), api.dataset_info("alice/animals").private]))
"""
    loaded, names, splits, row, missing, private = ask(server, code, token="hf_alice")
    assert loaded == {"label": [0, 1, 1], "text": ["a", "b", "c"]} and names == ["cat", "dog"]
    assert splits == ["test", "train"] and row == {"label": 0, "text": "a"}
    assert missing == "DatasetNotFoundError" and private
