"""What leaves convsurgeon: the file equals the student, says what it is, and appears whole or not at all."""

from __future__ import annotations

import copy
import errno
import json
import logging
import os
import random
import threading
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from onnxscript import ir
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader

from convsurgeon import ops
from convsurgeon.delivery import Latency, export, measure_latency, ratio, session
from convsurgeon.delivery._constants import fold_constants
from convsurgeon.delivery._fold import count_unfolded, fold_batch_norms
from convsurgeon.delivery._parity import gather_images, named_outputs
from convsurgeon.errors import DataError, ExportError, OutputError, ParityError
from convsurgeon.record import update_record
from convsurgeon.surgery import rewrite

IMAGE = torch.zeros(1, 3, 12, 12)


def settled(model: nn.Module, *example: Tensor) -> nn.Module:
    """Give the batch norms statistics that mean something, and weights that are not all 1 and 0."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(*[torch.randn(4, *tensor.shape[1:]) for tensor in example])
    return model.eval()


class Residual(nn.Module):
    """Dense, grouped, dilated depthwise and pointwise convolutions, with batch norms and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.grouped = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False),
            nn.Conv2d(8, 8, 1, bias=False),
            nn.BatchNorm2d(8, affine=False),
        )
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.depthwise(self.grouped(x)))
        return self.head(self.drop(x.mean((2, 3))))


class Segmenter(nn.Module):
    """Returns a dict, with a nested tuple, an integer output and a None."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        out = self.body(x)
        return {"out": out, "aux": (out.argmax(1), out.mean((2, 3))), "loss": None}


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3)
        self.right = nn.Conv2d(1, 4, 3)

    def forward(self, picture: Tensor, depth: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        both = self.left(picture) + scale * self.right(depth)
        return both, both.amax((2, 3))


class PreActivation(nn.Module):
    """Its batch norm follows an activation, so it cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.relu(self.conv(x)))


class SharedConv(nn.Module):
    """One convolution under two batch norms, each of which must get weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv(torch.relu(self.first(self.conv(x)))))


class Standardized(nn.Conv2d):
    """A convolution whose weight is computed from its parameter, more of it than the exporter folds by itself."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, self.stride)


class ReadTwice(nn.Module):
    """The convolution's own output is needed beside the normalised one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + torch.relu(self.norm(y))


class OneBatchSize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(2, *x.shape[1:])


class DependsOnValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else x * 2


class Chaotic(nn.Module):
    """Doubles whatever rounding there is, again and again: PyTorch in float32 is not within 1e-4 of float64."""

    def __init__(self, times: int = 10) -> None:
        super().__init__()
        self.times = times
        self.body = nn.Conv2d(3, 64, 12)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.body(x)).flatten(1)
        for _ in range(self.times):
            y = 4 * y * (1 - y)
        return self.head(y)


class OnlyFloat32(Chaotic):
    """The same, with a constant that does not let it run in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ torch.eye(5)


class SaysNaN(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(-1 - x.abs())


def ops_of(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    opened = session(path)
    feed = {entry.name: value.numpy() for entry, value in zip(opened.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(array) for array in opened.run(None, feed)]


# ---- what is exported ------------------------------------------------------------------------


def test_the_file_equals_the_student_at_a_batch_size_that_was_never_tried(tmp_path: Path) -> None:
    model = settled(Residual(), IMAGE)
    delivery = export(model, tmp_path / "student.onnx", example_inputs=IMAGE)
    x = torch.randn(5, 3, 12, 12)
    (got,) = run(delivery.path, x)
    torch.testing.assert_close(got, model(x).detach(), rtol=1e-4, atol=1e-5)  # float32, other kernels
    assert delivery.path == tmp_path / "student.onnx"
    assert delivery.bytes == delivery.path.stat().st_size
    assert delivery.opset >= 18
    assert delivery.parity.batches == (1, 3)
    assert not delivery.parity.real_images
    assert 0 <= delivery.parity.max_rel <= delivery.parity.tolerance == 1e-4
    assert [entry.shape for entry in session(delivery.path).get_inputs()] == [["batch", 3, 12, 12]]
    assert os.listdir(tmp_path) == ["student.onnx"]


def test_every_batch_norm_after_a_convolution_is_folded(tmp_path: Path) -> None:
    delivery = export(settled(Residual(), IMAGE), tmp_path / "a.onnx", example_inputs=IMAGE)
    found = ops_of(delivery.path)
    assert delivery.batch_norms_left == 0
    assert found["Conv"] == 4
    assert found["BatchNormalization"] == 0
    assert found["Dropout"] == 0


def test_a_batch_norm_elsewhere_stays_and_is_not_counted(tmp_path: Path) -> None:
    delivery = export(settled(PreActivation(), IMAGE), tmp_path / "a.onnx", example_inputs=IMAGE)
    assert ops_of(delivery.path)["BatchNormalization"] == 1
    assert delivery.batch_norms_left == 0


def test_a_shared_convolution_is_folded_under_each_of_its_batch_norms(tmp_path: Path) -> None:
    model = settled(SharedConv(), IMAGE)
    delivery = export(model, tmp_path / "a.onnx", example_inputs=IMAGE)
    assert delivery.batch_norms_left == 0
    assert ops_of(delivery.path) == {"Conv": 2, "Relu": 1}
    assert len(onnx.load(delivery.path).graph.initializer) == 4


def test_weights_that_are_computed_become_constants(tmp_path: Path) -> None:
    model = nn.Sequential(Standardized(3, 48, 3), nn.BatchNorm2d(48), nn.ReLU(), Standardized(48, 48, 3))
    delivery = export(settled(model, IMAGE), tmp_path / "a.onnx", example_inputs=IMAGE)
    assert ops_of(delivery.path) == {"Conv": 2, "Relu": 1}
    assert delivery.batch_norms_left == 0
    # the raw weights went
    assert delivery.bytes < 1.1 * 4 * sum(parameter.numel() for parameter in model.parameters())


def test_nothing_is_made_larger_than_the_largest_weight() -> None:
    generator = np.random.default_rng(0)
    sizes = {"w": (40, 300), "row": (1, 600), "column": (600, 1)}
    arrays = [onnx.numpy_helper.from_array(generator.normal(size=size), name) for name, size in sizes.items()]
    nodes = [
        onnx.helper.make_node("Add", ["row", "column"], ["table"]),  # 600 x 600, from 1,200 numbers
        onnx.helper.make_node("Add", ["w", "w"], ["twice"]),
        onnx.helper.make_node("MatMul", ["x", "twice"], ["y"]),
        onnx.helper.make_node("Add", ["table", "x0"], ["z"]),
    ]
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, shape)
        for name, shape in {"x": [1, 40], "x0": [1], "y": [1, 300], "z": [600, 600]}.items()
    ]
    graph = onnx.helper.make_graph(nodes, "g", values[:2], values[2:], arrays)
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]))
    assert fold_constants(model)
    assert [node.outputs[0].name for node in model.graph] == ["table", "y", "z"]


def test_a_batch_norm_that_cannot_be_folded_is_reported(tmp_path: Path) -> None:
    delivery = export(settled(ReadTwice(), IMAGE), tmp_path / "a.onnx", example_inputs=IMAGE)
    assert delivery.batch_norms_left == 1


@pytest.mark.parametrize("bias", [True, False])
def test_folding_alone_keeps_the_function(bias: bool) -> None:
    generator = np.random.default_rng(0)
    arrays = {"w": generator.normal(size=(4, 2, 3, 3)), "b": generator.normal(size=4)}
    arrays |= {name: generator.normal(size=4) for name in ("scale", "shift", "mean")}
    arrays["var"] = generator.uniform(0.5, 2, size=4)
    helper = onnx.helper
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"] if bias else ["x", "w"], ["y"], group=2),
        helper.make_node("BatchNormalization", ["y", "scale", "shift", "mean", "var"], ["n"], epsilon=0.1),
        helper.make_node("BatchNormalization", ["n", "scale", "shift", "mean", "var"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 4, 5, 5])],
        [helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [1, 4, 3, 3])],
        [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in arrays.items()],
    )
    before = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    after = copy.deepcopy(before)
    assert count_unfolded(before) == 1
    assert fold_batch_norms(after) == 2
    assert count_unfolded(after) == 0
    assert [node.op_type for node in after.graph.node] == ["Conv"]
    assert len(after.graph.initializer) == 2
    onnx.checker.check_model(after, full_check=True)
    x = generator.normal(size=(1, 4, 5, 5)).astype(np.float32)
    want, got = (onnx.reference.ReferenceEvaluator(model).run(None, {"x": x})[0] for model in (before, after))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)  # float32 sums in another order


def test_dict_outputs_keep_their_names(tmp_path: Path) -> None:
    delivery = export(Segmenter(), tmp_path / "a.onnx", example_inputs=IMAGE)
    outputs = session(delivery.path).get_outputs()
    assert [(entry.name, entry.type) for entry in outputs] == [
        ("out", "tensor(float)"),
        ("aux_0", "tensor(int64)"),
        ("aux_1", "tensor(float)"),
    ]


def test_output_names_of_plain_tensors_and_tuples() -> None:
    one = torch.zeros(1)
    assert [name for name, _ in named_outputs(one)] == ["output"]
    assert [name for name, _ in named_outputs((one, [one, 3]))] == ["output_0", "output_1_0"]


@pytest.mark.parametrize("as_keywords", [False, True])
def test_two_inputs(tmp_path: Path, as_keywords: bool) -> None:
    model = TwoInputs()
    depth = torch.zeros(1, 1, 12, 12)
    given: Any = {"scale": 2.0, "depth": depth, "picture": IMAGE} if as_keywords else (IMAGE, depth)
    delivery = export(model, tmp_path / "a.onnx", example_inputs=given)
    assert [entry.name for entry in session(delivery.path).get_inputs()][:2] == ["picture", "depth"]
    picture, depth = torch.randn(4, 3, 12, 12), torch.randn(4, 1, 12, 12)
    for got, want in zip(
        run(delivery.path, picture, depth),
        model(picture, depth, scale=2.0 if as_keywords else 1.0),
        strict=True,
    ):
        torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-5)


def test_a_dict_that_is_itself_an_argument_goes_inside_a_tuple(tmp_path: Path) -> None:
    class TakesDict(nn.Module):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return batch["image"] * 2

    delivery = export(TakesDict(), tmp_path / "a.onnx", example_inputs=({"image": IMAGE},))
    (got,) = run(delivery.path, torch.ones(2, 3, 12, 12))
    assert got.unique().tolist() == [2.0]


def test_half_precision_and_channels_last_are_exported_as_float32(tmp_path: Path) -> None:
    model = settled(Residual(), IMAGE).to(torch.bfloat16).to(memory_format=torch.channels_last)
    delivery = export(model, tmp_path / "a.onnx", example_inputs=IMAGE.bfloat16())
    assert {entry.type for entry in session(delivery.path).get_inputs()} == {"tensor(float)"}
    assert model.head.weight.dtype == torch.bfloat16


def test_a_weight_that_is_the_result_of_a_computation_can_be_exported(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    prune.l1_unstructured(model[0], "weight", 0.5)
    model(IMAGE)
    assert model[0].weight.grad_fn is not None
    delivery = export(model, tmp_path / "a.onnx", example_inputs=IMAGE)
    assert ops_of(delivery.path) == {"Conv": 1, "Relu": 1}
    assert model[0].weight.grad_fn is not None


def test_a_model_that_cannot_be_copied(tmp_path: Path) -> None:
    model = Residual()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ExportError, match=r"Residual cannot be copied \(TypeError: .*lock"):
        export(model, tmp_path / "a.onnx", example_inputs=IMAGE)


def test_the_input_shape_comes_from_the_record_then_from_the_images(tmp_path: Path) -> None:
    model = Residual()
    with pytest.raises(ExportError, match=r"Residual is not known; say --input-shape 1,3,224,224"):
        export(model, tmp_path / "a.onnx")
    export(model, tmp_path / "images.onnx", images=torch.randn(2, 3, 16, 16))
    update_record(model, input_shape=[1, 3, 20, 20])
    export(model, tmp_path / "record.onnx")
    shapes = [session(tmp_path / f"{name}.onnx").get_inputs()[0].shape[1:] for name in ("images", "record")]
    assert shapes == [[3, 16, 16], [3, 20, 20]]


# ---- what the file says ----------------------------------------------------------------------


def test_metadata_is_in_the_file(tmp_path: Path) -> None:
    model = Residual()
    preprocessing = {"size": 12, "mean": [0.5], "std": [0.25], "color": "rgb"}
    update_record(model, classes=["cat", "Größe"], preprocessing=preprocessing, source={"name": "torchvision:resnet18"})
    delivery = export(model, tmp_path / "a.onnx", example_inputs=IMAGE, metadata={"license": "CC0"})
    proto = onnx.load(delivery.path)
    stored = {entry.key: entry.value for entry in proto.metadata_props}
    assert stored == delivery.metadata
    assert json.loads(stored["classes"]) == ["cat", "Größe"]
    assert json.loads(stored["preprocessing"]) == preprocessing
    assert json.loads(stored["source"]) == {"name": "torchvision:resnet18"}
    assert stored["license"] == "CC0"
    assert stored["producer"].startswith("convsurgeon ")
    assert proto.producer_name == "convsurgeon"
    assert session(delivery.path).get_modelmeta().custom_metadata_map == stored


def test_metadata_says_what_was_converted(tmp_path: Path) -> None:
    student = rewrite(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)), "shift")
    metadata = export(student, tmp_path / "a.onnx", example_inputs=IMAGE).metadata
    assert json.loads(metadata["plan"]) == {"model": "Sequential", "converted": {"shift": 2}, "kept": 1}


def test_no_stack_traces_or_local_paths_are_left_in_the_file(tmp_path: Path) -> None:
    content = export(Residual(), tmp_path / "a.onnx", example_inputs=IMAGE).path.read_bytes()
    assert b"test_delivery" not in content
    assert b"site-packages" not in content


def test_metadata_must_be_strings(tmp_path: Path) -> None:
    wrong: Any = {"epochs": 3}
    with pytest.raises(ExportError, match="'epochs': a int"):
        export(Residual(), tmp_path / "a.onnx", example_inputs=IMAGE, metadata=wrong)


# ---- parity ----------------------------------------------------------------------------------


def test_images_are_compared_too(tmp_path: Path) -> None:
    model = settled(Residual(), IMAGE)
    batches = [(torch.randn(16, 3, 12, 12), torch.zeros(16)) for _ in range(3)]
    parity = export(model, tmp_path / "a.onnx", example_inputs=IMAGE, images=batches).parity
    assert parity.real_images
    assert parity.batches == (1, 3, 12, 16)


def test_images_may_be_a_batch_batches_or_pairs_and_end_at_64() -> None:
    batch = torch.arange(40.0)[:, None].expand(40, 3)
    assert gather_images(batch).shape == (40, 3)
    assert gather_images(iter([batch, batch])).shape == (64, 3)
    assert gather_images([(batch, torch.zeros(40))]).shape == (40, 3)

    def endless() -> Any:
        while True:
            yield batch, torch.zeros(40)

    assert gather_images(endless()).shape == (64, 3)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        ([], "holds no image"),
        ([torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 9, 9)], "differ in size: 2x3x8x8, then 2x3x9x9"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "got a uint8 tensor of 2x3x8x8"),
        (["cat.png"], "got a str"),
    ],
)
def test_images_that_are_none(images: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        gather_images(images)


def test_images_must_fit_the_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="images are 2x3x9x9, the example input is 1x3x12x12"):
        export(Residual(), tmp_path / "a.onnx", example_inputs=IMAGE, images=torch.randn(2, 3, 9, 9))
    inputs = (IMAGE, torch.zeros(1, 1, 12, 12))
    with pytest.raises(DataError, match="this one takes 2"):
        export(TwoInputs(), tmp_path / "a.onnx", example_inputs=inputs, images=IMAGE)
    assert not list(tmp_path.iterdir())


def test_a_disagreement_leaves_no_file_and_the_old_one_as_it_was(tmp_path: Path) -> None:
    model = settled(Residual(), IMAGE)
    old = tmp_path / "old.onnx"
    old.write_bytes(b"precious")
    for path in (old, tmp_path / "new.onnx"):
        with pytest.raises(
            ParityError, match=r"output 'output' for a batch of \d+ \(random inputs\).*at most 0;"
        ) as caught:
            export(model, path, example_inputs=IMAGE, tolerance=0.0, force=True)
        assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["old.onnx"]
    assert old.read_bytes() == b"precious"


def test_a_file_that_computes_something_else_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sabotage(proto: onnx.ModelProto) -> int:
        bias = next(tensor for tensor in proto.graph.initializer if tensor.name == "head.bias")
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 0.01, bias.name))
        return 0

    monkeypatch.setattr("convsurgeon.delivery._export.fold_batch_norms", sabotage)
    with pytest.raises(ParityError, match=r"differs from PyTorch by 0\.01"):
        export(settled(Residual(), IMAGE), tmp_path / "a.onnx", example_inputs=IMAGE)


def test_a_difference_in_the_second_output_only_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sabotage(proto: onnx.ModelProto) -> int:
        pooled = next(node for node in proto.graph.node if "aux_1" in node.output)
        pooled.output[0] = "pooled"
        proto.graph.node.append(onnx.helper.make_node("Neg", ["pooled"], ["aux_1"]))
        return 0

    monkeypatch.setattr("convsurgeon.delivery._export.fold_batch_norms", sabotage)
    with pytest.raises(ParityError, match="output 'aux_1'"):
        export(Segmenter(), tmp_path / "a.onnx", example_inputs=IMAGE)


def test_rounding_that_pytorch_shows_too_is_no_disagreement(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parity = export(Chaotic(), tmp_path / "a.onnx", example_inputs=IMAGE).parity
    assert parity.max_rel > parity.tolerance == 1e-4
    assert 1e-5 < parity.rounding < 1e-2
    assert parity.max_rel < 5 * parity.rounding


def test_rounding_is_not_asked_where_the_tolerance_is_kept(tmp_path: Path) -> None:
    parity = export(settled(Residual(), IMAGE), tmp_path / "a.onnx", example_inputs=IMAGE).parity
    assert parity.max_rel <= parity.tolerance
    assert parity.rounding == 0


@pytest.mark.parametrize("offset", [0.005, 0.1])
def test_rounding_excuses_no_other_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: float) -> None:
    def sabotage(proto: onnx.ModelProto) -> int:
        bias = next(tensor for tensor in proto.graph.initializer if tensor.name == "head.bias")
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + offset, bias.name))
        return 0

    torch.manual_seed(0)
    monkeypatch.setattr("convsurgeon.delivery._export.fold_batch_norms", sabotage)
    with pytest.raises(ParityError, match=r"expected at most 0\.0001;"):
        export(Chaotic(), tmp_path / "a.onnx", example_inputs=IMAGE)


def test_without_float64_nothing_is_excused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(ParityError, match=r"expected at most 0\.0001;"):
        export(OnlyFloat32(), tmp_path / "a.onnx", example_inputs=IMAGE)


def test_outputs_that_are_not_finite_have_their_own_sentence(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="PyTorch gives NaN or infinity, which proves nothing"):
        export(SaysNaN(), tmp_path / "a.onnx", example_inputs=IMAGE)
    assert not list(tmp_path.iterdir())


# ---- what is left alone ----------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_the_caller_and_the_process_are_as_before(tmp_path: Path, fails: bool, capfd: Any) -> None:
    model = settled(Residual(), IMAGE).double()
    model.train()
    model.stem[1].eval()
    model.head.weight.requires_grad_(False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    images = DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 3, 12, 12)), batch_size=4, shuffle=True)
    before = _process_state()
    if fails:
        with pytest.raises(ParityError):
            export(model, tmp_path / "a.onnx", example_inputs=IMAGE, images=images, tolerance=0.0)
    else:
        export(model, tmp_path / "a.onnx", example_inputs=IMAGE, images=images)
    assert _process_state() == before
    assert capfd.readouterr() == ("", "")
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {value.dtype for value in model.parameters()} == {torch.float64}


def _process_state() -> tuple[Any, ...]:
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        list(warnings.filters),
        logging.root.manager.disable,
        dict(os.environ),
    )


# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (OneBatchSize(), "cannot export OneBatchSize: its batch size is fixed by the code; "),
        (DependsOnValues(), "cannot export DependsOnValues: GuardOnDataDependentSymNode: "),
    ],
)
def test_a_network_that_cannot_be_traced(tmp_path: Path, capfd: Any, model: nn.Module, says: str) -> None:
    with pytest.raises(ExportError, match=says) as caught:
        export(model, tmp_path / "a.onnx", example_inputs=IMAGE)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_a_shape_that_the_network_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Residual cannot be called with an input of 2x4x12x12: RuntimeError"):
        export(Residual(), tmp_path / "a.onnx", example_inputs=torch.zeros(1, 4, 12, 12))


def test_arguments_that_the_forward_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="forward does not take these example inputs: TypeError"):
        export(Residual(), tmp_path / "a.onnx", example_inputs={"picture": IMAGE})


def test_weights_that_do_not_fit_into_one_file_are_refused_before_they_are_copied(tmp_path: Path) -> None:
    huge = nn.Linear(30_000, 20_000, device="meta")
    with pytest.raises(ExportError, match=r"the weights take 2\.4 GB in float32"):
        export(huge, tmp_path / "a.onnx", example_inputs=torch.zeros(1, 30_000))


def test_an_example_without_tensors(tmp_path: Path) -> None:
    for empty in ((), {}, torch.zeros(0, 3, 12, 12), torch.tensor(3.0)):
        with pytest.raises(ExportError, match="hold no tensor, or an empty one"):
            export(Residual(), tmp_path / "a.onnx", example_inputs=empty)


def test_an_existing_file_needs_force(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"")
    with pytest.raises(OutputError, match="--force"):
        export(Residual(), path, example_inputs=IMAGE)
    assert export(Residual(), path, example_inputs=IMAGE, force=True).bytes > 0


def test_the_name_must_say_onnx(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"must end in .onnx; try .*student.onnx"):
        export(Residual(), tmp_path / "student.pt", example_inputs=IMAGE)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        export(Residual(), tmp_path / "nowhere" / "a.onnx", example_inputs=IMAGE)


def test_a_full_disk_names_the_path_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(proto: Any, path: Path) -> None:
        path.write_bytes(b"ha")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(onnx, "save", fill)
    with pytest.raises(OutputError) as caught:
        export(Residual(), tmp_path / "a.onnx", example_inputs=IMAGE)
    assert str(caught.value) == f"cannot write {tmp_path / 'a.onnx'}: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_stages_are_reported(tmp_path: Path) -> None:
    events: list[Any] = []
    export(Residual(), tmp_path / "a.onnx", example_inputs=IMAGE, report=events.append)
    assert [(event.stage, event.done) for event in events] == [("export", done) for done in range(5)]
    assert {event.total for event in events} == {4}


# ---- sessions and latency --------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, b"", b"not a protobuf at all"])
def test_a_file_that_is_not_onnx(tmp_path: Path, content: bytes | None, capfd: Any) -> None:
    path = tmp_path / "a.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError, match=r"a\.onnx is not a") as caught:
        session(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A network of one convolution, and one of about a hundred times the work."""
    sizes = {"small": 2, "large": 64}
    for name, width in sizes.items():
        model = nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3), nn.Conv2d(width, 4, 3))
        export(model, tmp_path / f"{name}.onnx", example_inputs=torch.zeros(1, 3, 40, 40))
    return {name: tmp_path / f"{name}.onnx" for name in sizes}


def test_latency_ranks_by_work(files: dict[str, Path]) -> None:
    events: list[Any] = []
    timed = measure_latency(files, threads=[1, 2, 1], rounds=7, batch_size=2, report=events.append)
    assert [(latency.name, latency.threads) for latency in timed] == [
        ("small", 1),
        ("large", 1),
        ("small", 2),
        ("large", 2),
    ]
    for latency in timed:
        assert 0 < latency.low_ms <= latency.median_ms <= latency.high_ms
        assert latency.runs == 7
    assert ratio(timed, "large", "small", threads=1) > 2
    assert [event.done for event in events] == list(range(1, 15))
    assert events[-1].total == 14


def test_by_default_one_thread_and_all_are_timed(files: dict[str, Path]) -> None:
    timed = measure_latency({"small": files["small"]}, rounds=1)
    assert [latency.threads for latency in timed] == list(dict.fromkeys((1, os.cpu_count())))


def test_the_order_alternates_and_warm_up_is_not_timed(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def pretend(opened: object, feed: object, name: str) -> float:
        order.append(name)
        return float(len(order))

    monkeypatch.setattr("convsurgeon.delivery._latency._call", pretend)
    timed = measure_latency(files, threads=[1], rounds=2)
    assert order[-4:] in (["small", "large", "large", "small"], ["large", "small", "small", "large"])
    assert min(latency.low_ms for latency in timed) > 4


def test_timing_refusals(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="rounds 0"):
        measure_latency(files, rounds=0)
    with pytest.raises(ExportError, match="got 0 files"):
        measure_latency({})
    fixed = onnx.load(files["small"])
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(fixed, tmp_path / "fixed.onnx")
    with pytest.raises(ExportError, match="fixed: the file's batch size is fixed to 1; batch_size is 4"):
        measure_latency({"fixed": tmp_path / "fixed.onnx"}, batch_size=4)
    fixed.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    onnx.save(fixed, tmp_path / "open.onnx")
    with pytest.raises(ExportError, match="every size but the batch must be a number"):
        measure_latency({"open": tmp_path / "open.onnx"})


def test_ratio_of_what_was_not_timed() -> None:
    timed = [Latency("a", 1, 6.0, 5.0, 7.0, 50)]
    with pytest.raises(ExportError, match="'b' was not timed with threads=1; timed: 'a' with 1"):
        ratio(timed, "a", "b", threads=1)
    with pytest.raises(ExportError, match="'a' was not timed with threads=2"):
        ratio(timed, "a", "a", threads=2)


# ---- real networks ---------------------------------------------------------------------------


def test_resnet18(tmp_path: Path) -> None:
    example = torch.zeros(1, 3, 64, 64)
    model = settled(torchvision.models.resnet18(num_classes=10), example)
    delivery = export(model, tmp_path / "a.onnx", example_inputs=example, images=torch.randn(8, 3, 64, 64))
    assert delivery.batch_norms_left == 0
    assert ops_of(delivery.path)["BatchNormalization"] == 0
    assert delivery.bytes < 1.01 * 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("op", ops.names())
def test_students_of_every_op(tmp_path: Path, op: str) -> None:
    example = torch.zeros(1, 3, 64, 64)
    student = settled(rewrite(torchvision.models.resnet18(num_classes=10), op), example)
    delivery = export(student, tmp_path / "a.onnx", example_inputs=example)
    assert delivery.batch_norms_left == 0
    assert json.loads(delivery.metadata["plan"])["converted"][op] == 16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg16_bn", "densenet121", "resnet50"])
def test_classifiers(tmp_path: Path, name: str) -> None:
    example = torch.zeros(1, 3, 64, 64)
    model = settled(torchvision.models.get_model(name, num_classes=10), example)
    assert export(model, tmp_path / "a.onnx", example_inputs=example).batch_norms_left == 0


@pytest.mark.slow
def test_deeplab(tmp_path: Path) -> None:
    example = torch.zeros(1, 3, 64, 64)
    model = torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=5, aux_loss=True
    )
    delivery = export(settled(model, example), tmp_path / "a.onnx", example_inputs=example)
    assert [entry.name for entry in session(delivery.path).get_outputs()] == ["out", "aux"]
    assert delivery.batch_norms_left == 0


@pytest.mark.slow
def test_a_detector_is_refused_in_one_line(tmp_path: Path, capfd: Any) -> None:
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    with pytest.raises(ExportError, match="a detector's backbone") as caught:
        export(model, tmp_path / "a.onnx", example_inputs=torch.zeros(1, 3, 64, 64))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
