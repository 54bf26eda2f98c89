"""Mistakes of users that a type checker must see: each line with a comment `E` gives this error, no other."""

import torch

import autolora_hf
from autolora_hf import (
    PGD,
    AutoLoraConfig,
    AutoLoraTrainingArguments,
    ThreatModel,
    evaluate_robustness,
    get_autolora_model,
    load_autolora_model,
)


print(autolora_hf.nothing)  # E: attr-defined
ThreatModel("linfinity", 8 / 255)  # E: arg-type
AutoLoraConfig(mode="half")  # E: arg-type
PGD(loss="hinge")  # E: arg-type
PGD(8 / 255)  # E: arg-type
AutoLoraTrainingArguments("out", eps="8/255")  # E: arg-type
AutoLoraTrainingArguments("out", epsilon=8 / 255)  # E: call-arg
model = get_autolora_model("resnet18", classes=10)  # E: call-arg
model.pixel_space()(torch.zeros(1)).probabilities()  # E: attr-defined
model.pixel_space()("image.png")  # E: arg-type
load_autolora_model(3)  # E: arg-type
report = evaluate_robustness(model, [], "autoattack")  # E: arg-type
print(report.robust + 1)  # E: operator
print(report.accuracy)  # E: attr-defined
