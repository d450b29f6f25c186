"""Exported programs become ordinary networks, and networks become exported programs."""

from __future__ import annotations

import copy
import json
import pickle
import resource
import signal
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command import Program
from exported import Digits, edit, export, settle
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import convsurgeon as cs
from convsurgeon import storage
from convsurgeon.errors import ModelError, OutputError, UntrustedFileError, WeightsError
from convsurgeon.progress import Progress
from convsurgeon.record import read_record, update_record


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return settle(Digits()).eval()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.pt2"


def images(count: int = 5, channels: int = 3, size: int = 9) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(7))


def same(first: Any, second: Any) -> bool:
    """Whether two outputs are nested alike and equal bit by bit."""
    (leaves, tree), (others, other_tree) = pytree.tree_flatten(first), pytree.tree_flatten(second)
    return tree == other_tree and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(leaves, others, strict=True)
    )


def same_state(first: nn.Module, second: nn.Module) -> bool:
    """Whether two networks have the same tensors under the same names."""
    state, other = first.state_dict(), second.state_dict()
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def seeded(network: nn.Module, *args: Any) -> Any:
    """Return what a network gives, its random numbers being the same each time."""
    torch.manual_seed(5)
    return network(*args)


def layers(network: nn.Module) -> dict[str, str]:
    """Return the classes of the real layers by name."""
    named = network.named_modules(remove_duplicate=False)
    return {name: type(module).__name__ for name, module in named if name and type(module) is not nn.Module}


class TestLift:
    @pytest.mark.parametrize("training", [False, True])
    def test_it_is_the_network_that_was_exported(self, net: nn.Module, path: Path, training: bool) -> None:
        lifted = storage.load(export(net.train(training), path))
        assert lifted.training is training
        assert same_state(lifted, net)
        assert layers(lifted) == {
            **dict.fromkeys(("stem", "blocks.0"), "Conv2d"),
            **dict.fromkeys(("norm", "blocks.2"), "BatchNorm2d"),
            **dict.fromkeys(("drop", "dropout"), "Dropout"),
            "fc": "Linear",
        }
        for mode in (False, True):
            ours, theirs = copy.deepcopy(lifted).train(mode), copy.deepcopy(net).train(mode)
            assert same(seeded(ours, images()), seeded(theirs, images()))
            assert same_state(ours, theirs)  # running statistics and batch counters too
        assert same_state(lifted, net)

    @pytest.mark.parametrize("training", [False, True])
    def test_core_operators_too(self, net: nn.Module, path: Path, training: bool) -> None:
        program = torch.export.export(
            net.train(training), (images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        ).run_decompositions()
        torch.export.save(program, path)
        lifted = storage.load(path)
        assert lifted.training is training
        found = layers(lifted)
        # an evaluation mode dropout is nothing, and core operators say nothing of it
        dropouts = {name for name, kind in found.items() if kind == "Dropout"}
        assert dropouts == ({"drop", "dropout"} if training else set())
        assert {kind for name, kind in found.items() if "drop" not in name} == {"Conv2d", "BatchNorm2d", "Linear"}
        assert same(copy.deepcopy(lifted).eval()(images()), copy.deepcopy(net).eval()(images()))
        if training:
            assert same(seeded(lifted, images()), seeded(net, images()))
            assert same_state(lifted, net)

    def test_modes_stay_as_they_were_one_by_one(self, net: nn.Module, path: Path) -> None:
        net.train()
        net.norm.eval()
        lifted = storage.load(export(net, path))
        assert lifted.training
        assert not lifted.norm.training
        assert lifted.get_submodule("blocks.2").training
        assert same(seeded(lifted, images()), seeded(net, images()))
        assert torch.equal(lifted.norm.running_mean, net.norm.running_mean)

    def test_it_learns(self, net: nn.Module, path: Path) -> None:
        net.stem.weight.requires_grad_(False)
        lifted, net = storage.load(export(net, path)).train(), net.train()
        for network in (lifted, net):
            optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
            for step in range(3):
                torch.manual_seed(step)
                optimizer.zero_grad()
                F.cross_entropy(network(images()), torch.arange(5)).backward()
                optimizer.step()
        assert same_state(lifted, net)
        assert lifted.stem.weight.grad is None

    def test_it_can_be_copied_and_not_pickled(self, net: nn.Module, path: Path, tmp_path: Path) -> None:
        lifted = storage.load(export(net, path))
        for twin in (copy.deepcopy(lifted), copy.copy(lifted)):
            assert same(twin(images()), net(images()))
            assert read_record(twin) == read_record(lifted)
        assert copy.copy(lifted).stem is lifted.stem
        assert copy.deepcopy(lifted).stem is not lifted.stem
        with pytest.raises(pickle.PicklingError, match="save it with"):
            pickle.dumps(lifted)
        for model in (lifted, nn.Sequential(lifted)):
            with pytest.raises(ModelError, match=r"save it as net\.pt2"):
                storage.save(model, tmp_path / "net.pt")

    def test_the_graph_is_read_as_any_other(self, net: nn.Module, path: Path) -> None:
        found = cs.survey(storage.load(export(net, path)), example_inputs=images())
        assert not found.untraced
        site = next(site for site in found.sites if site.fqn == "stem")
        assert (site.norm, site.activation, site.stem) == ("norm", "relu", True)

    def test_no_trace_of_it_is_left_outside(self, net: nn.Module, path: Path) -> None:
        export(net, path)
        before = torch.get_rng_state()
        storage.load(path)
        assert torch.equal(before, torch.get_rng_state())


class Layers(nn.Module):
    """One of each kind of layer that can be lifted, and things between that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(4, 6, 3, padding="same", dilation=2)
        self.norm1 = nn.BatchNorm1d(6)
        self.conv3 = nn.Conv3d(1, 2, (1, 3, 3), padding=(0, 1, 1))
        self.norm3 = nn.BatchNorm3d(2, affine=False)
        self.up2 = nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1, padding=1, groups=2)
        self.up1 = nn.ConvTranspose1d(4, 4, 2)
        self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3) / 6)
        self.cumulative = nn.BatchNorm2d(4, momentum=None)
        self.of_batch = nn.BatchNorm2d(4, track_running_stats=False)
        self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.same = nn.Conv2d(4, 4, (3, 5), padding="same")
        self.read = nn.Conv2d(4, 4, 1)
        self.alpha = nn.AlphaDropout(0.3)
        self.channels = nn.Dropout2d(0.2)
        self.inplace = nn.Dropout(0.1, inplace=True)
        self.group = nn.GroupNorm(2, 4)
        self.prelu = nn.PReLU()
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.add_(1)
        with torch.no_grad():
            mean = x.mean()
        y = self.norm1(self.conv1(x.flatten(2)))
        y = self.norm3(self.conv3(y[:, None, :, :, None]))[:, 0].reshape(x.shape[0], 6, 8, 8)
        y = F.conv2d(self.up2(y), self.kernel, padding=1) * self.scale * torch.tensor(0.5)
        y = self.same(self.circular(self.of_batch(self.cumulative(y))))
        y = self.read(y) * self.read.weight.abs().sum() + mean
        y = self.prelu(self.group(F.relu(self.inplace(self.channels(self.alpha(y))), inplace=True)))
        y = y + self.up1(y.mean(3))[:, :, :-1, None]
        return torch.cat([F.hardswish(F.leaky_relu(y, 0.2)), y.clamp(0, 1)], 1)


class TestLayers:
    @pytest.mark.parametrize("training", [False, True])
    def test_of_every_kind(self, path: Path, training: bool) -> None:
        torch.manual_seed(0)
        net = settle(Layers()).eval()
        net.cumulative.train(False)
        lifted = storage.load(export(net, path, images(2, 4, 8)))
        kinds = layers(lifted)
        # a weight that something else reads too stays where it is, and so does a bare parameter
        assert kinds.keys() == {
            *("conv1", "norm1", "conv3", "norm3", "up2", "up1", "cumulative", "of_batch", "circular", "same"),
            *("alpha", "channels", "inplace"),
        }
        assert kinds == {name: type(net.get_submodule(name)).__name__ for name in kinds}
        assert lifted.cumulative.momentum is None
        assert lifted.inplace.inplace
        ours, theirs = lifted.train(training), net.train(training)
        y, expected = seeded(ours, images(3, 4, 8)), seeded(theirs, images(3, 4, 8))
        assert same(y, expected)
        y.sum().backward()
        expected.sum().backward()
        grads = {name: p.grad for name, p in theirs.named_parameters()}
        assert all(torch.equal(p.grad, grads[name]) for name, p in ours.named_parameters())
        got, wanted = ours.state_dict(), theirs.state_dict()
        # what evaluation mode did not do, such as counting, is not in the program
        different = {name for name in wanted if not torch.equal(got[name], wanted[name])}
        assert different == ({"seen"} if training else set())

    def test_one_convolution_that_is_called_twice_is_one_module(self, path: Path) -> None:
        class Twice(nn.Module):
            def __init__(self, stride: int = 1) -> None:
                super().__init__()
                self.first = nn.Conv2d(4, 4, 3, padding=1, bias=False)
                self.again = self.first
                self.tied = nn.Conv2d(4, 4, 3, padding=1, bias=False, stride=stride)
                self.tied.weight = self.first.weight

            def forward(self, x: Tensor) -> Tensor:
                return self.tied(self.again(self.first(x)))

        for stride in (1, 2):
            net = Twice(stride)
            lifted = storage.load(export(net, path, images(2, 4)))
            assert same(lifted(images(3, 4)), net(images(3, 4)))
            assert lifted.first.weight is lifted.tied.weight is lifted.again.weight
            # with another stride it is another convolution, and no module is both
            assert set(layers(lifted)) == ({"first", "again", "tied"} if stride == 1 else set())
            assert len({id(module) for module in lifted.modules() if isinstance(module, nn.Conv2d)}) == 2 - stride

    def test_tied_linear_layers_stay_two_and_tied(self, path: Path) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
                self.b.weight = self.a.weight

            def forward(self, x: Tensor) -> Tensor:
                return self.b(self.a(x))

        lifted = storage.load(export(Tied(), path, torch.zeros(2, 4)))
        assert layers(lifted) == {"a": "Linear", "b": "Linear"}
        assert lifted.a.weight is lifted.b.weight
        assert lifted.a.bias is not lifted.b.bias

    def test_a_program_of_a_single_convolution(self, path: Path) -> None:
        net = nn.Conv2d(3, 4, 3)
        lifted = storage.load(export(net, path, images(2), batch=False))
        assert same(lifted(images()), net(images()))
        assert same_state(lifted, net)


class Nested(nn.Module):
    """Takes a dict and keywords, gives an ordered dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: dict[str, list[Tensor]], *, mask: Tensor, flag: bool = False) -> OrderedDict[str, Any]:
        y = self.conv(x["image"][0]) * mask
        return OrderedDict(out=y, aux=[(y.mean(),), None], many=len(x), pair={"y": y, 3: y + 1})


class TestConvention:
    def test_arguments_and_outputs_nest_as_before(self, path: Path, tmp_path: Path) -> None:
        net = Nested()
        dim = torch.export.Dim("batch", max=7)
        program = torch.export.export(
            net,
            ({"image": [images(2)]},),
            {"mask": torch.rand(2, 1, 1, 1), "flag": True},
            dynamic_shapes={"x": {"image": [{0: dim}]}, "mask": {0: dim}, "flag": None},
        )
        torch.export.save(program, path)
        lifted = storage.load(path)
        again = storage.load(storage.save(lifted, tmp_path / "again.pt2"))
        args, mask = ({"image": [images(4)]},), torch.rand(4, 1, 1, 1)
        expected = net(*args, mask=mask, flag=True)
        for network in (lifted, again):
            got = network(*args, mask=mask)
            assert type(got) is OrderedDict
            assert same(got, expected)
            with pytest.raises(ValueError, match="exported for flag=True, and cannot take False"):
                network(*args, mask=mask, flag=False)
        assert read_record(lifted)["program"] == read_record(again)["program"]
        assert list(read_record(lifted)["program"]["ranges"].values()) == [[0, 7]]
        json.dumps(read_record(lifted))

    def test_sizes_that_varied_still_do(self, path: Path, tmp_path: Path) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3)

            def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
                return self.conv(x).mean((2, 3)).sum() + self.conv(y).mean((2, 3)), x.shape[0]

        dims = {name: torch.export.Dim(name, min=4, max=40) for name in ("a", "b", "side")}
        shapes = {"x": {0: dims["a"], 2: 2 * dims["side"]}, "y": {0: dims["b"], 3: dims["side"]}}
        net = Two()
        program = torch.export.export(net, (images(5, size=10), images(6, size=5)), dynamic_shapes=shapes)
        torch.export.save(program, path)
        lifted = storage.load(path)
        again = storage.load(storage.save(lifted, tmp_path / "again.pt2"))
        first, second = images(4, size=16)[..., :10], images(7, size=8)[:, :, :5]
        for network in (lifted, again):
            assert same(network(first, second), net(first, second))
        shape = read_record(again)["program"]["leaves"][1]["shape"]
        assert [isinstance(size, int) for size in shape] == [False, True, True, False]

    def test_a_batch_size_that_stands_in_the_graph(self, path: Path) -> None:
        class Flat(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.conv(x).view(x.size(0), -1)

        said: list[Progress] = []
        lifted = storage.load(export(Flat(), path, images(2), batch=False), report=said.append)
        assert "exported for a batch of exactly 2" in said[0].message
        assert lifted(images(2)).shape[0] == 2
        with pytest.raises(ValueError, match="a batch of exactly 2, and cannot take 5; export it with dynamic_shapes"):
            lifted(images(5))
        again = storage.load(storage.save(lifted, path, force=True))
        assert same(again(images(2)), lifted(images(2)))

    def test_a_batch_size_that_does_not(self, net: nn.Module, path: Path) -> None:
        class Free(Digits):
            def forward(self, x: Tensor) -> Tensor:
                return self.fc(self.drop(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3))))

        said: list[Progress] = []
        free = Free().eval()
        lifted = storage.load(export(free, path, images(1), batch=False), report=said.append)
        assert not said
        assert same(lifted(images(5)), free(images(5)))
        assert read_record(lifted)["input_shape"] == [1, 3, 9, 9]

    @pytest.mark.parametrize(
        ("forward", "what"),
        [
            (lambda x: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)), "cond"),
            (lambda x: _half(x), "wrap_with_autocast"),
        ],
    )
    def test_what_is_not_read_is_named(self, path: Path, forward: Callable[[Tensor], Tensor], what: str) -> None:
        class Other(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return forward(x)

        export(Other(), path, batch=False)
        for trust in (False, True):
            with pytest.raises(ModelError, match=rf"net\.pt2 holds {what} \(control flow, autocast or the like\)"):
                storage.load(path, trust=trust)


def _half(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x @ x


class TestSave:
    @pytest.mark.parametrize("op", cs.ops.names())
    def test_there_and_back(self, net: nn.Module, path: Path, tmp_path: Path, op: str) -> None:
        lifted = storage.load(export(net, path))
        update_record(lifted, classes=list("abcde"), preprocessing={"size": [9, 9]})
        student = cs.rewrite(lifted, op, example_inputs=images())
        student.fc.weight.requires_grad_(False)
        file = storage.save(student, storage.default_output(student, str(path), op))
        assert file == tmp_path / f"net.{op}.pt2"
        again = storage.load(file)
        assert same_state(again, student)
        assert same(again(images()), student(images()))
        assert cs.plan_of(again) == cs.plan_of(student)
        assert not again.fc.weight.requires_grad
        assert {k: v for k, v in read_record(again).items() if k != "program"} == {
            k: v for k, v in read_record(student).items() if k != "program"
        }
        twice = storage.load(storage.save(again, tmp_path / "twice.pt2"))
        assert same_state(twice, student)
        assert same(twice(images()), student(images()))

    def test_it_is_saved_in_evaluation_mode_and_left_as_it_is(self, net: nn.Module, path: Path) -> None:
        lifted = storage.load(export(net, path)).train()
        before = copy.deepcopy(lifted.state_dict())
        again = storage.load(storage.save(lifted, path, force=True))
        assert lifted.training
        assert not again.training
        assert all(torch.equal(before[name], tensor) for name, tensor in lifted.state_dict().items())
        assert same(seeded(again.train(), images()), seeded(lifted, images()))

    def test_any_network_whose_input_is_known(self, tmp_path: Path) -> None:
        net = storage.load("timm:test_resnet")
        student = cs.rewrite(net.eval(), "group")
        again = storage.load(storage.save(student, tmp_path / "a.pt2"))
        x = torch.randn(3, *read_record(net)["input_shape"][1:])
        assert same(again(x), student(x))
        assert cs.plan_of(again) == cs.plan_of(student)
        assert read_record(again)["source"] == read_record(student)["source"]

    def test_any_network_with_its_input_given(self, tmp_path: Path) -> None:
        net = Nested()
        with pytest.raises(ModelError, match="the input of this Nested is not known"):
            storage.save(net, tmp_path / "a.pt2")
        example = {"x": {"image": [images(1)]}, "mask": torch.rand(1, 1, 1, 1)}
        again = storage.load(storage.save(net, tmp_path / "a.pt2", example_inputs=example))
        call = {"x": {"image": [images(3)]}, "mask": torch.rand(3, 1, 1, 1)}
        assert same(again(**call), net(**call))

    def test_what_cannot_be_exported_leaves_nothing(self, tmp_path: Path) -> None:
        class Looks(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x + 1 if x.sum() > 0 else x

        class Fixed(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.view(2, 27, 9)

        for net, reason in ((Looks(), "torch.export cannot export this Looks"), (Fixed(), "fixed by the code")):
            with pytest.raises(ModelError, match=reason) as caught:
                storage.save(net, tmp_path / "a.pt2", example_inputs=images(2))
            assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())

    def test_what_could_not_be_loaded_again_is_not_written(self, tmp_path: Path) -> None:
        class Half(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return _half(x)

        told = "of this Half could not be loaded again: it has wrap_with_autocast"
        with pytest.raises(ModelError, match=told) as caught:
            storage.save(Half(), tmp_path / "a.pt2", example_inputs=images(2))
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())

    def test_an_operator_of_another_library_needs_trust(self, path: Path) -> None:
        with torch.library._scoped_library("convsurgeon_test", "DEF") as library:
            library.define("twice(Tensor x) -> Tensor")
            library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")

            class Custom(Digits):
                def forward(self, x: Tensor) -> Tensor:
                    return torch.ops.convsurgeon_test.twice(super().forward(x))

            net = Custom().eval()
            export(net, path)
            with pytest.raises(
                UntrustedFileError, match=r"the operator 'torch\.ops\.convsurgeon_test\.twice\.default'"
            ):
                storage.load(path)
            lifted = storage.load(path, trust=True)
            assert layers(lifted)["stem"] == "Conv2d"
            assert same(lifted(images()), net(images()))

    def test_a_full_disk_is_an_error_and_no_end(self, net: nn.Module, path: Path, tmp_path: Path) -> None:
        lifted = storage.load(export(net, path))
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            with pytest.raises(OutputError, match="File too large"):
                storage.save(lifted, tmp_path / "a.pt2")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        assert list(tmp_path.iterdir()) == [path]

    def test_a_file_is_not_overwritten_unasked(self, net: nn.Module, path: Path) -> None:
        lifted = storage.load(export(net, path))
        content = path.read_bytes()
        with pytest.raises(OutputError, match="exists already"):
            storage.save(lifted, path)
        assert path.read_bytes() == content

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_types_and_memory_formats_stay(self, net: nn.Module, path: Path, dtype: torch.dtype) -> None:
        net = net.to(dtype).to(memory_format=torch.channels_last)
        with pytest.warns(UserWarning, match="complete tensor"):
            export(net, path, images(2).to(dtype))
        lifted = storage.load(path)
        again = storage.load(storage.save(lifted, path, force=True))
        for network in (lifted, again):
            assert same_state(network, net)
            assert {p.dtype for p in network.parameters()} == {dtype}
            strides = {name: p.stride() for name, p in network.named_parameters()}
            assert strides == {name: p.stride() for name, p in net.named_parameters()}
        wider = storage.load(storage.save(again.double(), path, force=True))
        assert wider(images().double()).dtype == torch.float64

    def test_a_program_of_another_device_comes_to_the_processor(self, net: nn.Module, path: Path) -> None:
        export(net, path)

        def move(document: dict[str, Any]) -> None:
            text = json.dumps(document).replace('"type": "cpu", "index": null', '"type": "cuda", "index": 0')
            assert "cuda" in text
            document.update(json.loads(text))

        edit(path, move)
        edit(path, move, record="data/weights/model_weights_config.json")
        lifted = storage.load(path)
        assert {tensor.device.type for tensor in lifted.state_dict().values()} == {"cpu"}
        assert same(lifted(images()), net(images()))

    def test_trust_gives_the_same_network(self, net: nn.Module, path: Path) -> None:
        lifted = storage.load(storage.save(storage.load(export(net, path)), path, force=True), trust=True)
        assert same(lifted(images()), net(images()))
        assert read_record(lifted)["source"] == {"file": "net.pt2"}


class TestOtherUses:
    def test_its_weights_fit_the_architecture(self, tmp_path: Path) -> None:
        net = storage.load("timm:test_resnet", model_args={"num_classes": 7})
        file = storage.save(net, tmp_path / "net.pt2")
        assert same_state(storage.load("timm:test_resnet", weights=file), net)
        with pytest.raises(WeightsError, match="does not fit"):
            storage.load("torchvision:resnet18", weights=file)

    def test_it_is_no_checkpoint(self, net: nn.Module, path: Path) -> None:
        with pytest.raises(ModelError, match=r"is an exported program .* and no checkpoint"):
            storage.load_checkpoint(export(net, path))

    def test_it_is_delivered_as_onnx(self, net: nn.Module, path: Path, tmp_path: Path) -> None:
        student = cs.rewrite(storage.load(export(net, path)), "shift")
        delivery = cs.export(student, tmp_path / "net.onnx")
        assert delivery.parity.max_rel < 1e-4
        assert len(delivery.parity.batches) > 1

    def test_the_command_line_takes_it_from_end_to_end(self, tmp_path: Path) -> None:
        class Reader(Digits):
            def __init__(self) -> None:
                super().__init__()
                self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
                self.fc = nn.Linear(16, 10)

        export(Reader().eval(), tmp_path / "net.pt2", torch.zeros(2, 1, 8, 8))
        program = Program(tmp_path)
        assert "blocks.0" in program("inspect", "net.pt2").done().out
        assert "student: net.shift.pt2" in program("convert", "net.pt2", "--to", "shift").done().out
        assert "accuracy" in program("evaluate", "net.shift.pt2", "--data", "digits").done().out
        assert "net.shift.onnx" in program("export", "net.shift.pt2").done().out
        short = ("--epochs", "1", "--limit-batches", "2")
        told = program("distill", "net.pt2", "--to", "shift", "--data", "digits", *short).done()
        assert "student.pt2" in told.out
        trained = storage.load(next((tmp_path / "runs").glob("*/student.pt2")))
        assert cs.plan_of(trained) is not None
        assert trained.norm.num_batches_tracked > 0
