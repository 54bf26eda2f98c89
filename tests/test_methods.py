"""Methods as combinations of routes, objectives, initialisers and schedules: whole trainings, from Python and from the
command line, and what is left of a method in what is published."""

import ast
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from test_objectives import model_for
from test_stages import trainer_for
from test_trainer import NAMES, arguments, copied_state, logged, pictures, same
from tiny_models import MODELS, pixels

import autolora_hf
from autolora_hf import AutoLoraTrainer, load_autolora_model
from autolora_hf.cli import main
from autolora_hf.initializers import INITIALIZERS
from autolora_hf.layers import BRANCHES
from autolora_hf.objectives import OBJECTIVES
from autolora_hf.postprocessing import FINISHERS
from autolora_hf.routes import NATURAL, ROBUST


CLASSIFIERS = [name for name, kind in OBJECTIVES.items() if kind.classifies]


@pytest.mark.parametrize("objective", CLASSIFIERS)
@pytest.mark.parametrize("mode", ["full", "adapter"])
def test_nothing_but_the_deployed_route_is_published(tmp_path, objective, mode):
    trainer = trainer_for(tmp_path, objective=objective, mode=mode, num_train_epochs=1)
    trainer.train()
    trainer.save_model()
    fresh = MODELS["timm_resnet"].fresh(len(NAMES))
    deployed = trainer.model.pixel_space(ROBUST).eval()
    expected = deployed(pixels())
    # In mode `full` the file is that of the plain backbone: no second norms, no predictor, no branch.
    if mode == "full":
        assert load_file(tmp_path / "model.safetensors").keys() == fresh.state_dict().keys()
    has_natural = any(path.name.startswith("natural") for path in tmp_path.iterdir())
    assert has_natural is (NATURAL in trainer.model.routes)
    loaded = load_autolora_model(tmp_path, base_model=None if mode == "full" else fresh)
    assert torch.allclose(loaded.pixel_space()(pixels()), expected, atol=1e-5)
    merged = trainer.model.merge_and_unload().eval()
    assert torch.allclose(merged(deployed.normalize(pixels())), expected, atol=1e-4)
    assert merged.state_dict().keys() == MODELS["timm_resnet"].fresh(len(NAMES)).state_dict().keys()


@pytest.mark.parametrize("objective", ["slf", "alf"])
@pytest.mark.parametrize("name", MODELS)
def test_linear_fine_tuning_changes_the_head_alone(tmp_path, objective, name):
    trainer = trainer_for(tmp_path, name, objective=objective, num_train_epochs=2)
    before = copied_state(trainer.model)
    trainer.train()
    after = copied_state(trainer.model)
    heads = {id(p) for head in trainer.model.heads for p in head.parameters()}
    of_the_head = {key for key, p in trainer.model.named_parameters() if id(p) in heads}
    assert {key for key in before if not torch.equal(before[key], after[key])} == of_the_head


def test_linear_fine_tuning_runs_in_eval_mode_and_gives_it_back():
    model = MODELS["timm_resnet"].adapted()
    model.train()
    model.limit_training(heads_only=True)
    assert model.training and all(head.training for head in model.heads)
    assert not any(module.training for module in model.get_base_model().modules() if module not in model.heads)
    model.eval()
    model.train()
    assert not model.get_base_model().training
    model.limit_training()
    assert all(module.training for module in model.get_base_model().modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("objective", ["twins-at", "twins-trades"])
@pytest.mark.parametrize("name", ["timm_resnet", "hf_resnet"])
def test_the_frozen_statistics_of_twins_stay_to_the_bit(tmp_path, objective, name):
    trainer = trainer_for(tmp_path, name, objective=objective, num_train_epochs=2)
    model = trainer.model
    frozen = {key: value.clone() for key, value in model.natural_norms.state_dict().items()}
    live = copied_state(model.get_base_model())
    trainer.train()
    for key, value in model.natural_norms.state_dict().items():
        is_statistic = "running_" in key or "num_batches" in key
        assert torch.equal(value, frozen[key]) is is_statistic, "its statistics stay and its affine parameters train"
    for key, value in model.get_base_model().state_dict().items():
        if "running_mean" in key:
            assert not torch.equal(value, live[key]), "the adaptive net has its own statistics, which move"


def test_at_the_start_both_nets_of_twins_are_the_backbone():
    model = model_for("twins-at")
    model.train()
    with model.route(NATURAL), torch.no_grad():
        frozen = model(pixels())
    model.eval()
    with torch.no_grad():
        assert torch.allclose(frozen, model(pixels()), atol=1e-6), "it normalises with running statistics in training"


def test_a_natural_branch_that_no_objective_uses_stays_as_it_is(tmp_path):
    """A model with two routes can be trained with an objective of one, also where every gradient is waited for."""
    options = {"objective": "pgd-at", "num_train_epochs": 2}
    other = trainer_for(tmp_path / "other", config={"natural_route": "branch"}, **options)
    branch = other.model._branch_parameters(NATURAL)
    before = [p.detach().clone() for p in branch]
    other.train()
    assert not any(p.requires_grad for p in branch)
    assert all(torch.equal(p, q) for p, q in zip(branch, before, strict=True))
    plain = trainer_for(tmp_path / "plain", **options)
    plain.train()
    assert logged(plain, "loss") == logged(other, "loss")
    assert same(*(trainer.model.merge_and_unload().state_dict() for trainer in (plain, other)))


def test_the_trainer_knows_no_method_by_name():
    # "natural" is also the name of a route and of a metric.
    names = {*OBJECTIVES, *INITIALIZERS, *FINISHERS, *BRANCHES} - {"none", "natural"}
    classes = {kind.__name__ for kinds in (OBJECTIVES, INITIALIZERS, FINISHERS) for kind in kinds.values()}
    found = set()
    for file in (Path(autolora_hf.__file__).parent / "training").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and node.value in names:
                found.add((file.name, node.value))
            elif isinstance(node, ast.Name) and node.id in classes - {"Initializer", "Finisher"}:
                found.add((file.name, node.id))
    # The default of the arguments.
    assert found == {("method_arguments.py", "autolora")}


def test_a_backbone_is_given_the_routes_that_the_objective_needs(tmp_path):
    for objective in ("pgd-at", "twins-at", "autolora"):
        args = arguments(tmp_path / objective, objective=objective)
        trainer = AutoLoraTrainer(MODELS["timm_resnet"].fresh(len(NAMES)), args, pictures())
        assert (NATURAL in trainer.model.routes) == (NATURAL in OBJECTIVES[objective].routes)


# ---- the command line ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for index, row in enumerate(pictures()):
        path = folder / NAMES[row["label"]] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        row["image"].save(path)
    return folder


@pytest.fixture(autouse=True)
def without_downloads(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained=False, **kw: create(name, pretrained=False, **kw)
    )


def train(folder, data, *options):
    few = ["--num-train-epochs", "1", "--attack-steps", "1", "--eval-attack-steps", "1"]
    few += ["--validation-fraction", "0.2", "--per-device-train-batch-size", "16"]
    common = ["--train-data", str(data), "--output-dir", str(folder), "--use-cpu", "--image-size", "32", *few]
    assert main(["train", "--model", "test_resnet", *common, *options]) == 0
    return [json.loads((folder / name).read_text()) for name in ("training_plan.json", "autolora_config.json")]


@pytest.mark.parametrize(
    "options, config",
    [
        (["--objective", "twins-trades", "--objective-kwargs", '{"beta": 3}'], {"norm": "frozen"}),
        (["--objective", "ar-at"], {"norm": "split", "natural_route": "plain"}),
        (["--objective", "pgd-at", "--mode", "adapter", "--branch", "loha"], {"natural_route": "none"}),
        (["--objective", "pgd-at", "--init", "adversarial-linear-probe", "--init-kwargs", '{"epochs": 1}'], {}),
        (["--stop-gradient", "False", "--schedule", "cosine", "--average-weights", "ema"], {"stop_gradient": False}),
        (["--loss-scalars", "0.5", "3", "--eps-schedule", "two-hinge", "--eps-hinges", "0.1", "0.9"], {}),
        (["--norm", "dual", "--scalar-images", "12"], {"norm": "dual"}),
    ],
    ids=["twins", "ar-at", "lora-at", "roli", "no-stop-gradient", "fixed-scalars", "dual"],
)
def test_methods_from_the_command_line(tmp_path, folders, options, config):
    plan, record = train(tmp_path, folders, *options)
    assert {key: record["config"][key] for key in config} == config
    asked = dict(zip(options[::2], options[1::2], strict=False))
    assert plan["objective"] == asked.get("--objective", "autolora")
    assert plan["objective_options"] == json.loads(asked.get("--objective-kwargs", "{}"))
    assert plan["init"] == asked.get("--init", "none")
    card = (tmp_path / "README.md").read_text()
    assert OBJECTIVES[plan["objective"]].description.replace("{branch}", "LoRA") in card
    assert ("LoRA branch of its own" in card) is (plan["objective"] == "autolora")


def test_mistakes_on_the_command_line_are_one_line(tmp_path, folders, capsys):
    folder = tmp_path / "run"
    common = ["--model", "test_resnet", "--train-data", str(folders), "--output-dir", str(folder), "--use-cpu"]
    for options, message in (
        (["--objective", "trade"], "`objective` must be one of"),
        (["--branch", "lorax"], "`branch`"),
        (["--branch-args", "{"], "must be a JSON object"),
        (["--init", "adversarial-linear-probe", "--init-kwargs", '{"epoch": 1}'], "epoch, which"),
    ):
        assert main(["train", *common, *options]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("autolora train: error:") and message in error, error
    assert not folder.exists()
