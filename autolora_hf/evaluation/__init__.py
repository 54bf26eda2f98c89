from .figures import adversarial_examples_figure, training_curves_figure
from .report import Accuracy, AttackResult, RobustnessReport
from .robustness import evaluate_robustness
from .view import AttackView


__all__ = [
    "Accuracy",
    "AttackResult",
    "AttackView",
    "RobustnessReport",
    "adversarial_examples_figure",
    "evaluate_robustness",
    "training_curves_figure",
]
