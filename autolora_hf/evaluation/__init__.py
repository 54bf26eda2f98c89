from .figures import adversarial_examples_figure, training_curves_figure
from .report import Accuracy, AttackResult, RobustnessReport
from .robustness import AttackView, evaluate_robustness


__all__ = [
    "Accuracy",
    "AttackResult",
    "AttackView",
    "RobustnessReport",
    "adversarial_examples_figure",
    "evaluate_robustness",
    "training_curves_figure",
]
