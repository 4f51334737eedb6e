"""Our Triton kernels compile to machine code of GPUs that are not here: Triton brings the assembler.

What they compute is compared in tests/interpreter/test_triton_convolution.py.
"""

import pytest

triton = pytest.importorskip("triton")

from mlmamba.ops import triton_convolution as kernels  # noqa: E402 - needs triton

HALF, FLOAT = "*bf16", "*fp32"
TYPES = {
    **dict.fromkeys(("x", "history", "y", "dy", "dx", "dhistory"), HALF),
    **dict.fromkeys(("weight", "bias", "dpre", "parts"), FLOAT),
    "seq_idx": "*i32",
    **dict.fromkeys(("length", "d"), "i32"),
}
SIZES = {"TAPS": kernels.TAPS, "LENGTH": kernels._LENGTH, "CHANNELS": kernels._CHANNELS}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", ["_forward", "_before_silu", "_spread"])
def test_the_kernels_compile(kernel, capability, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(kernels, kernel)
    for packed in (False, True):
        fixed = {**SIZES, "PACKED": packed} | ({} if packed else {"seq_idx": None})
        types = {name: "constexpr" if name in fixed else TYPES[name] for name in function.arg_names}
        source = ASTSource(fn=function, signature=types, constexprs=fixed)
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
