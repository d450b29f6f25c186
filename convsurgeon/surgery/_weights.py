"""What a convolution is called, and where its weight comes from, in words."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

WEIGHT_WRITERS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)


def type_name(module: nn.Module) -> str:
    """Return the class's name, with its module's path where it is not torch's own."""
    cls = type(module)
    if parametrize.is_parametrized(module):
        cls = cls.__bases__[0]
    return cls.__name__ if cls.__module__.startswith("torch.nn.") else f"{cls.__module__}.{cls.__qualname__}"


def describe_writers(module: nn.Conv2d) -> str | None:
    """Return what writes the weight of a module before it runs, in words, or None."""
    if parametrize.is_parametrized(module):
        chains = module.parametrizations.values()  # type: ignore[operator]
        names = dict.fromkeys(type(part).__name__.lstrip("_") for chain in chains for part in chain)
        return f"started from its effective weight ({', '.join(names)} is baked in)"
    writers = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WEIGHT_WRITERS)]
    if any(isinstance(hook, prune.BasePruningMethod) for hook in writers):
        return "started from its pruned weight; the sparsity is lost"
    if writers:
        return f"started from its effective weight ({type(writers[0]).__name__} is baked in)"
    return None


def describe_kernel(weight: Tensor, copied: nn.Conv2d) -> str:
    """Return what a kernel is that is no parameter called `weight`, in words."""
    if weight is copied._buffers.get("weight"):
        return "its weight, which is a buffer"
    if weight is vars(copied).get("weight"):
        return "its weight, which is a plain tensor"
    replaced = "forward" in vars(copied) or "_conv_forward" in vars(copied)
    return f"the kernel that {'its replaced forward' if replaced else type_name(copied)} computes"
