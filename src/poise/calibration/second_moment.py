"""Mean squared input of every linear layer: which columns of a weight matter.

An error e_j in column j of a weight changes the output by e_j x_j. Averaged over inputs that do not
correlate, the squared output error is sum_j e_j^2 E[x_j^2]: E[x_j^2] is what an error there weighs. (The
diagonal of the Hessian of GPTQ, Frantar et al. 2022; llama.cpp calls it the importance matrix.)
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from poise.core.errors import PoiseError
from poise.core.stats import Stats


class SecondMoments:
    """Sums squared inputs of modules while a model reads. Use as a context manager around the reading.

    Args:
        model: the model that will read.
        modules: paths of the modules to watch; what is no module of the model is left out.
    """

    def __init__(self, model: nn.Module, modules: Iterable[str]) -> None:
        present = dict(model.named_modules())
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._watched = {path: present[path] for path in modules if path in present}
        self._handles: list[Any] = []

    def __enter__(self) -> "SecondMoments":
        self._handles = [
            module.register_forward_pre_hook(self._recorder(path)) for path, module in self._watched.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _recorder(self, path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if not x.is_floating_point() or not x.numel():
                return  # an embedding reads token numbers; an expert that no token chose reads nothing
            squares = x.detach().reshape(-1, x.shape[-1]).double().square().sum(0)
            self._sums[path] = squares + self._sums.get(path, 0)
            self._counts[path] = self._counts.get(path, 0) + x[..., 0].numel()

        return record

    def stats(self, data_hash: str) -> dict[str, Stats]:
        """Statistics of every module that read something.

        Raises:
            PoiseError: an activation was not finite; names the module.
        """
        found = {}
        for path, total in self._sums.items():
            moment = (total / self._counts[path]).float()
            if not bool(torch.isfinite(moment).all()):
                raise PoiseError(
                    f"{path}: its inputs are not finite on the calibration text; is the model sound?"
                )
            found[path] = Stats(second_moment=moment, n_tokens=self._counts[path], data_hash=data_hash)
        return found
