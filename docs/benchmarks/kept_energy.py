"""How much of a trained network's kernels each op keeps when it starts.

    python docs/benchmarks/kept_energy.py

converts the teachers of `calibration.py`, which trains them where they are not there, with each op's default
options, and prints the share of the kernels' energy (squared Frobenius norm, all converted convolutions
together) that the student's dense kernels keep: 1 less their squared distance. It says how far an op starts from
the network, and not how it ends.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from calibration import TEACHERS, teacher_of
from torch import nn

import convsurgeon as cs
from convsurgeon.data import load_data
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.surgery import dense_kernel


@torch.no_grad()
def kept_energy(network: nn.Module, op: str) -> float:
    """Return the share (0..1) of the converted kernels' energy that is kept."""
    lost = energy = 0.0
    for fqn, module in cs.rewrite(network, op).named_modules():
        if isinstance(module, AbstractCheapConv):
            kernel = dense_kernel(network, fqn)
            assert kernel is not None
            lost += float((kernel - module.as_dense()).double().square().sum())
            energy += float(kernel.double().square().sum())
    return 1 - lost / energy


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/fashion-mnist"), help="where the teachers are kept")
    parser.add_argument("--data-root", default="data")
    args = parser.parse_args()
    data = load_data("fashion-mnist", root=args.data_root)
    teachers = {name: teacher_of(name, data, args.runs) for name in TEACHERS}
    print("| op | " + " | ".join(teachers) + " |")
    print("|---" * (1 + len(teachers)) + "|")
    for op in cs.ops.names():
        print(f"| {op} | " + " | ".join(f"{100 * kept_energy(net, op):.0f} %" for net in teachers.values()) + " |")


if __name__ == "__main__":
    main()
