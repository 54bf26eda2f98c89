"""The files of `scripts/` as modules."""

import importlib.util
import sys
from pathlib import Path


SCRIPTS = Path(__file__).parents[1] / "scripts"


def load(script, folder=SCRIPTS):
    """A script as a module; the folder does not go on the path, where a script may hide a package of its name."""
    spec = importlib.util.spec_from_file_location(script, folder / f"{script}.py")
    sys.modules[script] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
