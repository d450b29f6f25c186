"""The laws of what a student does: run, train, be copied, saved, replayed, counted."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convsurgeon.errors import NothingToConvertError
from convsurgeon.ops import AbstractCheapConv, SamePadding
from convsurgeon.surgery import (
    FlopCounter,
    Plan,
    check_outputs,
    count_macs,
    in_mode,
    plan_of,
    rebuild,
    rewrite,
    survey,
    totals,
)
from convsurgeon.testing._checks import require
from convsurgeon.testing._holdings import Witness, same
from convsurgeon.testing._model_law import ModelCase, model_law, taken_along
from convsurgeon.testing._runs import (
    copy_of,
    outputs,
    parts,
    require_close_outputs,
    require_same_bits,
    require_same_kind,
    rounding_of,
    run,
)


@model_law
def model_law_outputs(case: ModelCase) -> None:
    """Outputs have the model's structure, dtypes and sizes; in train mode, too, where the model runs that way."""
    inputs = case.example_inputs
    loose = check_outputs(case.model, case.student, inputs).data_dependent
    for training in case.modes:
        got, expected = (outputs(model, inputs, training=training) for model in (case.student, case.model))
        require_same_kind(got, expected, loose=loose, mode=" in train mode" if training else "")


@model_law
def model_law_dense(case: ModelCase) -> None:
    """The student equals the model with, in every convolution's place, the dense kernel that the op says it is."""
    twin, inputs = _dense_twin(case), case.example_inputs
    rounding = rounding_of(twin, inputs)
    for training in case.modes:
        got, expected = (outputs(model, inputs, training=training) for model in (case.student, twin))
        what = f"in {'train' if training else 'eval'} mode the output"
        require_close_outputs(got, expected, what, rounding=rounding)


def _dense_twin(case: ModelCase) -> nn.Module:
    """Return the model with the dense kernels that the student's ops are: it turns with its values as the student."""
    twin = copy_of(case.model)
    with torch.no_grad():
        for decision in case.plan.converted:
            op = case.student.get_submodule(decision.fqns[0])
            if isinstance(op, AbstractCheapConv):
                _put_in(twin, decision.fqns[0], op)
    return twin


def _put_in(twin: nn.Module, fqn: str, op: AbstractCheapConv) -> None:
    """Let a convolution compute with the dense kernel of an op, whatever it computed with before."""
    prefix, _, name = fqn.rpartition(".")
    owner = twin.get_submodule(prefix)
    kernel = owner._parameters.get(name, owner._buffers.get(name))
    if kernel is None:
        owner = twin.get_submodule(fqn)
        plain = type(owner) is nn.Conv2d and not {"forward", "_conv_forward"} & vars(owner).keys()
        if not plain or owner._parameters.get("weight") is None:
            owner.dense_twin, owner.forward = _dense_conv(op)
            return
        kernel = owner._parameters["weight"]
    assert kernel is not None
    kernel.copy_(op.as_dense())


def _dense_conv(op: AbstractCheapConv) -> tuple[nn.Conv2d, Callable[[Tensor], Tensor]]:
    spec = op.spec
    plain = dataclasses.replace(spec, padding=(0, 0)) if spec.pads_by_size else spec
    conv = nn.Conv2d(**dataclasses.asdict(plain), device="meta")
    conv.weight = nn.Parameter(op.as_dense().detach())
    conv.bias = None if op.bias is None else nn.Parameter(op.bias.detach())
    pad = SamePadding(spec).pad if spec.pads_by_size else nn.Identity()
    return conv, lambda x: conv(pad(x))


@model_law
def model_law_plan(case: ModelCase) -> None:
    """The plan is the same after JSON, with the same bytes, and replays to the same bits; the student knows it."""
    text = case.plan.to_json()
    again = Plan.from_json(text)
    require(again == case.plan, "plan → JSON → plan is not the identity")
    require(again.to_json() == text, "the plan's JSON has other bytes the second time")
    replayed = rewrite(case.model, again, example_inputs=case.example_inputs)
    _require_same_state(replayed, case.student, "the student of the replayed plan")
    if plan_of(case.model) is None:
        require(plan_of(case.student) == case.plan, "plan_of(student) is not the plan that made it")


@model_law
def model_law_second_rewrite(case: ModelCase) -> None:
    """A second rewrite raises NothingToConvertError and leaves the student as it is."""
    witness = Witness(case.student)
    raised = False
    try:
        rewrite(case.student, case.to, example_inputs=case.example_inputs, **case.selectors)
    except NothingToConvertError as error:
        raised = len(str(error).splitlines()) == 1
    require(raised, "a second rewrite does not raise NothingToConvertError with one line")
    witness.check("a second rewrite")


@model_law
def model_law_copies(case: ModelCase) -> None:
    """A deep copy and, where the model itself can be pickled, a pickle have equal state and outputs."""
    copies = {"a deep copy of the student": copy.deepcopy(case.student)}
    if (pickled := _pickled(copy_of(case.model))) is not None and pickle.loads(pickled) is not None:
        copies["the student from a pickle"] = pickle.loads(pickle.dumps(case.student))
    for what, copied in copies.items():
        _require_same_state(copied, case.student, what)
        for training in case.modes:
            got, expected = (outputs(m, case.example_inputs, training=training) for m in (copied, case.student))
            require_same_bits(got, expected, f"the output of {what}")


def _pickled(model: nn.Module) -> bytes | None:
    try:
        return pickle.dumps(model)
    except Exception:  # whatever a foreign class raises; then the student cannot be pickled either
        return None


@model_law
def model_law_state_dict(case: ModelCase) -> None:
    """What `rebuild` makes of the plan takes the state dict through a file, and gives equal outputs then."""
    tensors = [value for value in case.student.state_dict().values() if isinstance(value, Tensor)]
    if any(tensor.is_meta or nn.parameter.is_lazy(tensor) for tensor in tensors) or not _takes_its_state(case.model):
        return  # there are no values that could come back
    file = io.BytesIO()
    torch.save(case.student.state_dict(), file)
    file.seek(0)
    fresh = rebuild(case.model, case.plan)
    differing = fresh.load_state_dict(torch.load(file, weights_only=True), strict=False)
    require(not differing.missing_keys, f"the state dict lacks {', '.join(differing.missing_keys)}")
    require(not differing.unexpected_keys, f"the state dict has {', '.join(differing.unexpected_keys)} besides")
    _require_same_state(fresh, case.student, "what was rebuilt")
    got, expected = (outputs(model, case.example_inputs) for model in (fresh, case.student))
    require_same_bits(got, expected, "the output after a state-dict round trip")


def _takes_its_state(model: nn.Module) -> bool:
    """Whether a model can be given its own state: an expanded buffer cannot be written to."""
    try:
        copy_of(model).load_state_dict(model.state_dict())
    except Exception:  # whatever a foreign _load_from_state_dict raises
        return False
    return True


def _require_same_state(got: nn.Module, expected: nn.Module, what: str) -> None:
    mine, theirs = expected.state_dict(), got.state_dict()
    require(list(mine) == list(theirs), f"{what} has the state {list(theirs)}, expected {list(mine)}")
    for name, value in mine.items():
        require(same(theirs[name], value), f"{what} has another {name}")


@model_law
def model_law_gradients(case: ModelCase) -> None:
    """Every trained parameter of an op gets a finite gradient in a training step in which what it replaced gets one."""
    mine, theirs = (_gradients(model, case) for model in (_dense_twin(case), case.student))
    if mine is None:
        return
    require(theirs is not None, "the model can be trained on the example input, the student cannot")
    assert theirs is not None
    for fqn, _, owner, op in case.converted():
        besides = taken_along(fqn, owner, op)
        bias = f"{fqn}.bias".lstrip(".")
        learns = {  # whether the bias does, and whether anything else does: a train() may freeze one of them
            is_bias: any(
                gradient is not None
                for name, gradient in mine.items()
                if (name == fqn or name.startswith(f"{fqn}.".lstrip("."))) and (name == bias) == is_bias
            )
            for is_bias in (False, True)
        }
        for name, parameter in op.named_parameters():
            full = f"{fqn}.{name}".lstrip(".")
            unused = name in besides and mine[full] is None
            gradient = theirs[full]
            alive = gradient is not None or unused or not parameter.requires_grad or not learns[parameter is op.bias]
            require(alive, f"{full} gets no gradient in a training step")
            finite = gradient is None or gradient.is_meta or bool(gradient.isfinite().all())
            require(finite, f"{full} gets a gradient that is not finite in a training step")


def _gradients(model: nn.Module, case: ModelCase) -> dict[str, Tensor | None] | None:
    """Return the gradient of every parameter after one training step of a copy, or None where that fails."""
    copied = in_mode(copy_of(model), training=True in case.modes)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model's own, as of its backward hooks
            made = [
                part
                for _, part in parts(run(copied, case.example_inputs))
                if isinstance(part, Tensor) and part.requires_grad
            ]
            torch.autograd.backward([(tensor * torch.ones_like(tensor)).sum() for tensor in made])
    except Exception:  # whatever a foreign forward or hook raises
        return None
    parameters = copied.named_parameters(remove_duplicate=False)
    return {name: parameter.grad if parameter.is_leaf else None for name, parameter in parameters}


@model_law
def model_law_costs(case: ModelCase) -> None:
    """What the sites cost by the plan is what a counter counts, where model and student take the same way."""
    found = case.survey
    after = survey(case.student, example_inputs=case.example_inputs)
    calls = [{site.fqns: site.calls for site in one.sites if site.spec} for one in (found, after)]
    batches = _batches(case.model, case.example_inputs)
    if calls[0] != calls[1] or len(batches) != 1:
        return  # the forward turns with its values, or costs are per image and this is no batch of images
    batch, cost = batches.pop(), totals(case.plan, found)
    assert cost.macs_before is not None
    assert cost.macs_after is not None
    assert cost.counted_macs_after is not None
    cheap = count_macs(case.student, case.example_inputs)
    taps, hot = batch * (cost.counted_macs_after - cost.macs_after), cheap.counted - cheap.true
    require(taps == hot, f"the sites have {taps} one-hot taps, a counter saw {hot}")
    # of convolutions alone: products that made a kernel go with it, and other layers are no sites
    before, counted = (_convolution_macs(model, case.example_inputs) for model in (case.model, case.student))
    saved, seen = batch * (cost.macs_before - cost.macs_after), before - (counted - hot)
    require(seen == saved, f"the sites save {saved} MACs, a counter saw {seen}")
    if all(site.spec is not None and site.obstacle is None for site in found.sites):
        total = batch * cost.macs_before
        require(before == total, f"the sites cost {total} MACs, a counter saw {before}")


def _convolution_macs(model: nn.Module, inputs: Any) -> int:
    with torch.no_grad(), FlopCounter() as counter:
        run(in_mode(copy_of(model), training=False), inputs)
    counts = counter.get_flop_counts()["Global"]
    # not of a gradient that a forward takes
    flops: int = sum(count for function, count in counts.items() if str(function).endswith("convolution"))
    return flops // 2


class _Batches(TorchFunctionMode):
    """Notes how many images every 2-d convolution gets."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d:
            x = args[0] if args else kwargs["input"]
            self.found.add(int(x.shape[0]) if x.dim() == 4 else 1)
        return func(*args, **(kwargs or {}))


def _batches(model: nn.Module, inputs: Any) -> set[int]:
    seen = _Batches()
    with torch.no_grad(), seen:
        run(in_mode(copy_of(model), training=False), inputs)
    return seen.found
