"""The sweep: what it does with workers that die, hang or swell, what it skips and reports; and 40 models of it."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "docs" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from sweep import examine, report, rows, runner, zoo  # noqa: E402

OPS = ("depthwise", "group")
ENTRY = zoo.Entry("timm", "test_resnet", "test")
# no worker of these tests gets near it
LIMITS = runner.Limits(seconds=300, memory=8e9)

# convertible: at least one standard convolution becomes an op
CONVERTIBLE = [
    "torchvision:alexnet",
    "torchvision:densenet121",
    "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn",
    "torchvision:fcn_resnet50",
    "torchvision:googlenet",
    "torchvision:inception_v3",
    "torchvision:quantized_resnet18",
    "torchvision:raft_small",
    "torchvision:resnet18",
    "torchvision:retinanet_resnet50_fpn",
    "torchvision:squeezenet1_1",
    "torchvision:vgg11_bn",
    "timm:convnext_atto",
    "timm:cs3darknet_focus_s",
    "timm:cspresnet50",
    "timm:dla34",
    "timm:edgenext_xx_small",
    "timm:efficientformer_l1",
    "timm:efficientvit_m0",
    "timm:hrnet_w18_small",
    "timm:legacy_xception",
    "timm:nf_resnet26",
    "timm:repvgg_a0",
    "timm:res2net50_14w_8s",
    "timm:resnetv2_50",
    "timm:resnetv2_50x1_bit",
    "timm:selecsls42b",
    "timm:tf_efficientnetv2_b0",
    "timm:vovnet39a",
]
# all that these have is cheap already, or the stem
NOTHING_TO_CONVERT = [
    "torchvision:lraspp_mobilenet_v3_large",
    "torchvision:mobilenet_v2",
    "torchvision:r3d_18",
    "torchvision:regnet_y_400mf",
    "timm:efficientnet_b0",
    "timm:fastvit_t8",
    "timm:ghostnet_050",
    "timm:mixnet_s",
    "timm:swin_tiny_patch4_window7_224",
    "timm:tf_efficientnet_b0",
    "timm:vit_tiny_patch16_224",
]


def find(name: str) -> zoo.Entry:
    """Return the entry of a name, as `timm:resnet18`."""
    (entry,) = zoo.entries([name])
    return entry


def row(op: str = "depthwise", **facts: Any) -> rows.Row:
    """Return a good row, but for the facts given."""
    base = {"package": "timm", "name": "net", "op": op, "mode": "real", "preserved": "yes", "fingerprint": "f"}
    counts = {"found": 3, "standard": 2, "standard_subclass": 0, "converted": 2, "kept": {"stem": 1}}
    shown = {"without_reason": 0, "routes": {"module": 3, "fx": 3}, "untraced": [], "input": "1x3x32x32"}
    base |= {"shared_seconds": 1.0, "seconds": 0.5}
    return {**base, **counts, **shown, **facts}


def answers(entry: zoo.Entry, ops: Any, *, device: str, emit: Any) -> None:
    """A worker that sends a good row for each op."""
    for op in ops:
        emit("row", row(op, package=entry.package, name=entry.name, mode="meta" if device == "meta" else "real"))


def aborts(entry: zoo.Entry, ops: Any, *, device: str, emit: Any) -> None:
    """A worker that dies after its first row, as a bug in compiled code makes it."""
    emit("row", row(ops[0], package=entry.package, name=entry.name))
    emit("stage", "group: rewrite")
    faulthandler.disable()  # pytest's would print all threads
    os.abort()


def hangs(entry: zoo.Entry, ops: Any, *, device: str, emit: Any) -> None:
    """A worker that never ends."""
    emit("stage", "build")
    time.sleep(60)


def swells(entry: zoo.Entry, ops: Any, *, device: str, emit: Any) -> None:
    """A worker that takes more memory than it may, unless it is on the meta device."""
    if device == "meta":
        return answers(entry, ops, device=device, emit=emit)
    emit("stage", "build")
    held = []
    for _ in range(40):
        held.append(b"\1" * 50_000_000)
        time.sleep(0.02)
    raise AssertionError(f"nobody stopped {len(held)} blocks of 50 MB")


def test_a_worker_that_dies_becomes_a_row() -> None:
    good, lost = runner.run_entry(ENTRY, OPS, limits=LIMITS, work=aborts)
    assert not rows.bad(good)
    assert (lost["op"], lost["mode"], lost["error"]) == ("group", "lost", "died: SIGABRT, at 'group: rewrite' (real)")
    assert rows.crashed(lost)


def test_a_worker_that_hangs_becomes_a_row() -> None:
    started = time.monotonic()
    limits = runner.Limits(seconds=0.3, memory=8e9)
    lost = runner.run_entry(ENTRY, OPS, limits=limits, work=hangs)
    assert [each["error"] for each in lost] == ["time: more than 0.3 s, at 'build' (meta)"] * 2
    assert time.monotonic() - started < 20


def test_a_worker_that_swells_is_done_on_the_meta_device() -> None:
    limits = runner.Limits(seconds=60, memory=runner._resident(os.getpid()) + 300e6)
    done = runner.run_entry(ENTRY, OPS, limits=limits, work=swells)
    assert [each["mode"] for each in done] == ["meta", "meta"]
    assert done[0]["meta_because"].startswith("memory: more than")
    assert done[0]["meta_because"].endswith("GB, at 'build' (real)")


def test_what_raises_becomes_a_row_for_each_op() -> None:
    sent: list[rows.Row] = []
    unknown = zoo.Entry("timm", "no_such_model", "none")
    examine.examine(unknown, OPS, device="cpu", emit=lambda kind, value: sent.append(value) if kind == "row" else None)
    assert [each["op"] for each in sent] == list(OPS)
    assert all("no_such_model" in each["error"] and rows.bad(each) for each in sent)


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path, told = tmp_path / "rows.jsonl", []
    others = [ENTRY, zoo.Entry("timm", "another", "test")]

    def run(entries: list[zoo.Entry], **flags: bool) -> int:
        told.clear()
        runner.sweep(entries, OPS, path=path, limits=LIMITS, tell=told.append, work=answers, **flags)
        return len(told)

    assert run(others[:1]) == 2
    with path.open("a") as file:
        file.write('{"package": "timm", "name": "cut sho')  # as a kill leaves it
    assert run(others) == 2
    assert run(others) == 0
    assert len(rows.read_rows(path)) == 4
    assert run(others, refresh=True) == 0
    rows.append(path, row("group", name="another", fingerprint="of older code"))
    assert run(others, refresh=True) == 1
    assert run(others, failed=True) == 0
    rows.append(path, row("depthwise", name="another", error="ValueError: no", fingerprint=rows.fingerprint()))
    assert run(others) == 0
    assert run(others, failed=True) == 1
    latest, runs = rows.read_rows(path), rows.read_runs(path)
    assert not rows.bad(latest["timm", "another", "depthwise"])
    rows.compact(path)
    assert rows.read_rows(path) == latest
    assert rows.read_runs(path) == runs[-1:]
    assert len(path.read_text().splitlines()) == 1 + len(latest)


def test_rows_that_are_bad() -> None:
    assert not rows.bad(row())
    assert rows.bad(row(error="ValueError: no"))
    assert rows.bad(row(preserved="no"))
    assert rows.bad(row(without_reason=1))
    assert rows.bad(row(converted=0, preserved="not run"))
    assert not rows.bad(row(converted=0, standard=0, preserved="not run"))
    assert rows.bad(row(converted=0, standard=0, standard_subclass=1, preserved="not run"))


def test_the_report_counts_and_names() -> None:
    text = report.render(
        [
            row(),
            row("group", kept={"stem": 1, "no gain": 1}, converted=1),
            row(name="broken", preserved="no", error="ValueError: a|b"),
            row(name="changed", preserved="no", note="has size (1, 2), expected (1, 3)"),
            row(name="missed", converted=0, preserved="not run", kept={"not standard": 3}),
            row(name="vit", converted=0, standard=0, preserved="not run", note="nothing", kept={"stem": 1}),
            row(name="huge", mode="meta", meta_because="memory: more than 14.0 GB, at 'build' (real)"),
            row(name="odd", preserved="not run", note="it took none of the inputs tried", without_reason=2),
            row(name="dynamic", untrained="it needs targets", untraced=[["(root)", "TraceError: control flow"]]),
        ],
        runs=[{"run": "f", "fingerprint": "f", "models": 10, "versions": {"torch": "2.0"}, "machine": "a machine"}],
    )
    totals = text.partition("## Misses")[0]
    for line in (
        "| models | 8 |",
        "| models not done yet | 2 |",
        "| rows, one a model and op | 9 |",
        "| crashes | 1 |",
        "| changed outputs | 1 |",
        "| sites without a reason | 2 |",
        "| of these, models with none converted | 1 |",
        "| rows with outputs compared and the same | 4 |",
        "| of these, rows compared in eval mode only | 1 |",
        "| of these, rows with some standard convolution kept, with a reason | 1 |",
        "| rows without a standard convolution, so with nothing to convert | 1 |",
        "| rows converted but not run | 1 |",
        "| rows on the meta device only (shapes, no numbers) | 1 |",
    ):
        assert line in totals
    assert "on a machine, with torch 2.0." in totals
    assert "- `timm:broken`, depthwise: crashed. ValueError: a\\|b" in text
    assert "- `timm:changed`, depthwise: outputs changed. has size (1, 2), expected (1, 3)" in text
    assert "- `timm:missed`, depthwise: 2 standard and 0 of a subclass, none converted: 3 not standard." in text
    assert "- `timm:odd`, depthwise: 2 sites without a reason." in text
    assert "- `timm:huge`, depthwise: memory: more than 14.0 GB, at 'build' (real)" in text
    assert "- it needs targets: `timm:dynamic`" in text
    assert "| TraceError: control flow | 1 |" in text
    line = "| `timm:net` | 3 | 2 | 2 | 1 | 0 | 2.0 | 1 stem; group: 1 no gain | 3 module, 3 fx | same | 1x3x32x32 |"
    assert line in text.splitlines()


def test_a_report_without_misses_says_so() -> None:
    assert "## Misses\n\nNone.\n" in report.render([row()])


def test_the_table_is_that_of_the_rows() -> None:
    docs = BENCHMARKS.parent
    assert report.text_of(docs / "coverage.jsonl") == (docs / "coverage.md").read_text(encoding="utf-8")


def test_every_model_of_both_libraries_is_swept_once() -> None:
    import timm
    from torchvision.models import list_models

    names = [str(entry) for entry in zoo.entries()]
    assert len(names) == len(set(names))
    wanted = [f"torchvision:{name}" for name in list_models()] + [f"timm:{name}" for name in timm.list_models()]
    assert set(names) == set(wanted)


def test_a_run_says_what_it_ran_on() -> None:
    run = json.loads(json.dumps(rows.describe_run("f")))
    assert set(run["versions"]) == {"torch", "torchvision", "timm", "Python"}
    assert run["machine"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CONVERTIBLE, *NOTHING_TO_CONVERT])
def test_forty_models(name: str) -> None:
    examine.warm_up(OPS)
    for result in runner.run_entry(find(name), OPS, limits=LIMITS):
        assert not rows.bad(result), runner.line_of(result)
        assert result["mode"] == "real"
        assert sum(result["kept"].values()) + result["converted"] == result["found"]
        assert (result["converted"] > 0) == (name in CONVERTIBLE), result["kept"]
        assert result["preserved"] == ("yes" if name in CONVERTIBLE else "not run")


def test_the_sample_is_forty() -> None:
    assert len({*CONVERTIBLE, *NOTHING_TO_CONVERT}) == 40
