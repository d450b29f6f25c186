"""Arguments that several verbs share, each described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_OP = "depthwise"
MODEL_HELP = (
    "torchvision:NAME, timm:NAME, package.module:factory, a pickled module (.pt), an exported program (.pt2), "
    "or a student that convert wrote."
)
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Weights = Annotated[
    str | None,
    typer.Option(metavar="FILE|DEFAULT", help="Weights for a named architecture; without, they are random."),
]
WeightsKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="Which entry of a checkpoint to take: state_dict, or callbacks.EMA.state where it is nested.",
    ),
]
WeightsPrefix = Annotated[
    str | None,
    typer.Option(metavar="PREFIX", help="What stands before the network's own names in the weights, such as model."),
]
ModelArg = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Argument for the architecture: num_classes=10. Repeatable."),
]
Trust = Annotated[bool, typer.Option("--trust", help="Run whatever code a file brings with it.")]
TrustModule = Annotated[
    list[str] | None,
    typer.Option(metavar="PREFIX", help="Admit this package's modules from files, and its values. Repeatable."),
]
InputShape = Annotated[
    str | None,
    typer.Option(metavar="N,C,H,W", help="Shape of an input, such as 1,3,224,224, where it is not known."),
]
To = Annotated[str, typer.Option("--to", metavar="OP", help="What convolutions become; see `convsurgeon ops`.")]
ToOrDefault = Annotated[
    str | None,
    typer.Option(
        "--to",
        metavar="OP",
        help="What convolutions become, depthwise if nothing is said; none leaves all but --pointwise and --map.",
    ),
]
Pointwise = Annotated[
    str | None,
    typer.Option("--pointwise", metavar="OP", help="What 1x1 convolutions become, which are kept otherwise: lowrank."),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Leave these convolutions alone: a glob over names. Repeatable."),
]
Only = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Convert only these: a glob over names. Repeatable."),
]
Map = Annotated[
    list[str] | None,
    typer.Option("--map", metavar="PATTERN=OP", help="Convert these to another op; the last match wins. Repeatable."),
]
Option = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="Option of the op: groups=8, or group.groups=8 among several."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="digits, fashion-mnist, cifar10, cifar100, imagefolder:DIR, or package.module:factory.",
    ),
]
DataRoot = Annotated[Path | None, typer.Option(help="Where downloaded data sets lie; ./data by default.")]
Size = Annotated[str | None, typer.Option(metavar="H[,W]", help="Image size; by default what the model's source says.")]
Mean = Annotated[str | None, typer.Option(metavar="M[,M,M]", help="Mean per channel, in 0..1.")]
Std = Annotated[str | None, typer.Option(metavar="S[,S,S]", help="Standard deviation per channel, in 0..1.")]
Color = Annotated[str | None, typer.Option(metavar="rgb|gray", help="Color of the images.")]
Crop = Annotated[
    str | None,
    typer.Option(metavar="SHARE|none", help="Share of the resized image that is kept at its centre, such as 0.875."),
]
Interpolation = Annotated[str | None, typer.Option(metavar="bilinear|bicubic|...", help="How images are resized.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of weights, order, augmentation and noise.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Processor threads; all cores by default.")]
LimitBatches = Annotated[int | None, typer.Option(metavar="N", min=1, help="Stop every pass after N batches.")]
