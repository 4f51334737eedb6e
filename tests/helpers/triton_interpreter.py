"""Triton without a GPU: its interpreter, which runs kernels on CPU tensors with numpy, program by program.

What stands in for a device: the guard around a launch, the number of multiprocessors, and the autotuner's choice (one
configuration, where it would time them all). What the interpreter cannot show: that a kernel compiles for a GPU, races
between programs, TF32 rounding, speed.
"""

import contextlib
import types

import numpy as np
import torch


def install() -> None:
    """Make this process one in which kernels are interpreted; TRITON_INTERPRET=1 must be set, and mamba_ssm not yet
    imported."""
    import triton
    from triton import language as tl
    from triton.runtime import interpreter

    tune = triton.autotune

    def one_configuration(configs, key, **options):
        """The largest blocks: they make the fewest programs."""
        return tune(configs=[max(configs, key=_block_size)], key=key, **options)

    triton.autotune = one_configuration
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=1, major=9, minor=0)
    builder = interpreter.InterpreterBuilder
    dot, arithmetic = builder.create_dot, builder.binary_op

    def widened(t):
        """The interpreter keeps bfloat16 as 16 bits in an integer, which it would multiply as integers."""
        if t.dtype.scalar != tl.bfloat16:
            return t
        return interpreter.TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def guarded(self, a, b, op):
        assert tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar), "arithmetic on bfloat16 would be on bit patterns"
        return arithmetic(self, a, b, op)

    builder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    builder.binary_op = guarded


def _block_size(config) -> int:
    return int(np.prod([value for name, value in config.kwargs.items() if name.startswith("BLOCK")]))
