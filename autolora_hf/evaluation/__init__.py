from .accuracy import Accuracy
from .examples import examples_figure
from .figures import adversarial_examples_figure, training_curves_figure
from .html_report import html_report
from .report import AttackResult, RobustnessReport
from .robustness import evaluate_robustness
from .transfer import TransferAttack
from .view import AttackView
from .zero_shot import ZeroShotClassifier, class_embeddings


__all__ = [
    "Accuracy",
    "AttackResult",
    "AttackView",
    "RobustnessReport",
    "TransferAttack",
    "ZeroShotClassifier",
    "adversarial_examples_figure",
    "class_embeddings",
    "evaluate_robustness",
    "examples_figure",
    "html_report",
    "training_curves_figure",
]
