"""The laws of what happens to an op: refused, copied, saved, traced, exported."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from convsurgeon.errors import UnsupportedConvError
from convsurgeon.spec import ConvSpec
from convsurgeon.testing._cases import Op, make_donor
from convsurgeon.testing._checks import require, require_close
from convsurgeon.testing._op_law import dense_of, expensive, make_image, op_law


@op_law
def law_rng(op: Op, spec: ConvSpec, options: Any) -> None:
    """`from_conv` draws nothing from the global random states of torch, Python and numpy."""
    donor = make_donor(spec)
    before, python_before = torch.get_rng_state(), random.getstate()
    numpy_before = pickle.dumps(numpy.random.get_state())
    op.from_conv(donor, options)
    require(torch.equal(torch.get_rng_state(), before), "from_conv draws from torch's global random state")
    require(random.getstate() == python_before, "from_conv draws from Python's global random state")
    numpy_after = pickle.dumps(numpy.random.get_state())
    require(numpy_after == numpy_before, "from_conv draws from numpy's global random state")


@op_law
def law_refusals(op: Op, spec: ConvSpec, options: Any) -> None:
    """A grouped, depthwise or 1x1 donor is refused with one sentence, or replaced correctly."""
    channels = 2 * spec.in_channels
    for change in (
        {"kernel_size": (1, 1)},
        {"in_channels": channels, "out_channels": channels, "groups": 2},
        {"in_channels": channels, "out_channels": channels, "groups": channels},
    ):
        changed: ConvSpec = dataclasses.replace(spec, **change)
        fitted = op.fit_options(changed, options)
        reason = op.why_not(changed, fitted)
        donor, image = make_donor(changed), make_image(changed)
        try:
            cheap = op.from_conv(donor, options)
        except UnsupportedConvError as error:
            require(reason is not None, f"why_not accepts {changed}, from_conv raises: {error}")
            require(len(str(reason).splitlines()) == 1, f"refuses {changed} with {reason!r}, not one sentence")
            continue
        require(reason is None, f"why_not refuses {changed}, from_conv does not")
        require_close(cheap(image), dense_of(cheap, changed)(image), f"the output for {changed}")


@op_law
def law_deepcopy(op: Op, spec: ConvSpec, options: Any) -> None:
    """A deep copy gives equal outputs and shares nothing."""
    cheap, image = op.from_conv(make_donor(spec), options), make_image(spec)
    before = cheap(image)
    copied = copy.deepcopy(cheap)
    require(type(copied) is type(cheap), f"the copy is of class {type(copied).__name__}")
    require_close(copied(image), before, "the copy's output")
    with torch.no_grad():
        for tensor in [*copied.parameters(), *copied.buffers()]:
            tensor.add_(1)
    require_close(cheap(image), before, "the output after the copy was changed")


@op_law
def law_pickle(op: Op, spec: ConvSpec, options: Any) -> None:
    """It comes back from a pickle with equal outputs, mode and options."""
    cheap, image = op.from_conv(make_donor(spec).eval(), options), make_image(spec)
    loaded = pickle.loads(pickle.dumps(cheap))
    require(type(loaded) is type(cheap), f"the pickle gives a {type(loaded).__name__}")
    require(loaded.options == cheap.options and not loaded.training, "the pickle loses options or mode")
    require_close(loaded(image), cheap(image), "the output after pickling")


@op_law
def law_state_dict(op: Op, spec: ConvSpec, options: Any) -> None:
    """A fresh op of the same spec and `options` takes over the state dict and gives equal outputs."""
    cheap, image = op.from_conv(make_donor(spec), options), make_image(spec)
    file = io.BytesIO()
    torch.save(cheap.state_dict(), file)
    file.seek(0)
    fresh = op.build(cheap.spec, cheap.options, dtype=torch.float64)
    differing = fresh.load_state_dict(torch.load(file, weights_only=True), strict=False)
    require(not differing.missing_keys, f"the state dict lacks {', '.join(differing.missing_keys)}")
    extra = ", ".join(differing.unexpected_keys)
    require(not extra, f"the state dict has {extra}, which a fresh op does not")
    require_close(fresh(image), cheap(image), "the output after a state-dict round trip")


@op_law
def law_freeze(op: Op, spec: ConvSpec, options: Any) -> None:
    """`freeze_for_export` says in one line what it changes, changes it once, and leaves what equals `as_dense()`."""
    cheap, image = op.from_conv(make_donor(spec), options), make_image(spec)
    before = cheap(image)
    said = cheap.freeze_for_export()
    if said is None:
        require_close(cheap(image), before, "freeze_for_export says nothing, but the output")
    require(said is None or len(said.splitlines()) == 1, f"freeze_for_export says {said!r}, not one sentence")
    again = cheap.freeze_for_export()
    require(again is None, f"freeze_for_export changes more the second time: {again}")
    require_close(cheap(image), dense_of(cheap, spec)(image), "the output after freeze_for_export, against as_dense(),")


class _Leafless(torch.fx.Tracer):
    """A tracer that goes into every module."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


@op_law
def law_fx(op: Op, spec: ConvSpec, options: Any) -> None:
    """`torch.fx` traces it, also into its parts, and the graph gives equal outputs."""
    cheap, image = op.from_conv(make_donor(spec), options), make_image(spec)
    for tracer in (torch.fx.Tracer(), _Leafless()):
        traced = torch.fx.GraphModule(cheap, tracer.trace(cheap))
        for batch in (image, image[:1]):
            require_close(traced(batch), cheap(batch), "the traced graph's output")


@expensive
@op_law
def law_export(op: Op, spec: ConvSpec, options: Any) -> None:
    """`torch.export` takes it with a free batch size, and the program gives equal outputs."""
    cheap = op.from_conv(make_donor(spec), options).eval()
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(cheap, (make_image(spec),), dynamic_shapes=shapes).module()
    for batch in (2, 3):
        image = make_image(spec, batch=batch)
        require_close(exported(image), cheap(image), f"the exported program's output for a batch of {batch}")


@expensive
@op_law
def law_onnx(op: Op, spec: ConvSpec, options: Any) -> None:
    """It exports to ONNX, and onnxruntime gives equal outputs on batches of one and of three."""
    from convsurgeon.delivery import export

    cheap = op.from_conv(make_donor(spec, dtype=torch.float32), options)
    with tempfile.TemporaryDirectory() as folder:
        export(cheap, Path(folder) / "op.onnx", example_inputs=make_image(spec, dtype=torch.float32))
