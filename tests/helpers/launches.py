"""Counting what a GPU would be told to do: operators of torch that compute, and kernels, each once.

Operators that only make a view, or room, launch nothing. What happens inside an interpreted Triton kernel or the
stand-in for a compiled extension is that kernel's, and counts as one.
"""

from contextlib import contextmanager

from torch.utils._python_dispatch import TorchDispatchMode

FREE = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "_unsafe_view", "unbind")
WRAPPED = ("_causal_conv1d_update_cpp",)  # registered operators that call one kernel, which is counted itself


class Launches(TorchDispatchMode):
    """`names` of what was launched, in order."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self._inside = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not (self._inside or function.is_view or name in FREE or name in WRAPPED):
            self.names.append(name)
        return function(*args, **(kwargs or {}))

    @contextmanager
    def kernel(self, name: str):
        """What runs inside is one launch."""
        outer, self._inside = self._inside, True
        if not outer:
            self.names.append(name)
        try:
            yield
        finally:
            self._inside = outer

    def counted(self, name: str, function):
        """The function, of which a call is one launch."""

        def call(*args, **kwargs):
            with self.kernel(name):
                return function(*args, **kwargs)

        return call


@contextmanager
def counted_launches():
    """Count inside the block, where kernels are interpreted (tests/interpreter)."""
    import causal_conv1d_cuda
    from triton.runtime.interpreter import GridExecutor

    launches, run, update = Launches(), GridExecutor.__call__, causal_conv1d_cuda.causal_conv1d_update

    def interpreted(self, *args, **kwargs):
        with launches.kernel(self.fn.__name__):
            return run(self, *args, **kwargs)

    GridExecutor.__call__ = interpreted
    causal_conv1d_cuda.causal_conv1d_update = launches.counted("causal_conv1d_update", update)
    try:
        with launches:
            yield launches
    finally:
        GridExecutor.__call__, causal_conv1d_cuda.causal_conv1d_update = run, update
