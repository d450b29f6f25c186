"""Find every convolution, decide about each, and build the student: survey, plan, rewrite."""

from convsurgeon.surgery._copies import copy_module, expect_module, in_mode, untouched_random_state
from convsurgeon.surgery._cost import Cost, FlopCounter, Macs, cost_of, count_macs, count_params, example_like, totals
from convsurgeon.surgery._functional import dense_kernel
from convsurgeon.surgery._graph import trace as trace_graph
from convsurgeon.surgery._guard import GuardReport
from convsurgeon.surgery._paths import named_leaves
from convsurgeon.surgery._plan import Decision, Plan, default_keep, mac_ratio, plan
from convsurgeon.surgery._rewrite import check_outputs, plan_of, rebuild, rewrite
from convsurgeon.surgery._selectors import NO_OP
from convsurgeon.surgery._sites import Site
from convsurgeon.surgery._survey import Survey, survey
from convsurgeon.surgery._wrappers import network_inside, refuse_without_layers, unwrap, why_no_layers

__all__ = [
    "NO_OP",
    "Cost",
    "Decision",
    "FlopCounter",
    "GuardReport",
    "Macs",
    "Plan",
    "Site",
    "Survey",
    "check_outputs",
    "copy_module",
    "cost_of",
    "count_macs",
    "count_params",
    "default_keep",
    "dense_kernel",
    "example_like",
    "expect_module",
    "in_mode",
    "mac_ratio",
    "named_leaves",
    "network_inside",
    "plan",
    "plan_of",
    "rebuild",
    "refuse_without_layers",
    "rewrite",
    "survey",
    "totals",
    "trace_graph",
    "untouched_random_state",
    "unwrap",
    "why_no_layers",
]
