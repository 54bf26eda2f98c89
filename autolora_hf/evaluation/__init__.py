from .accuracy import Accuracy
from .figures import adversarial_examples_figure, training_curves_figure
from .report import AttackResult, RobustnessReport
from .robustness import evaluate_robustness
from .view import AttackView
from .zero_shot import ZeroShotClassifier, class_embeddings


__all__ = [
    "Accuracy",
    "AttackResult",
    "AttackView",
    "RobustnessReport",
    "ZeroShotClassifier",
    "adversarial_examples_figure",
    "class_embeddings",
    "evaluate_robustness",
    "training_curves_figure",
]
