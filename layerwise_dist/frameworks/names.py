# SPDX-License-Identifier: Apache-2.0
"""Names as the model's author wrote them: without what wrappers add, and each unique."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from layerwise_dist.errors import UnsupportedError

# Under which name a wrapper holds the module that it was given.
_WRAPPERS: tuple[tuple[type[nn.Module], str], ...] = (
    (DistributedDataParallel, "module"),
    (FullyShardedDataParallel, "_fsdp_wrapped_module"),
    (AveragedModel, "module"),
)
# Those of modules that are not imported for this: no model has one before the script has imported it. The class
# `ActivationWrapper` is that of modules that checkpoint activations and of those that offload them.
_IF_IMPORTED = (
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper", "_checkpoint_wrapped_module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine", "module"),
)

_NONE: Mapping[int, nn.Parameter] = {}


class CleanNames:
    """Names of a model's modules and parameters, without the parts that wrappers put into them.

    What a wrapper is, its class tells; a part of a name is never cut for how it reads. `of_module` has each module's,
    by its id; of one that is in several places the first. (`named_parameters()` is no way to names: some wrappers
    override it and cut there.)
    """

    def __init__(self, root: nn.Module, prefix: str = "") -> None:
        """`prefix` comes before every name, and a dot if there is more; "" for none."""
        self.of_module: dict[int, str] = {}
        self._modules: list[tuple[str, nn.Module]] = []  # one that is in several places several times
        cut = _Cut()
        above: dict[str, tuple[nn.Module, str]] = {}  # by path in the model: the module, its clean name
        for path, module in root.named_modules(remove_duplicate=False):
            clean = prefix
            if path:
                parent, clean = above[path.rpartition(".")[0]]
                name = path.rpartition(".")[2]
                clean = clean if cut[type(parent)] == name else join(clean, name)
            above[path] = module, clean
            self._modules.append((clean, module))
            self.of_module.setdefault(id(module), clean)

    def parameters(self, stand_ins: Mapping[int, nn.Parameter] = _NONE) -> list[tuple[nn.Parameter, list[str]]]:
        """Each parameter once, in the model's order, with all its names; the first is the one to go by.

        `stand_ins` says, by the id of what hangs in the place of a parameter, which one that is.
        """
        found: dict[int, tuple[nn.Parameter, dict[str, None]]] = {}
        for module_name, module in self._modules:
            for name, param in module._parameters.items():
                if param is not None:
                    param = stand_ins.get(id(param), param)
                    found.setdefault(id(param), (param, {}))[1][join(module_name, name)] = None
        return [(param, list(names)) for param, names in found.values()]


def join(prefix: str, name: str) -> str:
    """The name of what is called `name` in what is called `prefix`; either may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def check_unique(what: str, names: Iterable[str]) -> None:
    """Raises UnsupportedError where two of these have one name, so that one would be taken for the other."""
    if twice := [name or "the root" for name, times in Counter(names).items() if times > 1]:
        raise UnsupportedError(
            f"{what} have the same name, without what wrappers add to it, so a checkpoint cannot tell them apart: "
            f"{sorted(twice)[:5]}; rename one"
        )


class _Cut(dict[type, str | None]):
    """By a module's class, which part it puts into the names of what is in it; None if it is no wrapper."""

    def __missing__(self, kind: type) -> str | None:
        imported = ((getattr(sys.modules.get(module), name, ()), inner) for module, name, inner in _IF_IMPORTED)
        found = next((inner for wrapper, inner in (*_WRAPPERS, *imported) if issubclass(kind, wrapper)), None)
        self[kind] = found
        return found
