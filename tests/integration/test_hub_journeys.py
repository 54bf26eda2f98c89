"""What users do with the Hub, by the real clients of huggingface-hub, timm, transformers and PEFT, on a test server.

Clients run in processes of their own: one publishes, one loads, one has the stock libraries alone, one is offline, and
so on. Each tries many things and answers in JSON, since importing the libraries takes longer than using them.
"""

import json
import re
import time
from pathlib import Path

import pytest
from hub_server import Hub, Store, card_metadata, hub, hub_process
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results


pytestmark = pytest.mark.slow


# Model, mode, layout, norm: the name of the repository of each.
CASES = [
    "timm_resnet-full-released-shared",
    "timm_resnet-full-peft-dual",
    "timm_resnet-adapter-peft-shared",
    "timm_resnet-adapter-released-dual",
    "timm_vit-full-peft-shared",
    "timm_vit-adapter-released-shared",
    "hf_resnet-full-released-dual",
    "hf_resnet-adapter-peft-dual",
    "hf_vit-full-released-shared",
    "hf_vit-adapter-peft-shared",
]
ADAPTERS = [case for case in CASES if "-adapter-" in case]

# Before the code of every client that has this package. A probe gives the value, or kind and text of the exception.
CLIENT = """
import json, logging, os, shutil, sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from huggingface_hub import HfApi
from tiny_models import MODELS, change_everything, pixels
from autolora_hf import AutoLoraConfig, get_autolora_model, load_autolora_model
from autolora_hf.hub.push import push_folder
torch.set_num_threads(1)
warned = []
handler = logging.Handler()
handler.emit = lambda record: warned.append(record.getMessage())
logging.getLogger("autolora_hf").addHandler(handler)
def probe(call, *args, **options):
    try:
        return call(*args, **options)
    except Exception as error:
        return [type(error).__name__, str(error)]
def logits(model):
    with torch.no_grad():
        return {route: model.pixel_space(route)(pixels()) for route in ("robust", "natural")}
def new_model(name, mode="full", layout="released", norm="shared", seed=1, base=None):
    if base is None:
        model = MODELS[name].adapted(mode=mode, layout=layout, norm=norm)
    else:
        config = AutoLoraConfig(mode=mode, layout=layout, norm=norm)
        model = get_autolora_model(base, config, preprocessing=MODELS[name].preprocessing)
    change_everything(model, seed)
    return model
def expect(folder, name, model):
    images = model.pixel_space().normalize(pixels())
    save_file({"images": images, **logits(model)}, Path(folder, f"{name}.safetensors"))
def as_expected(folder, name, model):
    expected, found = load_file(Path(folder, f"{name}.safetensors")), logits(model)
    return all(torch.equal(found[route], expected[route]) for route in found)
"""


class World:
    """A server, a folder for what is expected, and clients that find both."""

    def __init__(self, server: Hub, root: Path) -> None:
        self.server, self.store, self.root = server, server.store, root
        self.expected = root / "expected"
        self.expected.mkdir()
        self.stderr = ""

    def ask(self, code: str, *args: object, **options):
        """Answers of a client, called with the folder of what is expected and the store before its arguments."""
        done = self.server.run(code, self.expected, self.store.root, *args, **options)
        assert done.returncode == 0, done.stderr[-6000:]
        self.stderr = done.stderr
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with hub() as server:
        yield World(server, tmp_path_factory.mktemp("journeys"))


def card_of(store: Store, name: str, revision: str = "main") -> str:
    return store.files(name, revision)["README.md"].decode()


def titles(store: Store, name: str, branch: str = "main") -> list[str]:
    """Titles of the commits of a branch, the newest first."""
    found, sha = [], store.repo(name)["branches"][branch]
    while sha:
        commit = store.load(sha)
        found.append(commit["title"])
        sha = commit["parent"]
    return found


# ---- publishing ----

PUBLISH = """
import pickle
import timm
from hub_server import Store
expected, store, work = sys.argv[1:4]
store, api, answer = Store(store), HfApi(), {}
def push_base(network, repository):
    if hasattr(network, "config"):
        network.push_to_hub(repository)
    else:
        timm.models.push_to_hf_hub(network, repository)
for name in MODELS:
    push_base(MODELS[name].fresh(), f"alice/base-{name}")
for case in sys.argv[4:]:
    name, mode, layout, norm = case.split("-")
    prefix = "hf-hub:" if name.startswith("timm") else ""
    base = f"{prefix}alice/base-{name}" if mode == "adapter" else None
    model = new_model(name, mode, layout, norm, base=base)
    expect(expected, case, model)
    model.push_to_hub(f"alice/{case}")
    answer[case] = [model.backbone["name_or_path"], model.backbone["revision"]]
config = AutoLoraConfig(mode="adapter", layout="peft")
resized = get_autolora_model("hf-hub:alice/base-timm_vit", config, image_size=48)
change_everything(resized)
images = torch.nn.functional.interpolate(pixels(), 48)
with torch.no_grad():
    found = resized.pixel_space()(images)
save_file({"images": resized.pixel_space().normalize(images), "robust": found}, f"{expected}/resized.safetensors")
resized.push_to_hub("alice/resized")
# The bases go on; the adapters stay with the commit they were trained on.
answer["heads"] = {name: api.model_info(f"alice/base-{name}").sha for name in MODELS}
for name in MODELS:
    push_base(MODELS[name].fresh(seed=9), f"alice/base-{name}")

# Revisions.
first, second = new_model("timm_resnet"), new_model("timm_resnet", seed=5)
expect(expected, "first", first), expect(expected, "second", second)
answer["first"] = first.push_to_hub("alice/revisions").oid
api.create_tag("alice/revisions", tag="v1")
answer["second"] = second.push_to_hub("alice/revisions", revision="exp/wip", commit_message="Second").oid
answer["again"] = second.push_to_hub("alice/revisions", revision="exp/wip").oid
answer["third"] = second.push_to_hub("alice/revisions").oid

# Another mode over an earlier release, with files of the user's own.
folder = Path(work, "switch")
new_model("hf_vit", "adapter").save_pretrained(folder)
for name in ("model.onnx", "picture.png", "secret.pt", ".hidden/a.json", "last-checkpoint/trainer_state.json"):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"{}")
answer["adapter"] = push_folder(folder, "alice/switch").oid
api.upload_file(repo_id="alice/switch", path_or_fileobj=b"mine", path_in_repo="notes.txt")
answer["full"] = new_model("hf_vit").push_to_hub("alice/switch").oid

# In the background: what is pushed is what was there.
folder = Path(work, "future")
new_model("hf_vit").save_pretrained(folder)
job = push_folder(folder, "alice/future", run_as_future=True)
shutil.rmtree(folder)
answer["future"] = [len(job.result().oid), sorted(path.name for path in Path(work).iterdir())]

# The server has the commit, but its answer is lost.
model = new_model("hf_vit")
answer["lost"] = [probe(model.push_to_hub, "alice/lost"), len(model.push_to_hub("alice/lost").oid)]

# Who may see and write what.
model = new_model("hf_vit")
expect(expected, "mine", model)
answer["short"] = model.push_to_hub("short").repo_url.repo_id
model.push_to_hub("alice/private", private=True)
model.push_to_hub("alice/gated")
api.update_repo_settings("alice/gated", gated="manual")
answer["refused"] = {
    "foreign": probe(model.push_to_hub, "bob/theirs"),
    "nobody": probe(model.push_to_hub, "alice/short", token=False),
    "mallory": probe(model.push_to_hub, "alice/short", token="hf_mallory"),
    "stranger": probe(model.push_to_hub, "alice/private", token="hf_bob"),
    "name": probe(model.push_to_hub, "alice/no good"),
    "incomplete": probe(push_folder, work, "alice/incomplete"),
}
answer["no repository"] = api.repo_exists("alice/incomplete")

# Repositories of other kinds.
from peft import LoraConfig, get_peft_model
get_peft_model(MODELS["hf_vit"].fresh(), LoraConfig(target_modules=["q_proj"], r=2)).push_to_hub("alice/plain-peft")
api.create_repo("alice/empty")
api.create_repo("alice/data", repo_type="dataset")
# A base that is but a pickle, which would leave a file behind.
class Evil:
    def __reduce__(self):
        return Path.touch, (Path(work, "executed"),)
config = store.files("alice/base-hf_vit")["config.json"]
commit = store.put("alice/pickle", {"config.json": config, "pytorch_model.bin": pickle.dumps(Evil())})
files = store.files("alice/hf_vit-adapter-peft-shared")
record = json.loads(files["autolora_config.json"])
record["backbone"] |= {"name_or_path": "alice/pickle", "revision": commit}
store.put("alice/of-pickle", {**files, "autolora_config.json": json.dumps(record).encode()})
answer["warned"] = warned
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def published(world):
    work = world.root / "work"
    work.mkdir()
    world.server.faults.answers.append(("POST", "alice/lost/commit/", 0))
    answer = world.ask(CLIENT + PUBLISH, work, *CASES, token="hf_alice", home=world.root / "alice")
    return world, answer


def test_a_release_is_one_commit_with_what_belongs_to_it(published):
    world, answer = published
    for case in CASES:
        name, mode, *_ = case.split("-")
        files = set(world.store.files(f"alice/{case}"))
        natural = {"natural/adapter_config.json", "natural/adapter_model.safetensors"}
        own = {"adapter_config.json", "adapter_model.safetensors"} if mode == "adapter" else {"config.json"}
        own |= {"model.safetensors"} if mode == "full" else set()
        own |= {"preprocessor_config.json"} if mode == "full" and name.startswith("hf") else set()
        assert files == own | natural | {"autolora_config.json", "README.md"}, case
        assert titles(world.store, f"alice/{case}") == ["Upload robust model", "initial commit"]
        if mode == "adapter":
            assert answer[case] == [f"alice/base-{name}", answer["heads"][name]]
    assert answer["warned"] == []


def test_pushing_to_a_branch_and_again(published):
    world, answer = published
    assert titles(world.store, "alice/revisions", "exp/wip") == ["Second", "Upload robust model", "initial commit"]
    assert answer["again"] == answer["second"] and answer["first"] != answer["third"]
    main, branch = (world.store.files("alice/revisions", revision) for revision in ("main", "exp/wip"))
    assert main == branch != world.store.files("alice/revisions", "v1")


def test_another_mode_replaces_the_earlier_release_in_one_commit(published):
    world, answer = published
    old, new = (set(world.store.files("alice/switch", answer[mode])) for mode in ("adapter", "full"))
    natural = {"autolora_config.json", "natural/adapter_config.json", "natural/adapter_model.safetensors"}
    assert old == natural | {"adapter_config.json", "adapter_model.safetensors", "model.onnx", "picture.png"}
    full = natural | {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"}
    assert new == full | {"notes.txt", "picture.png"}
    assert len(titles(world.store, "alice/switch")) == 4


def test_a_push_whose_answer_was_lost_can_be_repeated(published):
    world, answer = published
    (kind, message), length = answer["lost"]
    assert kind == "OSError" and "'alice/lost' could not be pushed" in message and length == 40
    assert titles(world.store, "alice/lost") == ["Upload robust model", "initial commit"]


def test_pushing_in_the_background(published):
    world, answer = published
    length, left = answer["future"]
    assert length == 40 and left == ["switch"]  # nothing is left beside the folders
    assert "model.safetensors" in world.store.files("alice/future")


def test_a_push_that_is_refused_says_why(published):
    _, answer = published
    refused = answer["refused"]
    for who in ("foreign", "nobody", "mallory", "stranger"):
        kind, message = refused[who]
        assert kind == "PermissionError" and "hf auth login" in message and "token=" in message, who
    assert "'bob/theirs'" in refused["foreign"][1]
    assert refused["name"][0] == "ValueError" and "alice/no good" in refused["name"][1]
    assert refused["incomplete"][0] == "FileNotFoundError" and not answer["no repository"]


# ---- cards ----


def test_cards_name_the_repository(published):
    world, answer = published
    assert answer["short"] == "alice/short"
    card = card_of(world.store, "alice/short")
    assert 'load_autolora_model("alice/short")' in card and 'from_pretrained("alice/short")' in card
    assert '"short"' not in card and "autolora export alice/short" in card
    for case in ADAPTERS:
        library = case.split("_")[0]
        name, revision = answer[case]
        source = {"timm": f'"hf-hub:{name}@{revision}"', "hf": f'"{name}", revision="{revision}"'}[library]
        assert source in card_of(world.store, f"alice/{case}")


def check_card(store: Store, name: str) -> ModelCard:
    text = card_of(store, name)
    card = ModelCard(text)
    assert card.data.to_dict() == {**card_metadata(text)}, name
    assert card.data.pipeline_tag == "image-classification" and card.data.library_name
    assert "autolora" in card.data.tags
    return card


def test_cards_pass_the_validation_of_huggingface_hub(published):
    world, _ = published
    for case in CASES:
        name, mode, *_ = case.split("-")
        data = check_card(world.store, f"alice/{case}").data
        library = "timm" if name.startswith("timm") else "transformers"
        assert data.library_name == (library if mode == "full" else "peft") and data.eval_results is None
        if mode == "adapter":
            assert data.base_model == f"alice/base-{name}" and data.base_model_relation == "adapter"


# ---- loading ----

CONSUME = (
    """
import os, re
os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS")
"""
    + CLIENT
    + """
from hub_server import Store
from autolora_hf.download import download
expected, store, work, commits = sys.argv[1:5]
store, commits, answer = Store(store), json.loads(commits), {}
def load(repository, name="mine", **options):
    return as_expected(expected, name, load_autolora_model(repository, **options))
answer["cases"] = {case: probe(load, f"alice/{case}", case) for case in sys.argv[5:]}
answer["warned"] = list(warned)
answer["snippet"] = {}
for case in sys.argv[5:]:
    card = Path(download(f"alice/{case}", ["README.md"]), "README.md").read_text()
    names = {"pixels": pixels()}
    code = next(code for code in re.findall("```python\\n(.*?)```", card, re.DOTALL) if "autolora_hf" in code)
    exec(code, names)
    found = load_file(Path(expected, f"{case}.safetensors"))["robust"]
    answer["snippet"][case] = torch.equal(names["logits"].detach(), found)
answer["revisions"] = {
    "main": load("alice/revisions", "second"),
    **{rev: load("alice/revisions", "first", revision=rev) for rev in ("v1", commits["first"])},
    **{rev: load("alice/revisions", "second", revision=rev) for rev in ("exp/wip", commits["second"])},
    "v9": probe(load, "alice/revisions", revision="v9"),
}
answer["private"] = {
    "nobody": probe(load, "alice/private"),
    "stranger": probe(load, "alice/private", token="hf_bob"),
    "mallory": probe(load, "alice/private", token="hf_mallory"),
    "mallory in public": probe(load, "alice/revisions", token="hf_mallory", cache_dir=f"{work}/mallory"),
    "no login": probe(load, "alice/private", token=True),
    "owner": probe(load, "alice/private", token="hf_alice"),
}
answer["gated"] = {
    "nobody": probe(load, "alice/gated"),
    "stranger": probe(load, "alice/gated", token="hf_bob"),
}
HfApi(token="hf_alice").grant_access("alice/gated", "bob")
answer["gated"]["granted"] = probe(load, "alice/gated", token="hf_bob")
kinds = ("plain-peft", "empty", "base-hf_vit", "data", "nothing", "of-pickle")
answer["kinds"] = {kind: probe(load_autolora_model, f"alice/{kind}") for kind in kinds}
answer["pickle"] = probe(get_autolora_model, "alice/pickle")
answer["cache_dir"] = load("alice/revisions", "second", cache_dir=f"{work}/cache")
answer["cached"] = [path.name for path in Path(work, "cache").glob("models--*")]
# Afterwards nothing is asked any more.
before = len(store.requests())
answer["local"] = {case: probe(load, f"alice/{case}", case, local_files_only=True) for case in sys.argv[5:]}
answer["local"]["v1"] = probe(load, "alice/revisions", "first", revision="v1", local_files_only=True)
answer["local"]["cache_dir"] = probe(
    load, "alice/revisions", "second", cache_dir=f"{work}/cache", local_files_only=True)
answer["local, not there"] = probe(load, "alice/short", local_files_only=True)
answer["asked"] = len(store.requests()) - before
# A download that ended after the first file.
download("alice/short", ["autolora_config.json"])
answer["info"] = {}
for case in sys.argv[5:]:
    info = HfApi().model_info(f"alice/{case}")
    answer["info"][case] = [info.pipeline_tag, info.library_name, info.card_data.to_dict(), "autolora" in info.tags]
print(json.dumps(answer))
"""
)


@pytest.fixture(scope="module")
def consumed(published):
    world, answer = published
    work = world.root / "consumer"
    work.mkdir()
    found = world.ask(CONSUME, work, json.dumps(answer), *CASES, home=world.root / "nobody")
    return world, found, world.stderr


def test_push_and_load_from_a_fresh_cache(consumed):
    world, answer, stderr = consumed
    assert answer["cases"] == dict.fromkeys(CASES, True)
    assert answer["warned"] == []
    assert "Fetching" in stderr and "100%" in stderr  # progress bars
    assert not [r for r in world.store.requests("GET", r"\.bin$|\.pt$") if r["user"] is None]


def test_the_snippets_of_the_cards_run(consumed):
    assert consumed[1]["snippet"] == dict.fromkeys(CASES, True)


def test_revisions(consumed):
    revisions = dict(consumed[1]["revisions"])
    kind, message = revisions.pop("v9")
    assert kind == "FileNotFoundError" and "alice/revisions" in message and "'v9'" in message
    assert len(revisions) == 5 and all(value is True for value in revisions.values()), revisions


def test_private_and_gated_repositories(consumed):
    private, gated = consumed[1]["private"], consumed[1]["gated"]
    for who in ("nobody", "stranger"):
        kind, message = private[who]
        assert kind == "FileNotFoundError" and "'alice/private'" in message and "token=" in message
        kind, message = gated[who]
        assert kind == "PermissionError" and "alice/gated is gated" in message and "token=" in message
    for who in ("mallory", "mallory in public"):
        kind, message = private[who]
        assert kind == "PermissionError" and "token" in message, who
    assert private["no login"][0] == "PermissionError" and "hf auth login" in private["no login"][1]
    assert private["owner"] is gated["granted"] is True


def test_repositories_of_other_kinds(consumed):
    world, answer, _ = consumed
    kinds = answer["kinds"]
    for kind in ("plain-peft", "empty", "base-hf_vit"):
        assert kinds[kind][0] == "FileNotFoundError" and "autolora_config.json" in kinds[kind][1], kind
    assert "PeftModel.from_pretrained" in kinds["plain-peft"][1]
    for kind in ("data", "nothing"):
        assert kinds[kind][0] == "FileNotFoundError" and f"'alice/{kind}'" in kinds[kind][1]
    # Pickles are neither run nor even fetched.
    for name, message in (kinds["of-pickle"], answer["pickle"]):
        assert name == "ValueError" and "safetensors" in message and "alice/pickle" in message
    assert not (world.root / "work/executed").exists()
    assert not world.store.requests("", "pytorch_model.bin")


def test_the_cache(consumed):
    answer = consumed[1]
    assert answer["cache_dir"] is True and answer["cached"] == ["models--alice--revisions"]
    assert set(answer["local"].values()) == {True}
    kind, message = answer["local, not there"]
    assert kind == "OSError" and "alice/short" in message and "local_files_only" in message
    assert answer["asked"] == 0


def test_the_hub_shows_the_card(consumed):
    for case, (pipeline, library, card, tagged) in consumed[1]["info"].items():
        assert pipeline == "image-classification" and library == card["library_name"] and tagged, case


def test_without_a_network(consumed):
    world, _, _ = consumed
    code = (
        'import os\nos.environ["HF_HUB_OFFLINE"] = "1"\n'
        + CLIENT
        + """
expected, cases = sys.argv[1], sys.argv[3:]
def load(repository, name, **options):
    return as_expected(expected, name, load_autolora_model(repository, **options))
answer = {case: probe(load, f"alice/{case}", case) for case in cases}
answer["v1"] = probe(load, "alice/revisions", "first", revision="v1")
answer = {"loaded": answer, "in part": probe(load, "alice/short", "mine"), "not": probe(load, "alice/future", "mine"),
          "push": probe(new_model("hf_vit").push_to_hub, "alice/offline")}
print(json.dumps(answer))
"""
    )
    before = len(world.store.requests())
    answer = world.ask(code, *CASES, token="hf_alice", home=world.root / "nobody")
    assert len(world.store.requests()) == before
    assert set(answer["loaded"].values()) == {True}
    assert answer["in part"][0] == "OSError" and "alice/short" in answer["in part"][1]
    assert "is not in the cache, or only a part of it" in answer["in part"][1]
    assert answer["not"][0] == "OSError" and "alice/future is not in the cache" in answer["not"][1]
    assert answer["push"][0] == "OSError" and "offline" in answer["push"][1]


# ---- without this package ----

STOCK = """
import json, re, sys, warnings
from pathlib import Path
import timm, torch
from huggingface_hub import hf_hub_download
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification
torch.set_num_threads(1)
folder, revisions = sys.argv[1], json.loads(sys.argv[3])
def run(network, images):
    with torch.no_grad():
        output = network.eval()(images)
    return output if isinstance(output, torch.Tensor) else output.logits
def snippet(repository, tensors):
    card = Path(hf_hub_download(repository, "README.md")).read_text()
    code = [code for code in re.findall("```python\\n(.*?)```", card, re.DOTALL) if "autolora_hf" not in code]
    names = {}
    exec(code[0], names)
    found = run(names["model"], tensors["images"])
    return [len(code), torch.allclose(found, tensors["robust"], rtol=1e-4, atol=1e-4)]
answer = {"resized": snippet("alice/resized", load_file(Path(folder, "resized.safetensors")))}
for case in sys.argv[4:]:
    tensors, name = load_file(Path(folder, f"{case}.safetensors")), case.split("-")[0]
    adapter, of_timm, result = "-adapter-" in case, name.startswith("timm"), {}
    def base():
        if of_timm:
            return timm.create_model(f"hf-hub:alice/base-{name}@{revisions[name]}", pretrained=True)
        return AutoModelForImageClassification.from_pretrained(f"alice/base-{name}", revision=revisions[name])
    def robust():
        if adapter:
            return base()
        if of_timm:
            return timm.create_model(f"hf-hub:alice/{case}", pretrained=True)
        return AutoModelForImageClassification.from_pretrained(f"alice/{case}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(robust(), f"alice/{case}") if adapter else robust()
        natural = PeftModel.from_pretrained(robust(), f"alice/{case}", subfolder="natural")
    # About transformers, which PEFT asks for an attribute that it is about to rename.
    result["warnings"] = [str(w.message) for w in caught if "is_gradient_checkpointing" not in str(w.message)]
    found = run(model, tensors["images"])
    result["equal"] = torch.equal(found, tensors["robust"])
    result["close"] = torch.allclose(found, tensors["robust"], rtol=1e-4, atol=1e-4)
    result["natural"] = torch.allclose(run(natural, tensors["images"]), tensors["natural"], rtol=1e-4, atol=1e-4)
    result["snippet"] = snippet(f"alice/{case}", tensors)
    if not adapter and not of_timm:
        processor = AutoImageProcessor.from_pretrained(f"alice/{case}")
        image = Image.effect_mandelbrot((32, 32), (-2, -1.5, 1, 1.5), 100).convert("RGB")
        values = processor(image, return_tensors="pt")["pixel_values"]
        result["processor"] = [list(values.shape), values.mean(dim=(0, 2, 3)).tolist()]
    answer[case] = result
assert "autolora_hf" not in sys.modules
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def stock(published):
    world, answer = published
    return world.ask(STOCK, json.dumps(answer["heads"]), *CASES, home=world.root / "stock")


@pytest.mark.parametrize("case", CASES)
def test_stock_libraries_load_it_from_the_hub(stock, case):
    name, mode, layout, _ = case.split("-")
    result = stock[case]
    assert result["warnings"] == []
    # An unfolded branch is the same function computed in another order.
    assert result["equal" if mode == "full" or layout == "peft" else "close"]
    assert result["natural"]
    assert result["snippet"] == [1, True]
    if mode == "full" and name.startswith("hf"):
        assert result["processor"][0] == [1, 3, 32, 32]


def test_the_snippet_of_a_model_of_another_image_size(stock):
    assert stock["resized"] == [1, True]


# ---- the server dies ----


def wait_for(path: Path, seconds: float = 120) -> None:
    deadline = time.time() + seconds
    while not path.exists():
        assert time.time() < deadline, f"{path.name} did not come"
        time.sleep(0.05)


def test_the_server_dies_while_a_model_is_pushed_and_loaded(tmp_path):
    code = (
        CLIENT
        + """
expected, signals, work = sys.argv[1:]
def reached(name, following):
    Path(signals, name).touch()
    while not Path(signals, following).exists():
        time.sleep(0.05)
def load(**options):
    return as_expected(expected, "model", load_autolora_model("alice/killed", **options))
model = new_model("timm_resnet")
expect(expected, "model", model)
model.save_pretrained(work)
Path(work, "picture.png").write_bytes(bytes(70_000))
push = lambda: push_folder(work, "alice/killed")
real, time.sleep = time.sleep, lambda seconds: real(min(seconds, 0.1))  # between two attempts
answer = {"cut": probe(push)}
reached("cut", "push again")
answer["oid"] = push().oid
reached("pushed", "load")
answer["half"] = probe(load)
answer["half, local"] = probe(load, local_files_only=True)
reached("half loaded", "load again")
answer["loaded"] = probe(load)
reached("loaded", "gone")
answer["from the cache"] = probe(load)
answer["not in the cache"] = probe(load_autolora_model, "alice/other")
answer["push to nothing"] = probe(push)
print(json.dumps(answer))
"""
    )
    expected, signals, work = (tmp_path / name for name in ("expected", "signals", "work"))
    expected.mkdir(), signals.mkdir()
    # The picture arrives, the larger one of the weights does not.
    with hub_process(tmp_path / "store", die_after_upload_bytes=500_000, delay=0.01) as server:
        store = server.store
        client = server.popen(code, expected, signals, work, token="hf_alice", home=tmp_path / "home")
        try:
            assert server.wait(120) == 9
            wait_for(signals / "cut")
            before = store.requests("PUT", "/lfs/")
            assert before and not store.files("alice/killed")
            server.restart()
            (signals / "push again").touch()
            wait_for(signals / "pushed")
            puts = store.requests("PUT", "/lfs/")
            sent = [request["path"] for request in puts if request["status"] == 200]
            assert len(sent) == len(set(sent)) == 3 and titles(store, "alice/killed")[1:] == ["initial commit"]
            local = {p.relative_to(work).as_posix(): p.read_bytes() for p in work.rglob("*") if p.is_file()}
            assert store.files("alice/killed") == local

            server.restart(die_after_download_bytes=len(local["model.safetensors"]) - 1000)
            (signals / "load").touch()
            assert server.wait(120) == 9
            wait_for(signals / "half loaded")
            blobs = [path.read_bytes() for path in (tmp_path / "home").rglob("blobs/*")]
            server.restart()
            (signals / "load again").touch()
            wait_for(signals / "loaded")
            server.kill()
            (signals / "gone").touch()
            out, err = client.communicate(timeout=120)
        finally:
            client.kill()
            client.wait()
        server.start()
    assert client.returncode == 0, err[-4000:]
    answer = json.loads(out.splitlines()[-1])
    kind, message = answer["cut"]
    assert kind == "OSError" and "'alice/killed' could not be pushed" in message and "push again" in message
    assert answer["half"][0] == answer["half, local"][0] == "OSError"
    assert local["autolora_config.json"] in blobs and local["model.safetensors"] not in blobs
    assert answer["loaded"] is answer["from the cache"] is True
    kind, message = answer["not in the cache"]
    assert kind == "OSError" and "alice/other is not in the cache" in message
    assert answer["push to nothing"][0] == "OSError" and "could not be pushed" in answer["push to nothing"][1]


# ---- two at once ----


def test_two_clients_push_at_once(world, tmp_path):
    """The models differ in mode, so that files of the one left over beside the other would be noticed."""
    code = (
        CLIENT
        + """
folder = Path(sys.argv[3])
for mode in ("full", "adapter"):
    new_model("timm_resnet", mode).save_pretrained(folder / mode)
mode = "full" if (child := os.fork()) else "adapter"
# Both have seen the repository before either of them commits.
genuine, waited = HfApi.create_commit, []
def create_commit(*args, **options):
    if not waited:
        waited.append((folder / f"{mode}-waits").touch())
        while len(list(folder.glob("*-waits"))) < 2:
            time.sleep(0.02)
    return genuine(*args, **options)
HfApi.create_commit = create_commit
result = probe(push_folder, folder / mode, "alice/race", commit_message=mode)
if not child:
    os._exit(isinstance(result, list))
answer = [isinstance(result, list), os.waitpid(child, 0)[1]]
for revision in HfApi().list_repo_commits("alice/race")[:2]:
    base = MODELS["timm_resnet"].fresh() if revision.title == "adapter" else None
    loaded = load_autolora_model("alice/race", base_model=base, revision=revision.commit_id)
    found, expected = logits(loaded), logits(new_model("timm_resnet", revision.title))
    answer.append(all(torch.equal(found[route], expected[route]) for route in found))
print(json.dumps(answer))
"""
    )
    answer = world.ask(code, tmp_path, token="hf_alice", home=tmp_path / "home")
    assert answer == [False, 0, True, True]
    last, first, _ = titles(world.store, "alice/race")
    assert {first, last} == {"full", "adapter"}
    statuses = [request["status"] for request in world.store.requests("POST", "alice/race/commit/")]
    assert sorted(statuses) == [200, 200, 412]
    head = world.store.repo("alice/race")["branches"]["main"]
    for mode, revision in ((last, head), (first, world.store.load(head)["parent"])):
        folder = tmp_path / mode
        local = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        assert world.store.files("alice/race", revision) == local


# ---- training ----

TRAIN = (
    CLIENT
    + """
from huggingface_hub import snapshot_download
from transformers import TrainerCallback
from autolora_hf import AutoLoraTrainer
from test_trainer import NAMES, arguments, pictures
expected, work = sys.argv[1], Path(sys.argv[3])
class Stop(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = True
def trainer(folder, callbacks=None, name="timm_resnet", mode="full", **changes):
    model = MODELS[name].adapted(num_classes=len(NAMES), mode=mode)
    args = arguments(work / folder, **{"push_to_hub": True, **changes})
    return AutoLoraTrainer(model, args, train_dataset=pictures(), callbacks=callbacks)
answer = {}
run = trainer("every", hub_strategy="every_save", hub_model_id="alice/every", hub_token="hf_alice")
run.train()
trained = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
answer["every"] = HfApi().list_repo_files("alice/every")
report = run.evaluate_robustness(pictures(12, seed=7), max_samples=4)
run.evaluate_robustness(pictures(12, seed=8), attack="pgd", max_samples=12)
answer["protocol"] = report.protocol
# What the examples of transformers pass.
answer["pushed"] = run.push_to_hub(
    finetuned_from="x", tasks="image-classification", dataset="shapes", dataset_tags="alice/data", language="en",
    tags=["image-classification", "vision"], license="mit").oid
answer["loaded"] = load_autolora_model("alice/every").results == run.model.results != []

run = trainer("first", [Stop()], hub_strategy="checkpoint", hub_model_id="alice/resumed", hub_private_repo=True)
run.train()
answer["checkpoint"] = HfApi().list_repo_files("alice/resumed")
answer["checkpoint private"] = HfApi().model_info("alice/resumed").private
# Another machine goes on.
(work / "first").rename(work / "elsewhere")
snapshot_download("alice/resumed", allow_patterns="last-checkpoint/*", local_dir=work / "second")
run = trainer("second", hub_strategy="checkpoint", hub_model_id="alice/resumed")
run.train(resume_from_checkpoint=str(work / "second/last-checkpoint"))
answer["resumed"] = run.state.global_step
answer["same"] = all(torch.equal(tensor, trained[name]) for name, tensor in run.model.state_dict().items())
snapshot = snapshot_download("alice/resumed", allow_patterns="last-checkpoint/*")
answer["last step"] = json.loads(Path(snapshot, "last-checkpoint/trainer_state.json").read_text())["global_step"]

run = trainer("end", name="hf_vit", mode="adapter", num_train_epochs=1, hub_strategy="end", hub_model_id="end",
              hub_always_push=True, hub_revision="dev")
run.train()
answer["end, trained"] = HfApi().list_repo_files("alice/end")
run.save_model()
answer["end, saved"] = HfApi().list_repo_files("alice/end", revision="dev")
run = trainer("afterwards", name="hf_vit", num_train_epochs=1, push_to_hub=False)
run.train()
answer["future"] = len(run.push_to_hub(blocking=False, private=True, commit_message="Done").result().oid)
answer["hidden"] = [path.name for path in work.iterdir() if path.name.startswith(".")]
run = trainer("refused", name="hf_vit", num_train_epochs=1, hub_model_id="alice/refused", hub_strategy="every_save")
HfApi().delete_repo("alice/refused")
run.args.hub_token = "hf_bob"
answer["went on"] = run.train().global_step
answer["warned"] = [text for text in warned if "pushed" in text]
print(json.dumps(answer))
"""
)


@pytest.fixture(scope="module")
def trained(world):
    work = world.root / "training"
    work.mkdir()
    answer = world.ask(TRAIN, work, token="hf_alice", home=world.root / "trainer")
    return world, answer


RELEASE = {
    ".gitattributes",
    "README.md",
    "autolora_config.json",
    "config.json",
    "model.safetensors",
    "natural/adapter_config.json",
    "natural/adapter_model.safetensors",
    "training_curves.png",
    "training_plan.json",
}


def test_training_publishes_every_checkpoint_and_the_end(trained):
    world, answer = trained
    assert set(answer["every"]) == RELEASE
    commits = titles(world.store, "alice/every")
    assert commits[0] == "End of training" and commits[-1] == "initial commit"
    assert commits[1].startswith("Training in progress, epoch")
    assert set(world.store.files("alice/every")) == RELEASE - {".gitattributes"}
    assert not any(b"hf_alice" in content for content in world.store.files("alice/every").values())
    assert answer["loaded"] and answer["protocol"].startswith("autoattack")


def test_the_card_of_a_training_holds_its_results(trained):
    world, _ = trained
    card = check_card(world.store, "alice/every")
    data = card.data
    assert data.license == "mit" and {"vision", "autolora"} <= set(data.tags) and data.datasets == ["alice/data"]
    assert [result.metric_type for result in data.eval_results] == ["accuracy"] * 3
    assert sum("Robust" in result.metric_name for result in data.eval_results) == 1
    index = eval_results_to_model_index(data.model_name, data.eval_results)
    assert index == card_metadata(card.content)["model-index"]
    assert model_index_to_eval_results(index) == (data.model_name, data.eval_results)
    assert data.model_name == "every" and "test images of shapes" in card.text
    assert "![" in card.text and "training_curves.png" in card.text


def test_training_goes_on_from_a_checkpoint_on_the_hub(trained):
    _, answer = trained
    assert answer["checkpoint private"]
    checkpoint = {name.removeprefix("last-checkpoint/") for name in answer["checkpoint"] if "last-checkpoint" in name}
    assert {"model.safetensors", "autolora_config.json", "optimizer.pt", "trainer_state.json"} <= checkpoint
    assert set(answer["checkpoint"]) - {f"last-checkpoint/{name}" for name in checkpoint} == RELEASE
    assert answer["resumed"] == answer["last step"] > 0
    assert answer["same"]


def test_training_publishes_at_the_end_only(trained):
    world, answer = trained
    assert answer["end, trained"] == [".gitattributes"]
    own = {"adapter_config.json", "adapter_model.safetensors"}
    assert set(answer["end, saved"]) == RELEASE - {"config.json", "model.safetensors"} | own
    assert titles(world.store, "alice/end", "dev")[0] == "Model save"
    files = world.store.files("alice/afterwards")
    assert answer["future"] == 40 and titles(world.store, "alice/afterwards")[0] == "Done"
    assert "model.safetensors" in files and world.store.repo("alice/afterwards")["private"]
    assert answer["hidden"] == []


def test_training_goes_on_when_a_push_fails(trained):
    answer = trained[1]
    assert answer["went on"] > 0
    assert len(answer["warned"]) == 1 and "A checkpoint was not pushed: The Hub refused" in answer["warned"][0]


def test_no_pickle_is_published(published, trained):
    world, _ = published
    for repo in world.store.repos("model"):
        if repo["id"].startswith("alice/base") or repo["id"] == "alice/pickle":
            continue
        for sha in repo["commits"]:
            names = world.store.load(sha)["tree"]
            pickles = [name for name in names if re.search(r"\.(bin|pt|pth|pkl|ckpt)$", name)]
            assert all(name.startswith("last-checkpoint/") for name in pickles), (repo["id"], pickles)
