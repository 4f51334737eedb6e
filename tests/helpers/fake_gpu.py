"""Tensors of a GPU that is not there: torch's FakeTensorMode knows shapes, dtypes and devices, and no values.

Mixing devices, reading a value, and shapes that values decide all fail, as they would or would be slow on a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.helpers.host_reads import no_host_reads


class FakeGPU:
    """One faked CUDA device. `float64` names the operators that made a tensor of that type."""

    def __init__(self):
        self._mode = FakeTensorMode()
        self.float64: set[str] = set()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside the block all tensors are fake, and host reads fail."""
        with self._mode, no_host_reads(), _Watch(self.float64):
            yield

    def move(self, tensors):
        """Fake copies, on the GPU, of the tensors in lists, tuples and dicts."""
        with self._mode:
            return tree_map_only(Tensor, self._moved, tensors)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """A model's parameters and buffers on the GPU, for `torch.func.functional_call`."""
        return self.move(dict([*model.named_parameters(), *model.named_buffers()]))

    def _moved(self, tensor: Tensor) -> Tensor:
        return self._mode.from_tensor(tensor).to("cuda").detach().requires_grad_(tensor.requires_grad)


class _Watch(TorchDispatchMode):
    def __init__(self, float64: set[str]):
        super().__init__()
        self._float64 = float64

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tree_leaves(out)):
            self._float64.add(str(function))
        return out


def gradients(loss: Tensor) -> dict[int, Tensor]:
    """Gradients of the leaves behind a loss, by the leaf's id. Autograd's own engine asks for a real device."""
    order, seen = [], set()

    def visit(node):
        if node is None or node in seen:
            return
        seen.add(node)
        for following, _ in node.next_functions:
            visit(following)
        order.append(node)

    visit(loss.grad_fn)
    given = {node: {} for node in order}
    given[loss.grad_fn][0] = torch.ones_like(loss)
    found = {}
    for node in reversed(order):
        if hasattr(node, "variable"):
            (found[id(node.variable)],) = given[node].values()
            continue
        wanted = node._input_metadata
        zeros = (torch.zeros(w.shape, dtype=w.dtype, device=w.device) if w is not None else None for w in wanted)
        into = [given[node].get(i, zero) for i, zero in enumerate(zeros)]
        out = node.apply(*into) if hasattr(node, "apply") else node(*into)
        out = out if isinstance(out, tuple) else (out,)
        for gradient, (following, place) in zip(out, node.next_functions, strict=False):
            if following is not None and gradient is not None:
                held = given[following].get(place)
                given[following][place] = gradient if held is None else held + gradient
    return found
