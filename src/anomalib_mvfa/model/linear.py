"""Products of features with weights or with rows of a bank, by the fastest float32 kernels that torch has.

Torch multiplies float32 matrices on x86 by MKL, which leaves AVX-512 alone on processors other than Intel's; torch's
other library, oneDNN, does not, and there takes half the time.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_HAS_ONEDNN = (
    torch.backends.mkl.is_available()  # elsewhere, torch has no other library than oneDNN, or a better one
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` ``(..., E)``, as ``torch.nn.functional.linear`` does up to rounding."""
    if not _by_onednn(x, weight):
        return functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _onednn(x, weight, bias)


class Linear(nn.Linear):
    """A linear layer that multiplies by :func:`linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # torch's name
        """Return ``(..., E)`` of features ``(..., D)``."""
        return linear(input, self.weight, self.bias)


def _by_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        _HAS_ONEDNN
        and bool(torch.backends.mkldnn.enabled)
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # nor exporting: the operator is torch's own
        and x.numel() > 0  # oneDNN has no product of nothing
    )


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # noqa: SLF001  # torch's compiler's


class _Linear(torch.autograd.Function):
    """The operator has no gradient of its own."""

    @staticmethod
    def forward(  # torch's contract
        ctx: Any,  # noqa: ANN401
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        learns = ctx.needs_input_grad[1]
        ctx.save_for_backward(x if learns else None, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        gradient = gradient.contiguous()
        rows = gradient.flatten(0, -2)
        return (
            _onednn(gradient, weight.T) if of_x else None,
            _onednn(rows.T, x.flatten(0, -2).T) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )
