"""`autolora convert`."""

from __future__ import annotations

import shlex

from ..initializers.checkpoint_keys import KINDS, NORM_SETS, NORMALIZATIONS
from ..initializers.conversion import HEADS, REPORT, convert_checkpoint, save_conversion
from .parser import CommandParser
from .result import CommandResult


# Of what `conversion.json` has.
_SHOWN = (
    "kind",
    "architecture",
    "norm_set",
    "image_size",
    "normalization",
    "num_classes",
    "head",
    "tensors_used",
    "dropped",
    "notes",
)


def build_parser() -> CommandParser:
    kinds = "; ".join(f"{name}: {kind.title}" for name, kind in KINDS.items())
    parser = CommandParser(
        prog="autolora convert",
        description="Makes a timm checkpoint folder of a robust checkpoint of the field, from a file that you have "
        "downloaded. Nothing in the file is run. Every weight is used, or dropped for a reason that is written down.",
        epilog=f"Kinds: {kinds}.",
    )
    parser.add_argument("source", help="file of safetensors or of torch.save")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--kind", choices=list(KINDS), help="where the file is from (default: told from its names)")
    parser.add_argument("--architecture", help="timm model it is of (default: the ResNet that has these weights)")
    parser.add_argument("--num-classes", type=int, help="classes of the new model; needed where its head is new")
    parser.add_argument(
        "--norm-set", choices=NORM_SETS, default="adversarial", help="of two sets of norms (default: adversarial)"
    )
    parser.add_argument(
        "--head",
        choices=HEADS,
        default="auto",
        help="keep the classifier of the file, or make a new one that is zero (default: keep one of real classes)",
    )
    parser.add_argument(
        "--normalization",
        choices=list(NORMALIZATIONS),
        help="input normalisation of the network, where its file does not say",
    )
    return parser


def run(argv: list[str]) -> CommandResult:
    args = build_parser().parse_args(argv)
    conversion = convert_checkpoint(
        args.source,
        args.architecture,
        args.kind,
        norm_set=args.norm_set,
        num_classes=args.num_classes,
        head=args.head,
        normalization=args.normalization,
    )
    folder, report = save_conversion(conversion, args.output), conversion.report
    height, width = report["image_size"]
    normalization = report["normalization"]
    norms = f" with its {report['norm_set']} norms" if report["norm_set"] else ""
    print(f"{args.source}: {KINDS[report['kind']].title}, a {report['architecture']}{norms}")
    print(f"  images         {height} x {width}")
    print(f"  normalisation  mean {normalization['mean']}, std {normalization['std']} ({normalization['from']})")
    print(f"  head           {report['num_classes']} classes, {report['head']}")
    print(f"  weights        {report['tensors_used']} tensors used")
    for entry in report["dropped"]:
        print(f"  left out       {len(entry['names'])}: {entry['reason']}")
    for note in report["notes"]:
        print(f"  note           {note}")
    print(f"Wrote {folder}; every name and the file's SHA-256 are in {REPORT}. Go on with\n")
    print(f"  autolora train --model {shlex.quote(str(folder))} --train-data FOLDER --output-dir OUTPUT")
    files = {"checkpoint": str(folder), "report": str(folder / REPORT)}
    return CommandResult({name: report[name] for name in _SHOWN} | {"files": files})
