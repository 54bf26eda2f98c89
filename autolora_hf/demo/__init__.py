"""A page in which a visitor attacks a model and sees what it answers: `autolora demo`.

The models, the attack and the files of visitors need no Gradio; [`launch`] alone imports it.
"""

from .attack import Answer, Attacked, CurvePoint, Outcome, answers_by_radius, attack_image
from .launch import launch
from .models import Classifier, Demo, open_demo
from .space import write_space
from .uploads import read_upload


__all__ = [
    "Answer",
    "Attacked",
    "Classifier",
    "CurvePoint",
    "Demo",
    "Outcome",
    "answers_by_radius",
    "attack_image",
    "launch",
    "open_demo",
    "read_upload",
    "write_space",
]
