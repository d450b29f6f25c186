"""`convsurgeon inspect`: every convolution, and what each op would make of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from convsurgeon.cli import _arguments as arguments
from convsurgeon.cli._drawing import big, console, emit, fewer, say, tell

if TYPE_CHECKING:
    from rich.table import Table

    from convsurgeon.surgery import Site, Survey


def run(
    model: arguments.Model,
    weights: arguments.Weights = None,
    weights_key: arguments.WeightsKey = None,
    weights_prefix: arguments.WeightsPrefix = None,
    model_arg: arguments.ModelArg = None,
    input_shape: arguments.InputShape = None,
    trust: arguments.Trust = False,
    trust_module: arguments.TrustModule = None,
    json: arguments.Json = False,
) -> None:
    """Show every convolution: geometry, MACs, what each op would make of it, or why it would be kept."""
    from convsurgeon.cli._models import example_for, load_model
    from convsurgeon.surgery import survey

    network = load_model(
        model, weights=weights, weights_key=weights_key, weights_prefix=weights_prefix, model_arg=model_arg,
        trust=trust, trust_module=trust_module,
    )  # fmt: skip
    found = survey(network, example_inputs=example_for(network, input_shape))
    rows = [_row(site, found) for site in found.sites]
    if json:
        emit(
            {
                "model": found.model,
                "macs": found.macs,
                "untraced": found.untraced,
                "convolutions": rows,
            }
        )
        return
    _draw(found, rows)


def _row(site: Site, found: Survey) -> dict[str, Any]:
    from convsurgeon import ops
    from convsurgeon.surgery import default_keep, mac_ratio

    offers: dict[str, float | None] = {}
    refusals: dict[str, str] = {}
    for name in ops.names():
        op = ops.get(name)
        offers[name] = None
        if site.spec is None or site.op is not None or site.obstacle is not None:
            continue
        options = op.fit_options(site.spec, op.Options())
        if reason := op.why_not(site.spec, options):
            refusals[name] = reason
        else:
            offers[name] = round(mac_ratio(site.spec, op, options), 3)
    data = asdict(site)
    data["spec"] = site.spec.to_dict() if site.spec else None
    share = None if found.macs in (None, 0) or site.macs is None else site.macs / found.macs
    return {
        **data,
        "geometry": f"{site.spec or site.type}{f', in {site.source}' if site.source else ''}",
        "macs": site.macs,
        "share": share,
        "ops": offers,
        "refusals": refusals,
        "kept_because": default_keep(site),
    }


def _draw(found: Survey, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(title=f"{found.model}: {len(rows)} convolution{'s' if len(rows) != 1 else ''}")
    table.add_column("name", overflow="fold")
    table.add_column("geometry")
    if found.observed:
        table.add_column("MACs", justify="right")
        table.add_column("share", justify="right")
    table.add_column("kept by default, because")
    for row in rows:
        figures = []
        if found.observed:
            share = "–" if row["share"] is None else f"{100 * row['share']:.1f} %"
            figures = ["–" if row["macs"] is None else big(row["macs"]), share]
        names = "\n= ".join(fqn or "(root)" for fqn in row["fqns"])
        table.add_row(names, row["geometry"], *figures, row["kept_because"] or "")
    console().print(table)
    console().print(_ops_table(found, rows))
    if found.macs is not None:
        tell(f"all convolutions: {big(found.macs)} MACs for one image")
    else:
        say("sizes and MACs need an input's shape: --input-shape 1,3,224,224")
    for fqn, reason in found.untraced:
        short = " ".join(reason.split())[:120]
        say(f"note: torch.fx could not trace {fqn} ({short}); its convolutions were found all the same")


def _ops_table(found: Survey, rows: list[dict[str, Any]]) -> Table:
    """Return a line for each op: how many convolutions it would replace by default, and what that would save."""
    from rich.table import Table

    from convsurgeon import ops

    table = Table(title="what each op would make of it, with its options at their defaults")
    table.add_column("--to")
    table.add_column("structure")
    table.add_column("converts", justify="right")
    table.add_column("fewer MACs, each", justify="right")
    if found.observed:
        table.add_column("all convolutions", justify="right")
    for name in ops.names():
        chosen = [row for row in rows if row["kept_because"] is None and (row["ops"][name] or 0) >= 1]
        ratios = sorted(row["ops"][name] for row in chosen)
        each = "–" if not ratios else " to ".join(dict.fromkeys(fewer(ratio, 1) for ratio in (ratios[0], ratios[-1])))
        total = []
        if found.macs is not None:
            saved = sum((row["macs"] or 0) * (1 - 1 / row["ops"][name]) for row in chosen)
            total = [f"{big(found.macs - saved)} ({fewer(found.macs, found.macs - saved)})"]
        table.add_row(name, ops.get(name).summary, str(len(chosen)), each, *total)
    return table
