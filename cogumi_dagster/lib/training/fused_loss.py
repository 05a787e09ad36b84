"""The output layer and its cross-entropy together, some tokens at a time; what is computed is torch's.

The logits of a row are the largest tensors of a step (1,000 supervised tokens of a vocabulary of 49,152: 0.2 GB in
float32, three times over), and no two rows have as many, so that freed memory never fits again: a training grew past
14 GB in 120 steps. Here the gradient is taken while a block of logits is there, and blocks are of few sizes.

torch's own ``linear_cross_entropy`` in chunks is as fast and its gradient as exact, but its loss has the precision of
the hidden states: in bfloat16 the sum of 1,120 tokens was off by 18 to 46 nats, and losses are reported and compared.
"""

from functools import cache
from typing import Any

from cogumi_dagster.lib.training.memory import PRODUCT_MULTIPLE

BLOCK = 256
"""Tokens: the matrix products are at full speed, and the logits are 50 MB."""


@cache
def head_loss() -> Any:
    """The function (h, W, targets) -> the sum of the cross-entropies of h W^T, in float32, with W frozen.

    h is (tokens, hidden), W (vocabulary, hidden), both of one precision; targets (tokens,).
    """
    import torch

    class HeadLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any, targets: Any) -> Any:
            tokens, filling = len(hidden), -len(hidden) % PRODUCT_MULTIPLE
            hidden = torch.nn.functional.pad(hidden, (0, 0, 0, filling))
            targets = torch.nn.functional.pad(targets, (0, filling))
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            rows = min(BLOCK, len(hidden))
            products = torch.empty((rows, len(weight)), dtype=weight.dtype, device=hidden.device)
            floats = torch.empty((rows, len(weight)), dtype=torch.float32, device=hidden.device)
            for start in range(0, len(hidden), BLOCK):
                block, wanted = hidden[start : start + BLOCK], targets[start : start + BLOCK, None]
                product = torch.mm(block, weight.t(), out=products[: len(block)])
                logits = floats[: len(block)].copy_(product)
                logits.sub_(logits.amax(1, keepdim=True))
                right = logits.gather(1, wanted)
                sums = logits.exp_().sum(1, keepdim=True)
                total += (sums.log() - right)[: tokens - start].sum()
                if grad is not None:  # softmax less one at the target
                    logits.div_(sums).scatter_add_(1, wanted, torch.full_like(right, -1.0))
                    torch.mm(product.copy_(logits), weight, out=grad[start : start + BLOCK])
            ctx.save_for_backward(None if grad is None else grad[:tokens])
            return total

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            (grad,) = ctx.saved_tensors
            return grad * grads[0].to(grad.dtype), None, None

    return HeadLoss.apply


def is_plain(head: Any, hidden: Any) -> bool:
    """Whether an output layer is a plain one that is not trained, of the precision of what it reads."""
    import torch

    plain = type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad
    return plain and head.weight.dtype == hidden.dtype and not torch.is_autocast_enabled(hidden.device.type)
