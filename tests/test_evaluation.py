"""Accuracy and agreement on logits made by hand, and what evaluation leaves behind."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from convsurgeon.data import DataSplits, ImageSet
from convsurgeon.errors import ConvSurgeonError, DataError, ModelError, OptionError
from convsurgeon.evaluation import Evaluation, check_head, evaluate, logits_of
from convsurgeon.preprocessing import Preprocessing

# each "image" is 1x1x3: its three pixels are its logits
LOGITS = torch.tensor([[3.0, 1, 0], [0, 2, 1], [0, 1, 5], [9, 1, 2], [1, 0, 7]])
IMAGES = LOGITS[:, None, None, :]
LABELS = torch.tensor([0, 1, 2, 1, 0])  # three of five are right


def answer(images):
    return images.flatten(1)


class Net(nn.Module):
    def __init__(self, fail: bool = False):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.drop = nn.Dropout(0.9)
        self.scale = nn.Parameter(torch.ones(3))
        self.fail = fail

    def forward(self, images):
        if self.fail:
            raise KeyError("broken")
        assert not torch.is_grad_enabled()
        assert not self.training
        return self.drop(self.norm(images.flatten(1))) * self.scale


def test_accuracy_of_hand_made_logits():
    assert evaluate(answer, [(IMAGES, LABELS)]) == Evaluation(5, 0.6, None)


def test_batches_add_up_by_image_not_by_batch():
    batches = [(IMAGES[:4], LABELS[:4]), (IMAGES[4:], LABELS[4:])]
    assert evaluate(answer, batches) == Evaluation(5, 0.6, None)


def test_agreement_counts_equal_answers():
    def teacher(images):
        return images.flatten(1)[:, [1, 0, 2]]  # right where the highest score is the last

    assert evaluate(answer, [(IMAGES, LABELS)], teacher=teacher) == Evaluation(5, 0.6, 2 / 5)


def test_nan_is_wrong_and_agrees_with_nothing():
    images = IMAGES.clone()
    images[0, 0, 0, 2] = float("nan")  # label 0, which scores highest still
    images[2, 0, 0, 2] = float("nan")  # torch's argmax would call this one right
    assert evaluate(answer, [(images, LABELS)], teacher=answer) == Evaluation(5, 0.2, 0.6)


def test_infinite_scores_are_scores():
    assert evaluate(answer, [(torch.tensor([[[[1.0, float("inf"), 0]]]]), torch.tensor([1]))]).accuracy == 1


def test_limit_reads_no_more_than_it_says():
    read = []

    def batches():
        for i in range(5):
            read.append(i)
            yield IMAGES[i : i + 1], LABELS[i : i + 1]

    assert evaluate(answer, batches(), limit_batches=2) == Evaluation(2, 1.0)
    assert read == [0, 1]
    with pytest.raises(OptionError, match="limit_batches must be at least 1, not 0"):
        evaluate(answer, batches(), limit_batches=0)


@pytest.mark.parametrize("train", [True, False])
def test_modes_come_back_one_by_one(train):
    net = Net().train(train)
    net.norm.train(not train)
    before = copy.deepcopy(net.state_dict())
    evaluate(net, [(IMAGES, LABELS)], teacher=net)
    assert (net.training, net.norm.training, net.drop.training) == (train, not train, train)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_modes_come_back_after_a_failure():
    net, teacher = Net(), Net(fail=True)
    net.drop.eval()
    teacher.norm.eval()
    with pytest.raises(KeyError, match="broken"):
        evaluate(net, [(IMAGES, LABELS)], teacher=teacher)
    assert (net.training, net.norm.training, net.drop.training) == (True, True, False)
    assert (teacher.training, teacher.norm.training, teacher.drop.training) == (True, False, True)
    assert torch.is_grad_enabled()


def test_a_network_that_caches_stays_trainable():
    class Caching(Net):
        def forward(self, images):
            if not hasattr(self, "grid"):
                self.grid = torch.ones(3) * 2
            return images.flatten(1) * (self.grid * self.scale)

    net = Caching()
    evaluate(net, [(IMAGES, LABELS)])
    net(IMAGES).sum().backward()
    assert net.scale.grad is not None


def test_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    evaluate(answer, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=2, shuffle=True))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_exhausted_or_empty_source_is_an_error():
    for empty in ([], iter(()), [(IMAGES[:0], LABELS[:0])]):
        with pytest.raises(DataError, match="no image to evaluate on"):
            evaluate(answer, empty)


def test_data_of_every_kind():
    expected = Evaluation(5, 0.6)
    dataset = TensorDataset(IMAGES, LABELS)
    assert evaluate(answer, dataset, batch_size=2) == expected
    assert evaluate(answer, DataLoader(dataset, batch_size=2)) == expected
    assert evaluate(answer, (pair for pair in [(IMAGES, LABELS)])) == expected
    assert evaluate(answer, [[IMAGES.numpy(), LABELS.numpy()]]) == expected


def test_an_image_set_goes_in_batches_of_the_asked_size():
    identity = Preprocessing((1, 3), (0.0,), (1.0,), color="gray")
    images = ImageSet(IMAGES.to(torch.uint8), LABELS, classes="abc", preprocessing=identity)
    sizes = []

    def watch(batch):
        sizes.append(len(batch))
        return batch.flatten(1)

    assert evaluate(watch, images, batch_size=2) == Evaluation(5, 0.6)
    assert sizes == [2, 2, 1]
    with pytest.raises(DataError, match="the model gives 2 scores, the data has 3 classes"):
        evaluate(lambda batch: batch.flatten(1)[:, :2], images)


def test_progress_counts_batches():
    events = []
    evaluate(answer, [(IMAGES[:2], LABELS[:2]), (IMAGES[2:], LABELS[2:])], report=events.append)
    assert [(event.stage, event.done, event.total) for event in events] == [
        ("evaluate", 1, 2),
        ("evaluate", 2, 2),
    ]
    assert [event.figures["accuracy"] for event in events] == [1.0, 0.6]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (IMAGES, "must be .images, labels., not an object of type Tensor"),
        ((IMAGES,), "must be .images, labels., not an object of type tuple"),
        ((IMAGES, LABELS[:3]), r"one class number for each of the images \(5, 1, 1, 3\)"),
        ((IMAGES, LABELS.float()), "not torch.float32"),
        ((IMAGES, LABELS + 1), "gives 3 scores, the labels run from 1 to 3"),
        ((IMAGES, LABELS - 1), "the labels run from -1 to 1"),
    ],
)
def test_malformed_batches_are_data_errors(batch, message):
    with pytest.raises(DataError, match=message) as caught:
        evaluate(answer, [batch])
    assert "\n" not in str(caught.value)


def test_other_things_are_refused_in_one_line():
    splits = DataSplits("x", None, None, None, (), None, False)
    with pytest.raises(DataError, match=r"one split, such as data\.test"):
        evaluate(answer, splits)
    with pytest.raises(DataError, match="object of type int"):
        evaluate(answer, 3)
    with pytest.raises(ModelError, match="cannot evaluate an object of type int"):
        evaluate(3, [(IMAGES, LABELS)])
    with pytest.raises(ModelError, match=r"only \.onnx files"):
        evaluate("net.pt", [(IMAGES, LABELS)])
    with pytest.raises(ModelError, match=r"gone\.onnx does not exist"):
        evaluate("gone.onnx", [(IMAGES, LABELS)])
    with pytest.raises(ModelError, match=r"answers 5 images with shape \(5, 1, 1, 3\)"):
        evaluate(lambda images: images, [(IMAGES, LABELS)])


def test_a_network_that_cannot_take_the_images_says_so():
    with pytest.raises(ModelError, match=r"the model cannot take images of 1x1x3 \(torch\.float32\): Runtime"):
        evaluate(nn.Conv2d(3, 8, 1), [(IMAGES, LABELS)])


def test_logits_are_found_in_what_models_answer():
    for output in (
        LOGITS,
        (LOGITS, "aux"),
        [LOGITS],
        {"logits": LOGITS},
        {"out": LOGITS, "aux": LABELS},
        SimpleNamespace(logits=LOGITS),
    ):
        assert logits_of(output) is LOGITS
    for output in (None, (), [3], {"boxes": LOGITS}, "text"):
        with pytest.raises(ModelError, match="the model answers with an object of type"):
            logits_of(output)


def test_check_head_names_both_numbers():
    check_head(10, 10)
    with pytest.raises(ConvSurgeonError, match="gives 1000 scores, fashion-mnist has 10 classes"):
        check_head(1000, 10, data="fashion-mnist")


def test_modules_of_another_precision_get_their_own():
    net = Net().to(torch.float64)
    assert evaluate(net, [(IMAGES, LABELS)]) == Evaluation(5, 0.6)
    assert evaluate(Net().to(torch.bfloat16), [(IMAGES, LABELS)]) == Evaluation(5, 0.6)


def test_another_device_gets_a_copy():
    net = Net()

    class Spy(nn.Module):
        def forward(self, images):
            raise AssertionError(f"on {images.device}")

    with pytest.raises(ModelError, match="on meta"):
        evaluate(nn.Sequential(net.norm, Spy()), [(IMAGES.flatten(1), LABELS)], device="meta")
    assert net.norm.running_mean.device.type == "cpu"
    assert evaluate(net, [(IMAGES, LABELS)], device="cpu") == Evaluation(5, 0.6)


@pytest.fixture(params=["batch", 2, 1])
def onnx_file(tmp_path, request):
    """A file that flattens; its batch dimension is free, or fixed at 2 or 1."""
    from onnx import TensorProto, checker, helper, save

    graph = helper.make_graph(
        [helper.make_node("Flatten", ["pixels"], ["scores"])],
        "flatten",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [request.param, 1, 1, 3])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [request.param, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    checker.check_model(model)
    save(model, tmp_path / "flatten.onnx")
    return tmp_path / "flatten.onnx"


def test_onnx_files_and_sessions_are_evaluated(onnx_file):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    for model in (onnx_file, str(onnx_file), session):
        assert evaluate(model, [(IMAGES.double(), LABELS)], teacher=answer) == Evaluation(5, 0.6, 1.0)
    with pytest.raises(ModelError, match=r"the ONNX model takes \w+x1x1x3, and failed on \dx1x2x3"):
        evaluate(session, [(torch.zeros(5, 1, 2, 3), LABELS)])


def test_a_broken_onnx_file_is_named(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"bad\.onnx cannot be opened by onnxruntime") as caught:
        evaluate(tmp_path / "bad.onnx", [(IMAGES, LABELS)])
    assert "\n" not in str(caught.value)
