"""What a calibration costs where images and networks are large: ResNet-18 at 224 px, closed form to fit.

    python docs/benchmarks/calibration_cost.py depthwise

Random weights and smoothed noise for images: what is measured is time and memory, in a process of its own.
"""

from __future__ import annotations

import argparse

import torch
import torchvision

import convsurgeon as cs
from convsurgeon.calibration import calibrate_and_report
from convsurgeon.progress import Progress


def main() -> None:
    """Convert, fit, and print seconds and the process's peak memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", help="what the convolutions become")
    parser.add_argument("--network", default="resnet18", help="a name of torchvision's")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    net = torchvision.models.get_model(args.network).eval()
    noise = torch.randn(args.images, 3, args.size, args.size)
    images = 3 * torch.nn.functional.avg_pool2d(noise, 5, stride=1, padding=2)
    student = cs.rewrite(net, args.op)

    def tell(event: Progress) -> None:
        figures = "  ".join(f"{name} {value:.3g}" for name, value in event.figures.items())
        print(f"{event.stage} {event.done}/{event.total or '–'}  {event.message or figures}", flush=True)

    result = calibrate_and_report(net, student, images, polish=False, limit=args.images, report=tell)
    print(f"{args.network} {args.op}: {result.seconds:.0f} s, peak {result.peak_memory / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
