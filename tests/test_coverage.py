"""Every backbone: some unlike architectures here, all of them in the marked sweep.

What is checked of an architecture is in `scripts/architecture_checks.py`.
"""

from pathlib import Path

import pytest
import timm
from script_modules import load
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES


ROOT = Path(__file__).parents[1]


checks = load("architecture_checks")
ROWS, check_row, failures = checks.ROWS, checks.check_row, checks.failures


REPRESENTATIVE = [
    "timm/resnet/dilated",
    "timm/convnext",  # depthwise convolutions
    "timm/nfnet/same",  # weight-standardised and "same" padded convolutions
    "timm/efficientnet",
    "timm/levit",  # two heads, biases that are kept in eval mode
    "timm/vgg",  # no repeated blocks
    "timm/beit/relative-positions",  # qkv weights that are read past the layer
    "timm/vision_transformer/non-square",
    "transformers/bit",  # a head inside a sequence, weight-standardised convolutions
    "transformers/regnet",  # grouped convolutions
    "transformers/swinv2",
    "transformers/deit/WithTeacher",
    "transformers/mobilenet_v1",  # padding computed from the layer's attributes
    "transformers/timm_wrapper",
]
ALWAYS = ["timm/convnext", "timm/levit", "transformers/bit"]
REFUSED = {
    "transformers/imagegpt": "colour-cluster numbers",
    "transformers/shieldgemma2": "text prompt",
    "transformers/siglip2": "patches cut by its processor",
}
NOT_RUN = ["transformers/dinat"]  # transformers itself needs the library natten for it


@pytest.mark.parametrize("name", ALWAYS)
def test_unlike_architectures(name):
    assert failures(check_row(ROWS[name])) == []


@pytest.mark.sweep
@pytest.mark.parametrize("name", sorted(set(REPRESENTATIVE) - set(ALWAYS)))
def test_more_unlike_architectures(name):
    assert failures(check_row(ROWS[name])) == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_attacked_is_refused(name):
    problems = failures(check_row(ROWS[name]))
    assert problems and all("REFUSED" in problem and REFUSED[name] in problem for problem in problems)


def test_the_table_has_every_family():
    families = {(row.library, row.family) for row in ROWS.values()}
    assert {family for library, family in families if library == "timm"} == set(timm.list_modules())
    keys = {family for library, family in families if library == "transformers"}
    assert keys == set(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    classes = {row.model for row in ROWS.values() if row.library == "transformers"}
    named = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
    assert classes == {name for names in named for name in ([names] if isinstance(names, str) else names)}


# More than a third of the time of all families together; `python scripts/architecture_coverage.py` checks these too.
LARGEST = ["efficientformer", "davit", "inception_resnet_v2", "inception_v4", "mobilenetv5", "nasnet", "pnasnet"]
LARGE = ["cait", "convmixer", "crossvit", "densenet", "efficientformer_v2", "focalnet", "inception_v3", "maxxvit"]
LARGE += ["nextvit", "selecsls", "tresnet", "vision_transformer_sam"]
LEFT_OUT = {*REFUSED, *NOT_RUN, *(f"timm/{family}" for family in LARGEST)}
DEALT = [name for name, row in ROWS.items() if not row.extra and name not in LEFT_OUT]
SWEPT = [
    # Dealt out first, so that a family keeps its mode whatever else is left out.
    (name, checks.MODES[i % len(checks.MODES)])
    for i, name in enumerate(DEALT)
    if name not in {f"timm/{family}" for family in LARGE}
]


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "mode"), SWEPT)
def test_every_architecture(name, mode):
    """Families and classes, the modes in turn, which halves the time; `architecture_coverage.py` takes both."""
    assert failures(check_row(ROWS[name], modes=(mode,), stock=False)) == []


def test_the_documented_table_is_of_these_rows():
    """Only totals: the figures of a row change with the machine."""
    text = (ROOT / "docs" / "coverage.md").read_text()
    rows = [row for row in ROWS.values() if not row.extra]
    families = sum(row.library == "timm" for row in rows)
    assert f"| timm families | {families} | {families} | 0 | 0 | 0 |" in text
    keys = {row.family for row in rows if row.library == "transformers"}
    passing = len(keys - {name.split("/")[1] for name in (*REFUSED, *NOT_RUN)})
    assert f"Of the {len(keys)} keys of transformers' mapping, {passing} pass" in text
