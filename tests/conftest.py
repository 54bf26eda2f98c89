"""Settings for every test: no network, one thread, a fixed seed, quiet libraries."""

import os


# Read by huggingface_hub and transformers when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import pytest
import torch
import transformers


torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
