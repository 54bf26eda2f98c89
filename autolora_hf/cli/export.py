"""`autolora export`."""

from __future__ import annotations

import argparse

from ..hub.export import OnnxExport, export_onnx
from ..saving import save_plain
from .display import show_progress
from .model import add_model_arguments, open_model
from .parser import CommandParser
from .result import CommandResult


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="autolora export",
        description="Writes a saved model for use without this package: as one ONNX file that takes pixels in [0, 1], "
        "or as a plain timm or transformers checkpoint without adapters.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument("output", help="file to write with --format onnx, folder with --format checkpoint")
    parser.add_argument("--format", choices=["onnx", "checkpoint"], default="onnx", help="what to write")
    parser.add_argument(
        "--route", choices=["robust", "natural"], default="robust", help="route to export; natural with onnx only"
    )
    parser.add_argument("--opset", type=int, help="version of the ONNX operators; torch's choice when left out")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest difference of an ONNX logit, relative to the largest"
    )
    return parser


def run(argv: list[str]) -> CommandResult:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.format == "checkpoint" and args.route != "robust":
        parser.error("--route natural is possible with --format onnx only: a checkpoint holds the robust route")

    show_progress()
    model = open_model(args)
    if args.format == "checkpoint":
        save_plain(model, args.output)
        print(f"Wrote a plain checkpoint to {args.output}")
        return _result(args, None)
    export = export_onnx(model, args.output, route=args.route, opset=args.opset, tolerance=args.tolerance)
    print(
        f"Wrote {export.path} ({export.bytes / 1e6:.1f} MB, opset {export.opset}). Its logits differ from the model's "
        f"by at most {export.max_difference:.1e} of the largest, on {export.images_checked} images in onnxruntime."
    )
    return _result(args, export)


def _result(args: argparse.Namespace, export: OnnxExport | None) -> CommandResult:
    names = ("opset", "bytes", "max_difference", "images_checked")
    files = {kind: args.output if kind == args.format else None for kind in ("onnx", "checkpoint")}
    checked = {name: getattr(export, name, None) for name in names}
    return CommandResult({"format": args.format, "route": args.route, **checked, "files": files})
