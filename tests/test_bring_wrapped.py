"""Networks that come wrapped, compiled or traced: every kind through every verb."""

import copy

import onnxruntime
import pytest
import torch
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import TensorDataset

import convsurgeon as cs
from convsurgeon.surgery import unwrap

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.norm(self.body(self.stem(x).relu())).relu().mean((2, 3)))


class Subclassed(nn.DataParallel):
    pass


def compiled_in_place():
    net = Net()
    net.compile(backend="eager")
    return net


def images():
    return torch.randn(24, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def data():
    return TensorDataset(images(), torch.arange(24) % 4)


def exported():
    batch = torch.export.Dim("batch")
    return torch.export.export(Net().eval(), (images(),), dynamic_shapes=({0: batch},)).module()


WRAPPED = {
    "AveragedModel": (lambda: AveragedModel(Net()), "module"),
    "AveragedModel with EMA": (lambda: AveragedModel(Net(), use_buffers=True), "module"),
    "ModelEmaV2": (lambda: ModelEmaV2(Net()), "module"),
    "ModelEmaV3": (lambda: ModelEmaV3(Net()), "module"),
    "DataParallel": (lambda: nn.DataParallel(Net()), "module"),
    "a subclass of DataParallel": (lambda: Subclassed(Net()), "module"),
    "torch.compile": (lambda: torch.compile(Net(), backend="eager"), "_orig_mod"),
    "DataParallel of torch.compile": (lambda: nn.DataParallel(torch.compile(Net(), backend="eager")), "module"),
    "AveragedModel of DataParallel": (lambda: AveragedModel(nn.DataParallel(Net())), "module"),
}
PLAIN = {
    "Net": Net,
    "compile() in place": compiled_in_place,
    "fx.GraphModule": lambda: torch.fx.symbolic_trace(Net()),
}
NO_MODULE = {"ModelEma": lambda: ModelEma(Net())}
WITHOUT_LAYERS = {
    "scripted": (lambda: torch.jit.script(Net()), "give the network that it was scripted or traced from"),
    "traced": (lambda: torch.jit.trace(Net().eval(), images()), "give the network that it was scripted or traced from"),
    "a scripted one in DataParallel": (
        lambda: nn.DataParallel(torch.jit.script(Net())),
        "give the network that it was scripted or traced from",
    ),
    "exported": (exported, "cs.load('net.pt2') after torch.export.save(program, 'net.pt2')"),
}
each_wrapper = pytest.mark.parametrize("kind", WRAPPED)
each = pytest.mark.parametrize("kind", [*WRAPPED, *PLAIN, *NO_MODULE])


def make(kind):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        made = ({name: make for name, (make, _) in WRAPPED.items()} | PLAIN | NO_MODULE)[kind]
        return made()


def converted(kind, **kwargs):
    return cs.rewrite(make(kind), "depthwise", example_inputs=images(), **kwargs)


def lines(events, stage):
    return [event.message for event in events if event.stage == stage and "is wrapped in" in event.message]


@each
def test_rewrite(kind):
    model, events = make(kind), []
    before = copy.deepcopy(unwrap(model)[0].state_dict())
    student = cs.rewrite(model, "depthwise", example_inputs=images(), report=events.append)
    assert type(student) is (Net if kind in NO_MODULE else type(model)) or kind == "fx.GraphModule"
    assert lines(events, "rewrite") == (
        ["the model is wrapped in ModelEma: the Net inside is used, not the wrapper"] if kind in NO_MODULE else []
    )
    inside, path = unwrap(student)
    assert type(inside.body).__name__ == "DepthwiseConv2d"
    assert [decision.fqn for decision in cs.plan_of(inside).converted] == ["body"]
    assert [decision.fqn for decision in cs.plan_of(student).converted] == [".".join((*path, "body"))]
    torch.testing.assert_close(unwrap(model)[0].state_dict(), before)
    assert cs.survey(model, example_inputs=images()).sites[1].macs
    plan = cs.plan(model, "depthwise")
    assert len(plan.converted) == 1
    assert type(cs.rewrite(model, plan)) is type(student) or kind == "fx.GraphModule"


@each_wrapper
def test_a_second_rewrite_remembers_both(kind):
    student = cs.rewrite(make(kind), "depthwise", example_inputs=images())
    again = cs.rewrite(
        student, "none", mapping={"*stem": "group"}, options={"group.groups": 3}, example_inputs=images()
    )
    inside, path = unwrap(again)
    for model, prefix in ((inside, ""), (again, "".join(f"{name}." for name in path))):
        assert {each.fqn: each.op for each in cs.plan_of(model).converted} == {
            f"{prefix}stem": "group",
            f"{prefix}body": "depthwise",
        }


@pytest.mark.parametrize("kind", [*WRAPPED, *PLAIN, *NO_MODULE, *WITHOUT_LAYERS])
def test_evaluate(kind):
    model = make(kind) if kind not in WITHOUT_LAYERS else WITHOUT_LAYERS[kind][0]()
    network = unwrap(model)[0]
    modes = [module.training for module in network.modules()]
    found = cs.evaluate(model, data(), teacher=model)
    assert [module.training for module in network.modules()] == modes
    if kind not in ("exported", "scripted", "traced"):
        network.eval()
    with torch.no_grad():
        right = (network(images()).argmax(1) == torch.arange(24) % 4).float().mean()
    assert found.accuracy == pytest.approx(float(right))
    assert found.agreement == 1


class AverageThatIsNoModule:
    def __init__(self, net):
        self.ema, self.updates = copy.deepcopy(net).eval(), 3


def test_an_average_that_is_no_module_of_another_library():
    events = []
    student = cs.rewrite(AverageThatIsNoModule(Net()), "depthwise", example_inputs=images(), report=events.append)
    assert type(student) is Net
    assert lines(events, "rewrite") == [
        "the model is wrapped in AverageThatIsNoModule: the Net inside is used, not the wrapper"
    ]


def test_a_teacher_of_another_library_that_holds_the_network():
    class Lightning(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Net()

        def forward(self, x):
            return self.model(x)

    with pytest.raises(
        cs.errors.CalibrationError, match=r"no convolution 'body'; it has 'model.body': give its model;"
    ):
        cs.calibrate(Lightning(), cs.rewrite(Net(), "depthwise", example_inputs=images()), images(), polish=False)


SIDES = {"both": (True, True), "teacher": (True, False), "student": (False, True)}


def pair(kind, side):
    teacher, student = SIDES[side]
    plain = make("Net")
    return (
        make(kind) if teacher else plain,
        converted(kind) if student else cs.rewrite(plain, "depthwise", example_inputs=images()),
    )


def expected_lines(kind, side):
    if kind in PLAIN:
        return []
    name = type(make(kind)).__name__
    inside = type(unwrap(make(kind))[0]).__name__
    roles = [role for role, wrapped in zip(("teacher", "student"), SIDES[side], strict=True) if wrapped]
    roles = [role for role in roles if not (role == "student" and kind in NO_MODULE)]  # rewrite has unwrapped it
    return [f"the {role} is wrapped in {name}: the {inside} inside is used, not the wrapper" for role in roles]


@each
@pytest.mark.parametrize("side", SIDES)
def test_calibrate(kind, side):
    teacher, student = pair(kind, side)
    events = []
    before = copy.deepcopy(student.state_dict())
    got = cs.calibrate(teacher, student, images(), polish=False, report=events.append)
    assert lines(events, "calibrate") == expected_lines(kind, side)
    assert unwrap(got)[1] == ()
    assert [decision.fqn for decision in cs.plan_of(got).converted] == ["body"]
    torch.testing.assert_close(student.state_dict(), before)
    target, near, far = (unwrap(net)[0].eval()(images()) for net in (teacher, got, student))
    assert (near - target).norm() < (far - target).norm()


@each
@pytest.mark.parametrize(
    ("side", "method"), [("both", "joint"), ("teacher", "frozen"), ("student", "imitate"), ("both", "imitate")]
)
def test_distill(kind, side, method):
    teacher, student = pair(kind, side)
    if kind in NO_MODULE:
        unwrap(student)[0].requires_grad_()  # timm freezes its average
        unwrap(teacher)[0].requires_grad_()
    events = []
    before = copy.deepcopy(student.state_dict())
    result = cs.distill(
        *(teacher, student, data()), epochs=1, batch_size=12, method=method, learning_rate=0.01, report=events.append
    )
    assert lines(events, "distill") == expected_lines(kind, side)
    assert [decision.fqn for decision in cs.plan_of(result.student).converted] == ["body"]
    torch.testing.assert_close(student.state_dict(), before)
    assert not torch.equal(result.student.state_dict()["head.weight"], unwrap(student)[0].state_dict()["head.weight"])


@each
def test_ensemble(kind):
    student = converted(kind)
    unwrap(student)[0].requires_grad_()
    result = cs.distill(None, student, data(), epochs=1, batch_size=12, method="ensemble")
    assert [decision.fqn for decision in cs.plan_of(result.student).converted] == ["body"]


@each
def test_save_a_pickle(kind, tmp_path):
    student = converted(kind).eval()
    cs.save(student, tmp_path / "net.pt")
    found = cs.load(tmp_path / "net.pt", trust=True).eval()
    assert type(found).__name__ == type(student).__name__
    torch.testing.assert_close(unwrap(found)[0](images()), unwrap(student)[0](images()))
    assert cs.plan_of(found) == cs.plan_of(student)


@each
def test_save_a_program(kind, tmp_path):
    student, events = converted(kind).eval(), []
    cs.save(student, tmp_path / "net.pt2", example_inputs=images(), report=events.append)
    assert len(lines(events, "save")) == (kind in WRAPPED)
    torch.testing.assert_close(cs.load(tmp_path / "net.pt2")(images()), unwrap(student)[0](images()))


@each_wrapper
def test_save_by_name(kind, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "named_net.py").write_text("from test_bring_wrapped import Net\n")
    model, events = cs.load("named_net:Net"), []
    wrapped = make(kind)
    holder, path = wrapped, unwrap(wrapped)[1]
    for name in path[:-1]:
        holder = getattr(holder, name)
    if path[-1] == "_orig_mod":  # which is made round its network
        wrapped = torch.compile(model, backend="eager")
    else:
        setattr(holder, path[-1], model)
    student = cs.rewrite(wrapped, "depthwise", example_inputs=images()).eval()
    cs.save(student, tmp_path / "net.safetensors", report=events.append)
    assert len(lines(events, "save")) == 1
    found = cs.load(tmp_path / "net.safetensors", trust=True).eval()
    assert type(found).__name__ == "Net"
    torch.testing.assert_close(found(images()), unwrap(student)[0](images()))


@each
def test_export(kind, tmp_path):
    student, events = converted(kind).eval(), []
    cs.export(student, tmp_path / "net.onnx", example_inputs=images(), report=events.append)
    assert len(lines(events, "export")) == (kind in WRAPPED)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    got = session.run(None, {session.get_inputs()[0].name: images().numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), unwrap(student)[0](images()).detach(), atol=1e-4, rtol=1e-3)
    assert "depthwise" in session.get_modelmeta().custom_metadata_map["plan"]


@pytest.mark.parametrize("kind", WITHOUT_LAYERS)
@pytest.mark.parametrize("verb", ["rewrite", "plan", "calibrate", "calibrate a student", "distill a student", "save"])
def test_a_network_without_layers_is_refused_in_one_sentence(kind, verb, tmp_path):
    build, what_to_do = WITHOUT_LAYERS[kind]
    model, net = build(), Net()
    student = cs.rewrite(net, "depthwise")
    verbs = {
        "rewrite": lambda: cs.rewrite(model, "depthwise", example_inputs=images()),
        "plan": lambda: cs.plan(model, "depthwise"),
        "calibrate": lambda: cs.calibrate(model, student, images()),
        "calibrate a student": lambda: cs.calibrate(net, model, images()),
        "distill a student": lambda: cs.distill(net, model, data(), epochs=1),
        "save": lambda: cs.save(model, tmp_path / "net.pt"),
    }
    with pytest.raises(cs.errors.ConvSurgeonError) as caught:
        verbs[verb]()
    assert str(caught.value).endswith(what_to_do)
    assert len(str(caught.value).splitlines()) == 1
    assert "not standard" not in str(caught.value)


@pytest.mark.parametrize("kind", ["scripted", "traced"])
@pytest.mark.parametrize("method", ["joint", "frozen", "imitate"])
def test_a_compiled_teacher_is_refused_in_one_sentence(kind, method):
    with pytest.raises(cs.errors.DistillationError, match="give the network that it was scripted or traced from"):
        cs.distill(WITHOUT_LAYERS[kind][0](), cs.rewrite(Net(), "depthwise"), data(), epochs=1, method=method)


@pytest.mark.parametrize("kind", ["scripted", "traced"])
def test_a_compiled_one_is_not_exported(kind, tmp_path):
    with pytest.raises(cs.errors.ExportError, match="give the network that it was scripted or traced from"):
        cs.export(WITHOUT_LAYERS[kind][0](), tmp_path / "net.onnx", example_inputs=images())


def test_a_graph_of_aten_operators_is_exported_and_saved(tmp_path):
    cs.export(exported(), tmp_path / "net.onnx", example_inputs=images())
    cs.save(exported(), tmp_path / "net.pt2", example_inputs=images())
    assert cs.rewrite(cs.load(tmp_path / "net.pt2"), "depthwise").training is False


def test_an_exported_one_goes_on_as_the_message_says(tmp_path):
    program = torch.export.export(Net().eval(), (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "net.pt2")
    student = cs.rewrite(cs.load(tmp_path / "net.pt2"), "depthwise", example_inputs=images())
    assert cs.plan_of(student).converted


def test_what_is_not_standard_is_said():
    class Grown(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * self.weight.mean()

    def net(*last):
        return nn.Sequential(nn.Conv1d(8, 8, 3), *last)

    with pytest.raises(cs.errors.NothingToConvertError, match=r"1 is not standard \(Conv1d is not a Conv2d\)"):
        cs.rewrite(net())
    with pytest.raises(cs.errors.NothingToConvertError, match=r"2 are not standard \(such as 0: Conv1d is not a Conv"):
        cs.rewrite(net(Grown(8, 8, 3)))


def test_a_student_that_was_wrapped_later_remembers_its_plan():
    student = cs.rewrite(Net(), "depthwise")
    for wrapped, prefix in ((nn.DataParallel(student), "module."), (AveragedModel(student), "module.")):
        assert [decision.fqn for decision in cs.plan_of(wrapped).converted] == [f"{prefix}body"]
    kept = cs.calibrate(Net(), nn.DataParallel(student), images(), polish=False)
    assert cs.plan_of(kept) == cs.plan_of(student)


def test_the_network_inside_of_a_wrapper_is_not_touched():
    inner = Net()
    wrapped = nn.DataParallel(inner)
    cs.calibrate(wrapped, cs.rewrite(wrapped, "depthwise"), images(), polish=False)
    assert wrapped.module is inner
    assert not hasattr(inner, "convsurgeon_record")
