"""Whether modules are as they were made: fast paths leave out calls that would run hooks."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module


def untouched(network: nn.Module) -> bool:
    """Whether no submodule has hooks or a forward of its own, which would not be called; nor are
    there hooks of all modules.
    """
    return not _of_all_modules() and not any(
        _has_own(module) for module in network.modules() if module is not network
    )


def as_made(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of that very class, and neither it nor a submodule has hooks or a forward
    of its own.
    """
    return type(module) is kind and not _has_own(module) and untouched(module)


def _has_own(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _of_all_modules() -> bool:
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
