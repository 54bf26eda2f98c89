"""`autolora demo`."""

from __future__ import annotations

import argparse

from .model import add_model_arguments, check_device
from .parser import CommandParser
from .result import CommandResult


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="autolora demo",
        description=(
            "Serves a page in which a visitor attacks an image and sees what the robust model and a natural one say. "
            'Needs pip install "autolora-hf[demo]"; nothing is sent anywhere. With --space, writes the folder of a '
            "Space for the Hugging Face Hub instead."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--natural",
        metavar="MODEL",
        help="naturally trained model to compare with: a saved model, or a checkpoint of timm or transformers with "
        "the same classes; the one that the quickstart leaves in the folder of its model when left out",
    )
    parser.add_argument(
        "--examples",
        metavar="DIR",
        help="folder of images to choose from; 'examples' in the folder of the model when left out, or the digits of "
        "the quickstart for a model of those",
    )
    parser.add_argument("--steps", type=int, default=20, help="steps of the attack (PGD)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the attack")
    parser.add_argument("--device", help="where the models run, e.g. cuda; the CPU when left out")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for other machines")
    parser.add_argument("--port", type=int, help="port to listen at; the first free one from 7860 when left out")
    parser.add_argument("--share", action="store_true", help="make a public link through Gradio's servers")
    parser.add_argument(
        "--space", metavar="DIR", help="write the folder of a Hub Space with app.py, and serve nothing"
    )
    return parser


def run(argv: list[str]) -> CommandResult:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.space is not None and args.base_model is not None:
        parser.error("--space cannot take --base-model along: a Space finds the backbone by its recorded name")
    check_device(parser, args.device)

    # Imported late: they take seconds, and Gradio may be missing, which is said before the models are loaded.
    from ..demo.launch import import_gradio, launch
    from ..demo.models import open_demo
    from ..demo.space import write_space
    from .display import show_progress

    import_gradio()
    show_progress()
    source = {"revision": args.revision, "token": args.token}
    demo = open_demo(
        args.model,
        natural=args.natural,
        examples=args.examples,
        steps=args.steps,
        seed=args.seed,
        device=args.device,
        base_model=args.base_model,
        **source,
    )
    if args.space is None:
        launch(demo, host=args.host, port=args.port, share=args.share)
        return CommandResult({"model": args.model, "files": {"space": None}})
    write_space(demo, args.model, args.space, natural=args.natural, **source)
    print(
        f"Wrote {args.space}/.\nLook at it first: python {args.space}/app.py\n"
        f"Publish it:       hf repos create NAME/SPACE --type space --sdk gradio\n"
        f"                  hf upload NAME/SPACE {args.space} . --type space"
    )
    return CommandResult({"model": args.model, "files": {"space": args.space}})
