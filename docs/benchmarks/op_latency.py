"""How long one convolution takes as each op: onnxruntime, fp32, one thread, timed in turns.

    python docs/benchmarks/op_latency.py --channels 128 --size 28 [--stride 2] [--kernel 1] [--ranks lowrank=16,32 ...]

Takes some seconds. `partial` is timed in two more forms, which are why it is built as it is: with the
untouched channels as one-hot kernels of a group convolution, and as a sum of two 1x1 instead of one
1x1 behind a concatenation.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

import convsurgeon as cs
from convsurgeon.spec import ConvSpec


class OneHot(nn.Module):
    """`partial` as a group convolution in which all groups but the first hand on what they get."""

    def __init__(self, op: nn.Module) -> None:
        super().__init__()
        channels, every = op.spatial.in_channels, op.in_channels
        groups = every // channels
        self.spatial = nn.Conv2d(every, every, op.kernel_size, op.stride, op.padding, groups=groups, bias=False)
        self.pointwise = op.pointwise
        with torch.no_grad():
            self.spatial.weight.zero_()
            self.spatial.weight[:channels] = op.spatial.weight
            for channel in range(channels, every):
                self.spatial.weight[channel, channel % channels, op.kernel_size[0] // 2, op.kernel_size[1] // 2] = 1

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, I, H, W)` to `(B, O, P, Q)`."""
        return self.pointwise(self.spatial(x))


class Summed(nn.Module):
    """`partial` with a 1x1 for either part, added up."""

    def __init__(self, op: nn.Module) -> None:
        super().__init__()
        self.channels, self.spatial, self.center = op.spatial.in_channels, op.spatial, op.center
        self.first = nn.Conv2d(self.channels, op.out_channels, 1)
        self.others = nn.Conv2d(op.in_channels - self.channels, op.out_channels, 1, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(op.pointwise.weight[:, : self.channels])
            self.others.weight.copy_(op.pointwise.weight[:, self.channels :])
            self.first.bias.copy_(op.pointwise.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, I, H, W)` to `(B, O, P, Q)`."""
        first, others = x[:, : self.channels], x[:, self.channels :]
        return self.first(self.spatial(first)) + self.others(self.center(others))


def with_ranks(dense: nn.Conv2d, ranks: list[str]) -> dict[str, nn.Module]:
    """Return the dense convolution and ops with ranks, each `lowrank=16,32`."""
    forms: dict[str, nn.Module] = {"dense": dense}
    for op, _, numbers in (text.partition("=") for text in ranks):
        forms |= {f"{op} rank={rank}": cs.ops.get(op).from_conv(dense, {"rank": rank}) for rank in numbers.split(",")}
    return forms


def forms_of(dense: nn.Conv2d) -> dict[str, nn.Module]:
    """Return the dense convolution and every op that takes it, by name."""
    spec = ConvSpec.from_conv(dense)
    forms: dict[str, nn.Module] = {"dense": dense}
    for name in cs.ops.names():
        op = cs.ops.get(name)
        if op.why_not(spec, op.fit_options(spec, op.parse_options())) is None:
            forms[name] = op.from_conv(dense)
    if "partial" in forms:
        forms |= {"partial, one-hot": OneHot(forms["partial"]), "partial, summed": Summed(forms["partial"])}
    return forms


def time_in_turns(forms: dict[str, nn.Module], image: Tensor, rounds: int) -> dict[str, list[float]]:
    """Return milliseconds by name, one for each round."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    sessions = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, form in forms.items():
            path = Path(folder) / "form.onnx"
            cs.export(form.eval(), path, example_inputs=image, force=True)
            sessions[name] = onnxruntime.InferenceSession(path.read_bytes(), settings)
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, session in sessions.items():
            inputs = {session.get_inputs()[0].name: image.numpy()}
            session.run(None, inputs)
            started = time.perf_counter()
            session.run(None, inputs)
            times[name].append(1e3 * (time.perf_counter() - started))
    return times


def main() -> None:
    """Print one table row for each form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--kernel", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--ranks", nargs="+", default=[], help="time these instead, each as lowrank=16,32")
    said = parser.parse_args()
    torch.manual_seed(0)
    dense = nn.Conv2d(said.channels, said.channels, said.kernel, said.stride, said.kernel // 2)
    forms = with_ranks(dense, said.ranks) if said.ranks else forms_of(dense)
    image = torch.randn(1, said.channels, said.size, said.size)
    expected = ConvSpec.from_conv(dense).macs(said.size, said.size)
    times = {name: statistics.quantiles(ms, n=10) for name, ms in time_in_turns(forms, image, said.rounds).items()}
    print(f"{ConvSpec.from_conv(dense)}, {said.size}x{said.size}\n")
    print("| op | MACs | ms, fastest tenth (median) | faster |\n|---|--:|--:|--:|")
    for name, (fast, *_, median, _, _, _, _) in times.items():
        form, fewer = forms[name], ""
        if isinstance(form, cs.ops.AbstractCheapConv):
            fewer = f"{expected / form.macs(form.spec, said.size, said.size, form.options):.1f}x fewer"
        print(f"| {name} | {fewer} | {fast:.3f} ({median:.3f}) | {times['dense'][0] / fast:.2f}x |")


if __name__ == "__main__":
    main()
