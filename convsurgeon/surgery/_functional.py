"""Convolutions that are no modules, and kernels that others read: from single calls to sites and reasons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from convsurgeon.ops import AbstractCheapConv
from convsurgeon.spec import ConvSpec, Pair
from convsurgeon.surgery._calls import Use
from convsurgeon.surgery._donors import Donor, find_donor
from convsurgeon.surgery._sites import Site


@dataclass(frozen=True)
class Finding:
    """One use of a kernel, by names, as a graph or a run shows it.

    Args:
        function: what was called, such as `conv2d`.
        owner: the fqn of the module whose forward calls it.
        where: file and line.
        route: `fx` or `observed`.
        kernel: the first name of the kernel, where it is a tensor that the model owns.
        is_convolution: whether the call is a convolution with it.
        spec: the geometry of a 2-d convolution, or None.
        problem: why it cannot be rewritten, or None.
        input_size: height and width of the input, where the call was observed.
        facts: what the graph tells: keyword arguments of `Site`.
    """

    function: str
    owner: str
    where: str
    route: str
    kernel: str | None = None
    is_convolution: bool = True
    spec: ConvSpec | None = None
    problem: str | None = None
    input_size: Pair | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class Names:
    """The names of a model's modules, and of the tensors in it that may be kernels."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[nn.Module, str] = {module: fqn for fqn, module in model.named_modules()}
        self.kernels: dict[int, Tensor] = {}
        self.fqns: dict[int, list[str]] = {}
        self.owners: dict[int, list[nn.Module]] = {}
        for fqn, module in model.named_modules(remove_duplicate=False):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if isinstance(tensor, Tensor) and not nn.parameter.is_lazy(tensor) and tensor.dim() >= 3:
                    self.kernels[id(tensor)] = tensor
                    self.fqns.setdefault(id(tensor), []).append(f"{fqn}.{name}".lstrip("."))
                    self.owners.setdefault(id(tensor), []).append(module)
        self.by_name = {fqn: key for key, fqns in self.fqns.items() for fqn in fqns}

    def first(self, tensor: Tensor | None) -> str | None:
        """Return the first name of a kernel, or None."""
        return self.fqns[id(tensor)][0] if id(tensor) in self.fqns else None

    def resolve(self, use: Use) -> Finding:
        """Put names in the place of modules and tensors."""
        owner = self.modules.get(use.owner, "") if use.owner is not None else ""
        return Finding(
            use.function,
            owner or "(root)",
            use.where,
            "observed",
            self.first(use.tensor),
            use.is_convolution,
            use.spec,
            use.problem,
            use.input_size,
        )

    def convolution_of(self, kernel: str | None) -> nn.Module | None:
        """Return the convolution module or op that owns a kernel, or None."""
        owners = self.owners.get(self.by_name.get(kernel or "", -1), [])
        return next((owner for owner in owners if isinstance(owner, (_ConvNd, AbstractCheapConv))), None)

    def is_own(self, use: Use) -> bool:
        """Whether a convolution module makes the call itself, so that it is no functional one."""
        return isinstance(use.owner, (_ConvNd, AbstractCheapConv))


def read_by_others(findings: Iterable[Finding], names: Names) -> dict[str, str]:
    """Return, per name of a convolution module, who reads its weight besides itself."""
    reads: dict[str, str] = {}
    for finding in findings:
        conv = names.convolution_of(finding.kernel)
        if conv is not None:
            where = f" ({finding.where})" if finding.where else ""
            reason = f"its weight is read by the forward of {finding.owner} in {finding.function}{where}"
            reads.setdefault(names.modules[conv], reason)
    return reads


def functional_sites(findings: Sequence[Finding], names: Names) -> list[Site]:
    """Return a site for every functional convolution: one per kernel, or per line where it has no name."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    # a run sees a kernel that was cast as one without a name; the graph knows where it came from
    named = {(f.function, f.where): f.kernel for f in findings if f.kernel and f.is_convolution}
    for finding in findings:
        if finding.is_convolution and finding.kernel is None:
            finding = replace(finding, kernel=named.get((finding.function, finding.where)))
        if finding.is_convolution and names.convolution_of(finding.kernel) is None:
            unnamed = (finding.owner, finding.function, finding.where)
            groups.setdefault((finding.kernel,) if finding.kernel else unnamed, []).append(finding)
    sites: list[Site] = []
    for key, group in groups.items():
        others = [f for f in findings if f.kernel and f.kernel == group[0].kernel and not f.is_convolution]
        sites.append(_site(key, group, others, names, taken={fqn for site in sites for fqn in site.fqns}))
    return sites


def _site(key: tuple[str, ...], group: list[Finding], others: list[Finding], names: Names, *, taken: set[str]) -> Site:
    observed = [finding for finding in group if finding.route == "observed"]
    first = next((finding for finding in group if finding.route == "fx"), group[0])
    fqns = tuple(names.fqns[names.by_name[first.kernel]]) if first.kernel else (_unused(f"{key[0]}.{key[1]}()", taken),)
    site = Site(
        fqns,
        f"F.{first.function}",
        first.spec,
        obstacle=_obstacle(group, others, names),
        note=f"the functional convolution in the forward of {first.owner}, which stays",
        source=first.where or None,
        routes=tuple(dict.fromkeys(finding.route for finding in group)),
        calls=len(observed) or None,
        input_sizes=tuple(finding.input_size for finding in observed if finding.input_size and finding.spec),
    )
    return replace(site, **dict(first.facts))


def _obstacle(group: list[Finding], others: list[Finding], names: Names) -> str | None:
    problems = [finding for finding in group if finding.problem or finding.function != "conv2d"]
    # a graph knows more than a run of why a kernel is no constant
    for finding in sorted(problems, key=lambda finding: finding.route != "fx"):
        if finding.function == "convolution":
            return "torch.convolution is not understood; call torch.conv2d"
        return finding.problem or f"F.{finding.function} is not a Conv2d"
    first = group[0]
    if others:
        other = others[0]
        where = f" ({other.where})" if other.where else ""
        return f"its kernel is also read by {other.function} in the forward of {other.owner}{where}"
    if len({finding.spec for finding in group}) > 1:
        return "its kernel is used by calls of different geometry"
    if first.kernel is not None:
        owners = names.owners[names.by_name[first.kernel]]
        foreign = [module for module in owners if isinstance(module, (nn.Linear, nn.Embedding))]
        if foreign:
            return f"its kernel is tied to that of a {type(foreign[0]).__name__}, and stays so"
        if not names.kernels[names.by_name[first.kernel]].is_floating_point():
            return "its kernel is not a floating-point tensor"
    return None


def _unused(name: str, taken: set[str]) -> str:
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}#{number}"
    return found


def dense_kernel(model: nn.Module, fqn: str) -> Tensor | None:
    """Return the dense kernel `(O, I, kh, kw)` that an op of this name starts from, or None where there is none.

    It is the weight of a convolution, the effective one where that is computed, or a parameter of that name.
    """
    names = Names(model)
    kernel = names.kernels.get(names.by_name.get(fqn, -1))
    if kernel is not None:
        return kernel
    module = dict(model.named_modules(remove_duplicate=False)).get(fqn)
    donor = find_donor(module) if isinstance(module, nn.Conv2d) else None
    return donor.conv.weight if isinstance(donor, Donor) else None
