"""What the commands share of their output."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping

from ..evaluation import RobustnessReport


def show_progress(is_main_process: bool = True) -> None:
    """Sends the package's own messages to the terminal and silences the chatter of the libraries below.

    Of several processes all but the main one are silent up to warnings: what is to be said is said once.
    """
    if not is_main_process:
        logging.disable(logging.WARNING)
        return
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("autolora_hf").setLevel(logging.INFO)
    # PEFT asks transformers for it by the old name, which is nothing that a user could change.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # It prints its own messages; through the root logger each would appear twice.
    logging.getLogger("huggingface_hub").propagate = False
    # At "error" the Trainer would hide its progress bars too.
    transformers_logging.set_verbosity_warning()


def summary_table(reports: Mapping[str, RobustnessReport]) -> str:
    """One row a report: natural and robust accuracy with their intervals, in per cent."""
    width = max(map(len, reports))
    lines = [f"{'':<{width}}  {'images':>6}  {'natural accuracy':>22}  {'robust accuracy':>22}"]
    for name, report in reports.items():
        cells = (
            f"{100 * accuracy.value:.1f} [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"
            for accuracy in (report.natural, report.robust)
        )
        count = len(report.sample_indices)
        lines.append(f"{name:<{width}}  {count:>6}  " + "  ".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)
