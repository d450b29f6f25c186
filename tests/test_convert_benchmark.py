"""The benchmark of rewrite: its bare work is what it says, its stages are there, the page says what the rows say."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import convsurgeon as cs
from convsurgeon.spec import ConvSpec
from convsurgeon.testing import make_donor

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "benchmarks"))

import convert_report
import convert_work as work

IMAGE = torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def small_net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)).eval()


@pytest.mark.parametrize("op", work.BARE)
@pytest.mark.parametrize("channels", [(16, 24), (24, 16)])
def test_the_bare_closed_forms_are_as_close_as_ours(op, channels):
    donor = make_donor(ConvSpec(*channels, (3, 3), bias=False)).float()
    x = torch.randn(2, channels[0], 5, 5, generator=torch.Generator().manual_seed(1))
    ours = cs.ops.get(op).from_conv(donor)
    torch.testing.assert_close(work.bare_op(donor, op, ours.options)(x), ours(x), rtol=1e-3, atol=1e-4)


def test_the_bare_work_is_a_student_and_its_stages():
    model = small_net()
    decisions = list(cs.plan(model, "depthwise").converted)
    student, stages = work.bare(model, decisions, IMAGE)
    assert len(decisions) == 1
    assert isinstance(model[2], nn.Conv2d)
    assert student[2](torch.zeros(1, 8, 4, 4)).shape == (1, 8, 4, 4)
    assert set(stages) == set(convert_report.BARE_STAGES)


def test_the_stages_of_a_rewrite_are_seen_and_unwrapped_again():
    before = cs.surgery._rewrite.compare_outputs
    student, stages = work.rewrite(small_net(), "depthwise", IMAGE)
    assert isinstance(student[2], cs.ops.get("depthwise"))
    assert set(stages) == set(convert_report.STAGES)
    assert min(stages.values()) >= 0
    assert cs.surgery._rewrite.compare_outputs is before


def row(**changes):
    stages = dict.fromkeys(convert_report.STAGES, 0.1)
    bare = dict.fromkeys(convert_report.BARE_STAGES, 0.1)
    return {
        "network": "net",
        "threads": 1,
        "model_mb": 47.2,
        "environment": {"machine": "a machine", "torch": "2", "date": "2026-01-02"},
        "op": "depthwise",
        "converted": 3,
        "rewrite": {"seconds": [1.2, 1.0, 3.0], "stages": [stages] * 3, "peak_mb": [90.0, 100.0]},
        "bare": {"seconds": [1.0, 1.0, 1.0], "stages": [bare] * 3, "peak_mb": [50.0, 40.0]},
        **changes,
    }


def test_the_page_says_ratios_with_their_spread_and_marks_what_misses_the_target():
    peer = {"network": "net", "threads": 1, "environment": {"machine": "m", "date": "d"}, "peer": {"error": "No: a\nb"}}
    page = convert_report.render([row(), peer])
    assert "| net | 47 | depthwise | 3 | 1 | 1.20 | 1.00 | 1.20 (1.00–3.00) | 100 | 50 | **2.00** |" in page
    assert "medians of 3 rounds" in page
    assert "a machine; torch 2; 2026-01-02." in page
    assert "| net | 1 | fails: No: a b | 1.20 | – | 100 |" in page
