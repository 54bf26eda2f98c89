"""Arguments that cannot work, and output folders that cannot be made: refused before anything is trained."""

import pytest
from test_trainer import arguments, pictures
from tiny_models import MODELS

from autolora_hf import AutoLoraTrainer
from autolora_hf.layout import natural_adapter, robust_adapter


@pytest.mark.parametrize(
    "name", ["per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"]
)
@pytest.mark.parametrize("value", [0, -1])
def test_batch_sizes_are_positive(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got {value}"):
        arguments(tmp_path, **{name: value})


def test_steps_of_the_command_line_are_quoted_as_they_were_given(tmp_path):
    """There they are a float, since below 1 they are a share."""
    with pytest.raises(ValueError, match="`warmup_steps=10` would have no effect"):
        arguments(tmp_path, warmup_steps=10.0)


@pytest.mark.parametrize("below", [False, True])
def test_an_output_folder_that_cannot_be_created(below, tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    path = file / "run" if below else file
    with pytest.raises(OSError, match=r"`output_dir` '.*' cannot be created: .*Choose a folder") as error:
        AutoLoraTrainer(MODELS["hf_vit"].adapted(num_classes=3), arguments(path), train_dataset=pictures())
    assert str(error.value).startswith("`output_dir`")
    assert file.read_text() == "kept"


def test_the_layers_of_an_adapter_are_written_in_order():
    """PEFT's own set has another order in every process."""
    model = MODELS["hf_vit"].adapted(num_classes=3, mode="adapter")
    for adapter in (robust_adapter, natural_adapter):
        _, config = adapter(model)
        assert isinstance(config.target_modules, list)
        assert len(config.target_modules) > 2
        assert config.target_modules == sorted(config.target_modules) == config.to_dict()["target_modules"]
