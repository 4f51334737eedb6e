"""How the tests compare numbers: one relative error, which is never taken over a NaN."""

import torch
from torch import Tensor


def relative_error(ours: Tensor, truth: Tensor, floor: float = 1e-3) -> float:
    """Largest difference over the largest value of the truth, or over `floor` where the truth is about zero."""
    assert ours.shape == truth.shape, f"shapes differ: {tuple(ours.shape)} and {tuple(truth.shape)}"
    assert not ours.isnan().any(), "our side has NaN"
    assert not truth.isnan().any(), "the truth has NaN"
    if not truth.numel():
        return 0.0
    ours, truth = ours.detach().double().cpu(), truth.detach().double().cpu()
    return ((ours - truth).abs().max() / truth.abs().max().clamp(min=floor)).item()


def assert_close(ours: Tensor, truth: Tensor, tolerance: float, what: str = "", floor: float = 1e-3) -> None:
    error = relative_error(ours, truth, floor)
    assert error <= tolerance, f"{what or 'values'} differ by {error:.1e} of the largest value, over {tolerance:.0e}"


def assert_same_gradients(
    ours: tuple[Tensor, ...], truth: tuple[Tensor, ...], inputs: dict[str, Tensor | None], tolerance: float
) -> None:
    """Compare the gradients of every input that has one. The loss weights are of size 1, hence the floor."""
    leaves = {name: t for name, t in inputs.items() if t is not None and t.requires_grad}
    expected = gradients(truth, leaves)
    for name, gradient in gradients(ours, leaves).items():
        assert_close(gradient, expected[name], tolerance, f"gradient of {name}", floor=1.0)


def gradients(outputs: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed weighted sum of all outputs."""
    generator = torch.Generator().manual_seed(0)
    loss = sum((out.double() * torch.randn(out.shape, generator=generator).to(out.device)).sum() for out in outputs)
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))
