"""Where the commands get a saved model from, and where it runs."""

from __future__ import annotations

import argparse

import torch

from ..factory import load_autolora_model
from ..modeling import AutoLoraModel


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The saved model and where it is found."""
    parser.add_argument("model", help="folder or Hub repository of a saved model")
    parser.add_argument("--base-model", help="backbone of an adapter, if it is not found by the recorded name")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--token", help="token for a private Hub repository; the one you are logged in with otherwise")


def check_device(parser: argparse.ArgumentParser, device: str | None) -> None:
    """Ends the program as wrong usage if torch cannot use the device that `--device` names."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {device} cannot be used: {str(error).splitlines()[0]}")


def open_model(args: argparse.Namespace) -> AutoLoraModel:
    """The model that the options of [`add_model_arguments`] name."""
    return load_autolora_model(args.model, base_model=args.base_model, revision=args.revision, token=args.token)
