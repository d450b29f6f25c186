"""Which networks of torchvision and timm become an ONNX student that onnxruntime agrees with.

    python docs/benchmarks/onnx_zoo.py run             # go on where it stopped; about an hour on one core
    python docs/benchmarks/onnx_zoo.py run 'timm:*'    # only these names; also --failed, --stale, --again
    python docs/benchmarks/onnx_zoo.py report          # only write onnx_zoo.md, from the rows that are there

Every classifier and segmenter that torchvision registers, and a fixed sample of timm: random weights, batch-norm
statistics settled, the dense network exported, rewritten to `depthwise`, settled again, the student exported.
Both exports compare onnxruntime with PyTorch and raise where they disagree. A row is appended to
onnx_zoo.jsonl as soon as it is there, so the run can be stopped at any time. Each model has a process of its own,
forked from this one, with a time and a memory limit: whatever kills it is a row too.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import multiprocessing
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import onnx
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import convsurgeon as cs
from convsurgeon import surgery
from convsurgeon.errors import NothingToConvertError, one_line
from convsurgeon.files import append_line, write_text

sys.path.insert(0, str(Path(__file__).parent))
import onnx_zoo_report

Row = dict[str, Any]
HERE = Path(__file__).parent
OP = "depthwise"
SIZES = (64, 96, 128, 160, 192, 224, 240, 256, 299, 384)  # pixels; the first that the model takes
BATCH, BATCHES = (
    32,
    4,
)  # what settles the batch norms; after 16 images, others sent deep networks' outputs into thousands
# small members of forty families with standard convolutions, and four whose families have none but the stem
TIMM = """
    resnet18 resnext26ts res2net50_14w_8s seresnet18 resnest14d skresnet18 resnetv2_50x1_bit resnetv2_50d_gn
    resnetv2_50d_evos dm_nfnet_f0 eca_nfnet_l0 nf_resnet26 efficientnet_es tf_efficientnetv2_b0 tf_efficientnet_es
    mobilenet_edgetpu_v2_xs mobilenetv4_conv_small_035 densenetblur121d hrnet_w18_small vgg11_bn dla34 cspresnet50
    cs3darknet_focus_s inception_v3 inception_v4 xception41 repvgg_a0 convnext_atto edgenext_xx_small mobilevit_xxs
    efficientformer_l1 levit_128s pvt_v2_b0 poolformer_s12 selecsls42b hgnetv2_b0 gernet_s tresnet_m botnet26t_256
    ese_vovnet19b_slim
    regnety_002 ghostnet_050 fastvit_t8 mobileone_s0
"""


def names() -> list[str]:
    """Return every classifier and segmenter of torchvision, and the sample of timm, as `library:name`."""
    models = torchvision.models
    registered = [name for part in (models, models.segmentation) for name in models.list_models(module=part)]
    return [f"timm:{name}" for name in TIMM.split()] + [f"torchvision:{name}" for name in registered]


def build(name: str) -> nn.Module:
    """Return the network with random weights, none of its parameters a constant, in evaluation mode."""
    library, _, short = name.partition(":")
    torch.manual_seed(0)
    if library == "timm":
        model = timm.create_model(short, pretrained=False)
    else:
        segmenter = short in torchvision.models.list_models(module=torchvision.models.segmentation)
        model = torchvision.models.get_model(short, weights=None, **{"weights_backbone": None} if segmenter else {})
    roughen(model)
    return model.eval()


@torch.no_grad()
def roughen(model: nn.Module) -> None:
    """Add noise to constant parameters: a norm or a branch scaled by zero would hide whatever lies behind it.

    Little of it to biases: where no norm brings the activations back to size, they would drown the picture.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() and parameter.min() == parameter.max():
            fan = parameter.numel() // parameter.shape[0] if parameter.dim() > 1 else 1
            scale = 0.03 if name.endswith("bias") else 0.3
            parameter.add_(torch.randn(parameter.shape), alpha=scale * float(fan) ** -0.5)


@torch.no_grad()
def smallest_input(model: nn.Module) -> int:
    """Return the first of `SIZES` that the network takes, in pixels."""
    problem = ""
    for size in SIZES:
        try:
            model(torch.randn(2, 3, size, size))
        except Exception as error:  # whatever a foreign forward raises
            problem = one_line(error)
        else:
            return size
    raise ValueError(f"takes no input of {', '.join(map(str, SIZES))} pixels: {problem}")


@torch.no_grad()
def settle(model: nn.Module, size: int) -> None:
    """Set every batch norm's statistics to those of random images; nothing else is in training mode.

    A network without any norm has its layers scaled instead, or nothing of the image would come through.
    """
    if not any("norm" in type(module).__name__.lower() for module in model.modules()):
        scale_layers(model, size)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.training = True
    for seed in range(BATCHES if norms else 0):
        model(torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(seed)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum, norm.training = momentum, False


@torch.no_grad()
def scale_layers(model: nn.Module, size: int) -> None:
    """Scale every convolution and linear layer to outputs of standard deviation 1, in the order of their calls."""

    def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        deviation = output.std()
        for parameter in module.parameters():
            parameter.div_(deviation)
        return output / deviation

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    handles = [module.register_forward_hook(scale) for module in layers]
    model(torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0)))
    for handle in handles:
        handle.remove()


@torch.no_grad()
def varies(model: nn.Module, size: int) -> float:
    """Return how much two random images differ in the outputs, as a part of the largest; least over the outputs.

    A network that answers the same whatever it sees would agree with anything.
    """
    outputs = pytree.tree_leaves(model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(9))))
    return min(float((out[0] - out[1]).abs().max() / out.abs().max()) for out in outputs if isinstance(out, Tensor))


def make_student(model: nn.Module, row: Row) -> nn.Module:
    """Rewrite the network; where nothing is to be converted by default, ask for its stem, and say so in the row."""
    try:
        plan = surgery.plan(model, OP)
    except NothingToConvertError as error:
        row["nothing"] = str(error)
        stems = [site.fqn for site in surgery.survey(model).sites if site.stem]
        plan = surgery.plan(model, OP, mapping=dict.fromkeys(stems, OP))
    row["converted"], row["convolutions"] = len(plan.converted), len(plan.decisions)
    return cs.rewrite(model, plan)


def deliver(model: nn.Module, size: int) -> Row:
    """Settle and export one network; return what came of it."""
    started = time.perf_counter()
    settle(model, size)
    found: Row = {"varies": varies(model, size)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            delivery = cs.export(model, Path(folder) / "a.onnx", example_inputs=torch.zeros(1, 3, size, size))
        except Exception as error:  # an ExportError is an outcome; anything else is a crash, and a row as well
            found["error"] = one_line(error)
        else:
            nodes = onnx.load(delivery.path).graph.node
            found |= {"max_rel": delivery.parity.max_rel, "batch_norms_left": delivery.batch_norms_left}
            found |= {"nodes": len(nodes), "bytes": delivery.bytes}
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def examine(name: str, tell: Callable[[Row], None]) -> None:
    """Take one network through everything; `tell` hears the row as it grows."""
    row: Row = {"stage": "build"}
    tell(row)
    model = build(name)
    row["params"] = sum(parameter.numel() for parameter in model.parameters())
    row["size"] = size = smallest_input(model)
    row["stage"] = "dense"
    tell(row)
    row["dense"] = deliver(model, size)
    row["stage"] = "rewrite"
    tell(row)
    try:
        student = make_student(model, row)
    except NothingToConvertError:
        row["stage"] = "done"
        return tell(row)
    del model
    row["stage"] = "student"
    tell(row)
    row["student"] = deliver(student, size)
    row["stage"] = "done"
    return tell(row)


def work(send: Connection, name: str, memory: int) -> None:
    """Be the worker: limit the memory, examine, and send an unforeseen error as part of the row."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    warnings.simplefilter("ignore")
    try:
        examine(name, lambda row: send.send(dict(row)))
    except Exception as error:
        send.send({"error": one_line(error)})


def run_one(name: str, *, seconds: float, memory: int, target: Callable[..., None] = work) -> Row:
    """Return the row of one model, from a process of its own."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(send, name, memory), daemon=True)
    started = time.monotonic()
    process.start()
    send.close()
    row: Row = {"name": name, "code": code_version(), "stage": "start"}
    try:
        while receive.poll(max(0.0, started + seconds - time.monotonic())):
            row |= receive.recv()
        row["error"] = f"took more than {seconds:.0f} s"
        process.kill()
    except EOFError:  # the worker is gone, by itself or otherwise
        pass
    process.join()
    if process.exitcode and "error" not in row:
        row["error"] = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"exit {process.exitcode}"
    return {**row, "seconds": round(time.monotonic() - started, 1)}


def code_version() -> str:
    """Return a hash of the code that decides what a row says."""
    digest = hashlib.sha256(f"{torch.__version__} {onnx.__version__}".encode())
    root = Path(cs.__file__).parent
    for room in ("factorization", "ops", "surgery", "delivery"):
        for path in sorted((root / room).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def read_rows(path: Path) -> dict[str, Row]:
    """Return the latest row of each model; a line that a kill cut short is left out."""
    rows: dict[str, Row] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.endswith("}"):
            row = json.loads(line)
            rows[row["name"]] = row
    return rows


def chosen(arguments: argparse.Namespace, globs: Sequence[str]) -> Iterator[str]:
    """Yield the names that are to be run now."""
    code = code_version()
    rows = read_rows(arguments.rows)
    for name in names():
        if globs and not any(fnmatch.fnmatchcase(name, glob) for glob in globs):
            continue
        row = rows.get(name)
        failed = row is not None and not onnx_zoo_report.good(row)
        stale = row is not None and row["code"] != code
        if row is None or arguments.again or (arguments.failed and failed) or (arguments.stale and stale):
            yield name


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "report"))
    parser.add_argument("names", nargs="*", help="globs, as 'timm:res*'; by default all")
    parser.add_argument("--rows", type=Path, default=HERE / "onnx_zoo.jsonl")
    parser.add_argument("--table", type=Path, default=HERE / "onnx_zoo.md")
    parser.add_argument("--failed", action="store_true", help="the failed rows again")
    parser.add_argument("--stale", action="store_true", help="again what another version of the code made")
    parser.add_argument("--again", action="store_true", help="every row again")
    parser.add_argument("--seconds", type=float, default=1800, help="time limit of a model")
    parser.add_argument("--gigabytes", type=float, default=14, help="memory limit of a model, 10^9 bytes")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    if arguments.verb == "run":
        for name in list(chosen(arguments, arguments.names)):
            row = run_one(name, seconds=arguments.seconds, memory=int(arguments.gigabytes * 1e9))
            append_line(arguments.rows, json.dumps(row, ensure_ascii=False))
            print(f"{name}: {onnx_zoo_report.outcome(row)}, {row['seconds']} s", flush=True)
    write_text(arguments.table, onnx_zoo_report.render(read_rows(arguments.rows), names()))


if __name__ == "__main__":
    main()
