"""A training run: what comes out, what stays untouched, what is written, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Branching, Tiny, Witness, assert_bit_identical, conv, stripes, tiny
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

import convsurgeon as cs
from convsurgeon.data import ImageSet
from convsurgeon.distillation import Augmentation, RunFolder, Training, methods
from convsurgeon.distillation._loop import Run
from convsurgeon.errors import DataError, DistillationError, OptionError, UnknownNameError
from convsurgeon.evaluation import evaluate
from convsurgeon.preprocessing import Preprocessing
from convsurgeon.progress import Progress
from convsurgeon.storage import load_checkpoint

TRAIN = TensorDataset(*stripes(64))
VAL = TensorDataset(*stripes(32, seed=1))
METHODS = methods.names()
# a handful of steps is no time to warm up in
QUICK = {"batch_size": 16, "learning_rate": 0.02, "warmup": 0.0, "precision": "no", "device": "cpu"}


def couple() -> tuple[Tiny, nn.Module]:
    teacher = tiny()
    return teacher, cs.rewrite(teacher)


def run(method: str = "frozen", train: Any = TRAIN, val: Any = VAL, **settings: Any) -> Any:
    teacher, student = couple()
    return cs.distill(teacher, student, train, val, method=method, **{**QUICK, "epochs": 1, **settings})


# --- what comes out


@pytest.mark.parametrize("method", [name for name in METHODS if methods.get(name).needs_labels])
def test_every_method_makes_the_student_better(method: str) -> None:
    teacher, student = couple()
    before = evaluate(student, VAL).accuracy
    result = cs.distill(teacher, student, TRAIN, VAL, method=method, **{**QUICK, "epochs": 6})
    after = evaluate(result.student, VAL).accuracy
    assert before < 0.6
    assert after > max(0.9, before)
    assert result.metrics["student"] == after
    assert len(result.metrics["history"]) == 6
    assert result.metrics["precision"] == "no"


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("options", [{}, {"cutmix": 0.0}, {"blocks": 0.0}])
def test_without_labels_the_student_comes_to_agree_with_its_teacher(options: Any, labelled: bool) -> None:
    teacher, student = couple()  # which knows nothing
    trained = cs.distill(None, teacher, TRAIN, VAL, method="supervised", **{**QUICK, "epochs": 6}).student
    before = evaluate(student, VAL, teacher=trained).agreement
    train = TRAIN if labelled else TensorDataset(TRAIN.tensors[0])
    learnt = cs.distill(
        trained, student, train, method="imitate", method_options=options, **{**QUICK, "epochs": 12, "seed": 1}
    ).student
    after = evaluate(learnt, VAL, teacher=trained).agreement
    assert before is not None
    assert after is not None
    assert before < 0.6
    assert after > 0.9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [False, True])
def test_the_arguments_are_not_touched(method: str, training: bool) -> None:
    teacher, student = couple()
    for model in (teacher, student):
        model.train(training)
        model.norm.train(not training)
    student.conv1.requires_grad_(False)
    environment = dict(os.environ)
    witness = Witness(teacher, student)
    result = cs.distill(teacher, student, TRAIN, VAL, method=method, **{**QUICK, "epochs": 1})
    witness.check()
    assert dict(os.environ) == environment
    assert type(result.student) is Tiny
    assert not any(module.training for module in result.student.modules())
    assert list(result.student.state_dict()) == list(student.state_dict())
    for key, value in result.student.named_parameters():
        given = student.get_parameter(key)
        assert (value.dtype, value.device) == (given.dtype, given.device)
        assert value.requires_grad is given.requires_grad
        assert value.is_contiguous() == given.is_contiguous()
        assert value.untyped_storage().data_ptr() != given.untyped_storage().data_ptr()
    assert cs.plan_of(result.student) == cs.plan_of(student)
    if methods.get(method).needs_teacher:
        assert type(result.teacher) is Tiny
        assert not any(module.training for module in result.teacher.modules())
        assert all(parameter.requires_grad for parameter in result.teacher.parameters())
    else:
        assert result.teacher is None


def test_the_arguments_are_not_touched_by_a_failure() -> None:
    teacher, student = couple()
    witness = Witness(teacher, student)
    with pytest.raises(DataError):
        cs.distill(teacher, student, TensorDataset(*stripes(64)), TensorDataset(VAL[0][0]), **QUICK)
    witness.check()


def test_a_frozen_teacher_stays_bit_identical_and_a_joint_one_learns() -> None:
    teacher, student = couple()
    frozen = cs.distill(teacher, student, TRAIN, VAL, method="frozen", **{**QUICK, "epochs": 1})
    assert_bit_identical(frozen.teacher, teacher)
    joint = cs.distill(teacher, student, TRAIN, VAL, method="joint", **{**QUICK, "epochs": 1})
    changed = [k for k, v in joint.teacher.state_dict().items() if not torch.equal(v, teacher.state_dict()[k])]
    # a bias before a batch norm has no gradient but rounding
    assert set(teacher.state_dict()) - set(changed) <= {"conv1.bias"}
    assert joint.metrics["teacher_before"] == evaluate(teacher, VAL).accuracy
    assert joint.metrics["teacher_after"] == evaluate(joint.teacher, VAL).accuracy


def test_float64_is_kept() -> None:
    teacher = tiny().double()
    images, labels = stripes(32)
    data = TensorDataset(images.double(), labels)
    result = cs.distill(teacher, cs.rewrite(teacher), data, data, **{**QUICK, "epochs": 1})
    floats = {t.dtype for t in result.student.state_dict().values() if t.is_floating_point()}
    assert floats == {torch.float64}


def test_joint_is_gentle_with_a_teacher_that_beats_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float]] = []
    joint = methods.get("joint")
    set_up = joint.set_up

    def listen(self: Any, setting: Any) -> None:
        set_up(self, setting)
        seen.append((self.teacher_rate, self.mutual))

    monkeypatch.setattr(joint, "set_up", listen)
    untrained = tiny()
    trained = cs.distill(None, untrained, TRAIN, VAL, method="supervised", **{**QUICK, "epochs": 6}).student
    for teacher in (untrained, trained):
        for val in (VAL, None):
            cs.distill(teacher, cs.rewrite(teacher), TRAIN, val, method="joint", **{**QUICK, "epochs": 1})
    options = {"teacher_rate": 0.5, "mutual": 0.25}
    run("joint", method_options=options)
    assert seen == [(1.0, 1.0), (1.0, 1.0), (0.01, 0.05), (0.01, 0.05), (0.5, 0.25)]


def scripted(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> list[dict[str, Tensor]]:
    """Make validation say what we want of each epoch; return the students that it saw."""
    seen: list[dict[str, Tensor]] = []

    def accuracy(self: Any, model: nn.Module | None) -> float | None:
        if self.val is None or model is None:
            return None
        if hasattr(self, "method") and model is self.method.student:
            seen.append({key: value.clone() for key, value in model.state_dict().items()})
            return scores[len(seen) - 1]
        return 0.5

    monkeypatch.setattr(Run, "_accuracy", accuracy)
    return seen


def test_the_best_on_validation_data_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = scripted(monkeypatch, [0.5, 0.9, 0.9, 0.7])
    result = run(epochs=4)
    # a tie goes to the later epoch
    assert result.metrics["chosen"] == "student, epoch 3"
    assert result.metrics["student"] == 0.9
    assert all(torch.equal(value, seen[2][key]) for key, value in result.student.state_dict().items())
    assert not torch.equal(result.student.fc.weight, seen[3]["fc.weight"])


def test_without_validation_data_the_last_is_kept_and_that_is_said() -> None:
    events: list[Progress] = []
    result = run(val=None, epochs=2, report=events.append)
    assert result.metrics["chosen"] == "student, epoch 2"
    assert result.metrics["student"] is result.metrics["teacher_before"] is None
    assert [event.message for event in events if event.message] == ["no validation data: the last student is kept"]


def test_the_best_peer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def accuracy(self: Any, model: nn.Module | None) -> float | None:
        if not hasattr(self, "method"):
            return 0.5
        (name,) = [name for name, peer in self.method.students().items() if peer is model]
        asked.append(name)
        return {"peer 3": 0.8}.get(name, 0.1)

    monkeypatch.setattr(Run, "_accuracy", accuracy)
    result = run("ensemble")
    assert asked == ["peer 1", "peer 2", "peer 3", "peer 4"]
    assert result.metrics["chosen"] == "peer 3, epoch 1"
    assert result.metrics["history"][0]["students"]["peer 3"] == 0.8


def test_limit_batches_holds_for_training_and_validation() -> None:
    events: list[Progress] = []
    counted = Counted(VAL)
    run(epochs=2, limit_batches=1, val=DataLoader(counted, batch_size=8), report=events.append)
    assert {event.total for event in events if event.stage == "train"} == {2}
    # before, and after each of two epochs: one batch of the student's, and the teacher's once
    assert len(counted.read) == 3 * 8


class Counted(Dataset[Any]):
    """Remembers which items were read."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.read = inner, []

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return self.inner[index]


def test_each_epoch_has_its_own_order_and_each_seed_too() -> None:
    def orders(seed: int, train: Any = None) -> list[list[int]]:
        counted = Counted(TRAIN)
        run(train=counted if train is None else train(counted), epochs=2, seed=seed, val=None)
        read = counted.read[-128:]
        return [read[:64], read[64:]]

    first, second = orders(0)
    assert sorted(first) == sorted(second) == list(range(64))
    assert first != second
    assert [first, second] == orders(0)
    assert orders(1)[0] != first

    def sampled(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return orders(0, lambda data: DataLoader(data, 16, sampler=RandomSampler(data, generator=generator)))

    assert sampled(1) == sampled(2)


def test_the_generator_of_the_callers_loader_is_put_back() -> None:
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    run(train=DataLoader(TRAIN, 16, shuffle=True, generator=generator))
    assert torch.equal(generator.get_state(), before)


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    one, two, other = (run("joint", seed=seed) for seed in (0, 0, 1))
    assert_bit_identical(one.student, two.student)
    assert not torch.equal(one.student.fc.weight, other.student.fc.weight)


def test_a_last_batch_of_one_image_is_left_out_of_a_data_set() -> None:
    class Pooled(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.BatchNorm1d(128)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.conv2(torch.relu(self.norm(self.conv1(x)))))
            return self.fc(self.late(self.pool(x).flatten(1)))

    result = cs.distill(None, Pooled(), TensorDataset(*stripes(33)), method="supervised", **QUICK, epochs=1)
    assert int(result.student.norm.num_batches_tracked) == 2
    few = cs.distill(None, tiny(), TensorDataset(*stripes(3)), method="supervised", **QUICK, epochs=1)
    assert int(few.student.norm.num_batches_tracked) == 1


def test_an_image_set() -> None:
    images, labels = stripes(64)
    pixels = ((images - images.min()) / (images.max() - images.min()) * 255).to(torch.uint8)
    ready = Preprocessing(size=(8, 8), mean=(0.5,), std=(0.25,), color="gray")
    data = ImageSet(pixels, labels, classes=list("abcd"), preprocessing=ready)
    result = run(train=data, val=data, epochs=8)
    assert result.metrics["student"] > 0.8
    with pytest.raises(DataError, match="the model gives 7 scores, the training data has 4 classes"):
        cs.distill(None, tiny(classes=7), data, method="supervised", **QUICK)


def test_augmentation_is_one_for_teacher_and_student() -> None:
    seen: dict[str, list[Tensor]] = {"teacher": [], "student": []}

    class Spy(Tiny):
        def __init__(self, who: str) -> None:
            super().__init__()
            self.who = who

        def forward(self, x: Tensor) -> Tensor:
            if self.norm.training or self.who == "teacher":
                seen[self.who].append(x.detach().clone())
            return super().forward(x)

    shift = Augmentation(shift=2, flip=True)
    cs.distill(
        *(Spy("teacher"), Spy("student"), TRAIN),
        method="frozen",
        augmentation=shift,
        **{**QUICK, "epochs": 1},
    )
    assert len(seen["student"]) == 4
    for mine, theirs in zip(seen["student"], seen["teacher"][-4:], strict=True):
        assert torch.equal(mine, theirs)
    known = {image.numpy().tobytes() for image in TRAIN.tensors[0]}
    assert sum(image.contiguous().numpy().tobytes() in known for batch in seen["student"] for image in batch) < 32


def test_augmentation_moves_by_whole_pixels_and_mirrors() -> None:
    x = torch.arange(64.0).reshape(1, 1, 8, 8).repeat(64, 1, 1, 1)
    assert Augmentation()(x) is x
    flipped = Augmentation(flip=True)(x)
    kinds = {tuple(image.flatten().tolist()) for image in flipped}
    assert kinds == {tuple(x[0].flatten().tolist()), tuple(x[0].flip(-1).flatten().tolist())}
    moved = Augmentation(shift=1)(x)
    corners = {int(image[0, 3, 3]) for image in moved}
    assert corners == {27 + 8 * dy + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    assert Augmentation.usual((32, 32), flip=True) == Augmentation(shift=4, flip=True)
    with pytest.raises(OptionError, match="shift must be 0 or more"):
        Augmentation(shift=-1)


def test_rates_rise_and_fall() -> None:
    settings = Training(warmup=0.2)
    rates = [settings.rate_at(step, 1000) for step in range(1000)]
    assert rates[:2] == [0.005, 0.01]
    assert rates[199:201] == [1.0, 1.0]
    assert all(a >= b for a, b in itertools.pairwise(rates[200:]))
    assert rates[600] == pytest.approx(0.5)
    assert 0 < rates[999] < 0.001


def test_a_short_run_stays_below_the_peak() -> None:
    rates = [Training(warmup=0.2).rate_at(step, 20) for step in range(20)]
    assert rates[:2] == [1 / 80, 2 / 80]
    assert max(rates) < 0.15
    assert Training(warmup=0).rate_at(0, 20) == 1.0


def test_a_method_knows_how_much_of_the_run_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = methods.get("frozen").forward

    def note(self: Any, images: Tensor, labels: Tensor) -> Any:
        seen.append(self.progress)
        return forward(self, images, labels)

    monkeypatch.setattr(methods.get("frozen"), "forward", note)
    run(epochs=2)
    assert seen == [step / 8 for step in range(8)]


def test_progress_reports() -> None:
    events: list[Progress] = []
    run("joint", epochs=2, report=events.append)
    epochs = [event for event in events if event.stage == "epoch"]
    assert [(event.done, event.total) for event in epochs] == [(1, 2), (2, 2)]
    assert {"loss", "student_accuracy", "teacher_accuracy"} <= set(epochs[0].figures)
    training = [event for event in events if event.stage == "train"]
    assert {event.total for event in training} == {8}
    assert {"loss", "student_accuracy", "teacher_accuracy", "images_per_second", "seconds_left"} <= set(
        training[0].figures
    )


# --- precision


def test_a_second_run_in_one_process_may_have_another_precision() -> None:
    dtypes: list[torch.dtype] = []

    class Spy(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            found = self.conv1(x)
            if self.norm.training:
                dtypes.append(found.dtype)
            return super().forward(x)

    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16), ("no", torch.float32)):
        dtypes.clear()
        settings = {**QUICK, "precision": precision, "epochs": 1}
        result = cs.distill(None, Spy(), TRAIN, VAL, method="supervised", **settings)
        assert result.metrics["precision"] == precision
        assert set(dtypes) == {dtype}
        assert result.student.fc.weight.dtype == torch.float32


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(DistillationError, match="fp16 needs a GPU; on a CPU use bf16 or no"):
        run(precision="fp16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(DistillationError, match="torch finds none; use --device cpu"):
        run(device="cuda")
    with pytest.raises(DistillationError, match="device must be cpu or cuda, got 'tpu'"):
        run(device="tpu")


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"method": "jont"}, UnknownNameError, r"unknown method 'jont'\. Did you mean 'joint'\?"),
        ({"objective": "kdd"}, UnknownNameError, r"unknown objective 'kdd'\. Did you mean 'kd'\?"),
        ({"method_options": {"wight": 1}}, OptionError, r"frozen has no option 'wight'\. Did you mean"),
        ({"objective_options": {"x": 1}}, OptionError, "kd has no option 'x'"),
        ({"epochs": 0}, OptionError, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, OptionError, "batch_size must be at least 1"),
        ({"limit_batches": 0}, OptionError, "limit_batches must be at least 1"),
        ({"optimizer": "adam"}, OptionError, "optimizer must be one of sgd, muon, got 'adam'"),
        ({"learning_rate": 0.0}, OptionError, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, OptionError, "learning_rate must be above 0"),
        ({"momentum": -0.1}, OptionError, "momentum must be from 0"),
        ({"weight_decay": -1.0}, OptionError, "weight_decay must be 0 or more"),
        ({"warmup": 1.0}, OptionError, "warmup must be a share"),
        ({"precision": "int8"}, OptionError, "precision must be one of auto, no, bf16, fp16, got 'int8'"),
        ({"resume": True}, DistillationError, "resume=True needs the run_dir"),
        ({"train": [1]}, DataError, "train must be a DataLoader or a Dataset, got list"),
        ({"val": 3}, DataError, "validation: "),
        ({"train": TensorDataset(torch.ones(0, 1, 8, 8), torch.ones(0))}, DataError, "train has no batch"),
        ({"train": DataLoader(TRAIN, 100, drop_last=True)}, DataError, "train has no batch"),
        ({"train": TensorDataset(torch.ones(8, 1, 8, 8))}, DataError, r"must be \(images, labels\)"),
        (
            {"train": TensorDataset(torch.ones(8, 3, 8, 8), TRAIN.tensors[1][:8])},
            DataError,
            "images of 3x8x8",
        ),
        (
            {"train": TensorDataset(torch.ones(8, 1, 8, 8), torch.rand(8))},
            DataError,
            "labels must be one class",
        ),
        (
            {"train": TensorDataset(torch.ones(8, 1, 8, 8), torch.ones(8, 4, dtype=torch.long))},
            DataError,
            "labels must be one class number for each image",
        ),
        (
            {"train": TensorDataset(torch.ones(8, 1, 8, 8), torch.arange(8))},
            DataError,
            "the student gives 4 scores, the training labels run from 0 to 7",
        ),
        ({"val": TensorDataset(torch.ones(8, 1, 8, 8), torch.arange(8))}, DataError, "validation: .* 4 .* 7"),
    ],
)
def test_refused(settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    arguments = {"run_dir": tmp_path / "run", **settings}
    if "resume" in settings:
        del arguments["run_dir"]
    with pytest.raises(error, match=message) as caught:
        run(**arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_label_without_a_score_that_comes_late() -> None:
    images, labels = stripes(64)
    labels[-1] = 9
    loader = DataLoader(TensorDataset(images, labels), 16)
    with pytest.raises(DataError, match="the student gives 4 scores, the training labels run from 0 to 9"):
        run(train=loader)


def test_a_stream_without_a_length() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(TRAIN)

    for train in (Stream(), DataLoader(Stream(), 16)):
        with pytest.raises(DataError, match="train must have a length"):
            run(train=train)


def test_a_teacher_that_is_missing_or_does_not_fit() -> None:
    with pytest.raises(DistillationError, match="method 'frozen' needs a teacher, got None"):
        cs.distill(None, tiny(), TRAIN, method="frozen", **QUICK)
    with pytest.raises(DistillationError, match="the teacher gives 10 scores, the student 4"):
        cs.distill(tiny(classes=10), tiny(), TRAIN, method="joint", **QUICK)
    with pytest.raises(DataError, match="the teacher cannot take the training images of 1x8x8"):
        cs.distill(tiny(channels=3), tiny(), TRAIN, method="joint", **QUICK)


@pytest.mark.parametrize("method", ["supervised", "joint", "frozen", "imitate"])
def test_a_student_that_is_frozen_as_a_whole_is_trained(method: str) -> None:
    teacher, said = tiny(1).requires_grad_(False), []
    student = tiny().requires_grad_(False)
    result = cs.distill(teacher, student, TRAIN, method=method, report=said.append, **QUICK)
    assert [each.message for each in said if "requires_grad=False" in each.message] == [
        "every parameter of the student has requires_grad=False, as in an average of weights: all are trained"
    ]
    assert not torch.equal(result.student.conv2.weight, student.conv2.weight)
    assert not any(parameter.requires_grad for parameter in (*student.parameters(), *result.student.parameters()))
    if result.teacher is not None:
        assert torch.equal(result.teacher.conv2.weight, teacher.conv2.weight)


def test_outputs_that_are_no_classes_are_imitated_beside_validation_data() -> None:
    """Whose labels are class numbers, and fewer than the network gives numbers."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 16), nn.Tanh())
    result = cs.distill(teacher, cs.rewrite(teacher, mapping={"0": "lowrank"}), TRAIN, VAL, method="imitate", **QUICK)
    assert result.metrics["history"]


def test_a_student_with_nothing_to_train() -> None:
    student = nn.Flatten()
    with pytest.raises(DistillationError, match="there is nothing to train"):
        cs.distill(None, student, TensorDataset(torch.randn(8, 4), torch.arange(8) % 4), method="supervised", **QUICK)


def test_a_network_without_a_graph_cannot_join_an_ensemble() -> None:
    class Switch(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.raises(DistillationError, match=r"ensemble needs the graph of Switch: .*use --method joint"):
        cs.distill(None, Switch(), TRAIN, method="ensemble", **QUICK)
    cs.distill(Switch(), Switch(), TRAIN, method="joint", **{**QUICK, "epochs": 1})


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    images, labels = stripes(64)
    images[:] = float("nan")
    with pytest.raises(DistillationError, match=r"the loss is nan at step .: training diverged"):
        run(train=TensorDataset(images, labels), val=None, run_dir=tmp_path / "run", epochs=3)
    assert not (tmp_path / "run" / "best.pt").exists()


# --- the run folder


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_a_run_writes(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    result = run("joint", epochs=3, run_dir=folder, augmentation=Augmentation(shift=1))
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.pt",
        "config.json",
        "last.pt",
        "metrics.jsonl",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["method"] == "joint"
    assert config["epochs"] == 3
    assert config["augmentation"] == {"shift": 1, "flip": False}
    assert config == RunFolder.read_config(folder)
    events = lines(folder)
    assert [event["event"] for event in events] == ["start", "epoch", "epoch", "epoch"]
    assert [event["step"] for event in events] == [0, 4, 8, 12]
    history = [{key: value for key, value in event.items() if key != "step"} for event in events[1:]]
    assert history == result.metrics["history"]
    student = couple()[1]
    student.load_state_dict(load_checkpoint(folder / "best.pt"))
    assert_bit_identical(student, result.student)
    assert load_checkpoint(folder / "last.pt")["step"] == 12


def test_nothing_is_written_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_fine_and_one_with_a_run_is_not(tmp_path: Path) -> None:
    run(run_dir=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DistillationError, match="holds a run already; go on with it by --resume"):
        run(run_dir=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "best.pt").write_text("mine")
    with pytest.raises(
        DistillationError, match=r"holds other files \(best.pt\); a run is written into a new or an empty"
    ):
        run(run_dir=tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("best.pt", "mine")]


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(run_dir=tmp_path, tensorboard=True, epochs=2)
    (file,) = (tmp_path / "tensorboard").iterdir()
    events = EventAccumulator(str(file)).Reload()
    losses = events.Scalars("loss")
    assert [each.step for each in losses] == [4, 8]
    assert [each.value for each in losses] == pytest.approx([h["loss"] for h in result.metrics["history"]])


def test_nothing_is_resumed_where_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DistillationError, match="holds no run to resume"):
        run(run_dir=tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_a_run_is_resumed_with_its_own_settings_data_and_networks(tmp_path: Path) -> None:
    run(run_dir=tmp_path, epochs=2)
    with pytest.raises(DistillationError, match=r"other settings: epochs was 2, now 3; resume with the same"):
        run(run_dir=tmp_path, epochs=3, resume=True)
    with pytest.raises(DistillationError, match="other settings: method was 'frozen', now 'joint'"):
        run("joint", run_dir=tmp_path, epochs=2, resume=True)
    with pytest.raises(DistillationError, match="has 8 steps, with these training data it would have 2"):
        run(train=TensorDataset(*stripes(16)), run_dir=tmp_path, epochs=2, resume=True)
    other = nn.Sequential(conv(1, 8), nn.Flatten(), nn.Linear(512, 4))
    settings = {**QUICK, "epochs": 2, "method": "frozen", "run_dir": tmp_path, "resume": True}
    with pytest.raises(DistillationError, match="does not fit these networks") as caught:
        cs.distill(tiny(), other, TRAIN, VAL, **settings)
    assert "\n" not in str(caught.value)


def test_a_finished_run_gives_the_same_result_again(tmp_path: Path) -> None:
    first = run("joint", run_dir=tmp_path, epochs=2)
    again = run("joint", run_dir=tmp_path, epochs=2, resume=True)
    assert_bit_identical(first.student, again.student)
    assert_bit_identical(first.teacher, again.teacher)
    assert again.metrics == first.metrics
    assert len(lines(tmp_path)) == 3


def test_what_was_noted_after_the_checkpoint_is_forgotten(tmp_path: Path) -> None:
    run(run_dir=tmp_path, epochs=2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "event": "epoch"}\n{"step": 8, "ev')
    run(run_dir=tmp_path, epochs=2, resume=True)
    assert [event["step"] for event in lines(tmp_path)] == [0, 4, 8]


def test_objective_options_reach_the_loss() -> None:
    mild = run(objective_options={"temperature": 1.0})
    assert not torch.equal(mild.student.fc.weight, run().student.fc.weight)
    assert mild.metrics["history"][0]["loss"] != run().metrics["history"][0]["loss"]


def test_a_student_with_control_flow_trains() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.widen = conv(1, 8)
            self.body = Branching()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(self.widen(x)).mean((2, 3)))

    teacher = Head()
    result = cs.distill(teacher, cs.rewrite(teacher), TRAIN, VAL, **{**QUICK, "epochs": 1})
    assert type(result.student) is Head
