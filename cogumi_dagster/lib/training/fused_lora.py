"""LoRA's linear layers in fewer passes over memory; what they compute is PEFT's.

PEFT adds ``B(A(x)) * scaling`` to the frozen layer's output in three operations, each of which reads and writes the
whole output, and as many in the backward pass. Here the update is accumulated inside the matrix products,
and all of them are in the frozen layer's precision: an adapter of float32 over bfloat16 weights is rounded as it
enters, so that its own weights, the sums of its gradients and its optimizer keep float32.
"""

from functools import cache
from types import MethodType
from typing import Any


@cache
def lora_product() -> Any:
    """The function (x, d, W, bias, A, B, scaling) -> x W^T + bias + scaling (d A^T) B^T, with W and bias frozen.

    d is x after dropout, or None for x itself. x and d are (tokens, in), W (out, in), A (rank, in), B (out, rank).
    x, d, W and the result have one precision; A and B may have another, in which their gradients are.
    """
    import torch

    class LoraProduct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, dropped: Any, weight: Any, bias: Any, a: Any, b: Any, scaling: float) -> Any:
            seen = x if dropped is None else dropped
            ctx.precision = a.dtype
            a, b = a.to(x.dtype), b.to(x.dtype)
            low = seen @ a.t()
            out = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
            out.addmm_(low, b.t(), alpha=scaling)
            ctx.save_for_backward(seen, low, weight, a, b)
            ctx.scaling, ctx.has_dropout = scaling, dropped is not None
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            (grad,) = grads
            seen, low, weight, a, b = ctx.saved_tensors
            low_grad = (grad @ b).mul_(ctx.scaling)
            x_grad = grad @ weight if ctx.needs_input_grad[0] else None
            dropped_grad = None
            if ctx.has_dropout:
                dropped_grad = low_grad @ a
            elif x_grad is not None:
                x_grad.addmm_(low_grad, a)
            a_grad, b_grad = (low_grad.t() @ seen).to(ctx.precision), (grad.t() @ low).to(ctx.precision)
            return x_grad, dropped_grad, None, None, a_grad, b_grad.mul_(ctx.scaling), None

    return LoraProduct.apply


def fuse_lora(model: Any) -> int:
    """Let the LoRA layers of a PEFT model compute with ``lora_product``; returns how many do.

    Quantized layers, LoRA's variants, and float16 (whose small gradients would be lost without scaling) stay as PEFT
    has them.
    """
    from peft.tuners.lora.layer import Linear

    chosen = [m for m in model.modules() if isinstance(m, Linear) and _plain(m)]
    for module in chosen:
        module.forward = MethodType(_forward, module)
    return len(chosen)


def _plain(module: Any) -> bool:
    import torch

    if type(module.base_layer) is not torch.nn.Linear or len(module.lora_A) != 1 or module.lora_variant:
        return False
    (name,) = module.lora_A
    precisions = (module.lora_A[name].weight.dtype, torch.bfloat16)
    return module.base_layer.weight.dtype in precisions and module.lora_B[name].bias is None


def _forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    import torch

    (name,) = self.lora_A
    if self.disable_adapters or self.merged or torch.is_autocast_enabled(x.device.type):
        return type(self).forward(self, x, *args, **kwargs)
    dropout, base = self.lora_dropout[name], self.base_layer
    flat = x.reshape(-1, x.shape[-1]).to(base.weight.dtype)
    dropped = _dropped(flat, dropout) if self.training and getattr(dropout, "p", 0.0) > 0 else None
    out = lora_product()(
        flat, dropped, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
    )
    return out.view(*x.shape[:-1], out.shape[-1])


def _dropped(x: Any, dropout: Any) -> Any:
    """``x`` with a share of its elements zero and the rest scaled up, the share rounded to 256ths on a CPU.

    torch draws a number for each element there, which took a quarter of a step; eight of these share one.
    """
    import torch

    if x.device.type != "cpu":
        return dropout(x)
    out_of_256 = min(255, round(256 * dropout.p))
    numbers = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(torch.iinfo(torch.int64).min, None)
    kept = (numbers.view(torch.uint8)[: x.numel()] >= out_of_256).view_as(x)
    return x * kept.to(x.dtype).mul_(256 / (256 - out_of_256))
