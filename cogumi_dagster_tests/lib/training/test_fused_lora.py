from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from cogumi_dagster.lib.training.fused_lora import _dropped, fuse_lora, lora_product
from cogumi_dagster.lib.training.precision import compute_dtype
from cogumi_dagster.lib.training.student import load_checkpoint


def model_with_lora(checkpoint: Path, dropout: float = 0.0, **options: Any) -> Any:
    model, _ = load_checkpoint(checkpoint, "float32")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=False,
        **options,
    )
    return get_peft_model(model, config)


def outcome(model: Any, train: bool = True) -> tuple[Any, dict[str, Any]]:
    model.train(train)
    torch.manual_seed(5)
    logits = model(torch.arange(24).reshape(2, 12)).logits
    logits.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach(), grads


def test_the_same_as_peft_forward_and_backward(imported: tuple[Path, Any]) -> None:
    model = model_with_lora(imported[0])
    logits, grads = outcome(model)
    assert fuse_lora(model) == 4
    fused_logits, fused_grads = outcome(model)
    torch.testing.assert_close(fused_logits, logits, rtol=1e-5, atol=1e-6)
    assert grads.keys() == fused_grads.keys() and len(grads) == 8
    for name in grads:
        torch.testing.assert_close(fused_grads[name], grads[name], rtol=1e-4, atol=1e-7)


def test_over_bfloat16_weights_the_adapter_keeps_float32(imported: tuple[Path, Any]) -> None:
    exact_logits, exact = outcome(model_with_lora(imported[0]))
    model = model_with_lora(imported[0])
    model.base_model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    logits, grads = outcome(model)
    assert fuse_lora(model) == 4
    fused_logits, fused_grads = outcome(model)
    assert fused_logits.dtype == torch.bfloat16 and {grad.dtype for grad in fused_grads.values()} == {torch.float32}
    assert distance(fused_logits.float(), exact_logits) < 1.5 * distance(logits.float(), exact_logits) < 0.05
    bound = 0.1 if compute_dtype("cpu") is torch.bfloat16 else 0.15  # PEFT's own, where bfloat16 is emulated
    for name in exact:
        assert distance(fused_grads[name], exact[name]) < 1.5 * distance(grads[name], exact[name]) < bound


def test_float16_is_left_to_peft_which_keeps_small_gradients(imported: tuple[Path, Any]) -> None:
    model = model_with_lora(imported[0])
    for module in model.modules():
        if hasattr(module, "base_layer"):
            module.base_layer.half()
    assert fuse_lora(model) == 0


def distance(one: Any, other: Any) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_against_finite_differences(drops: bool, biased: bool) -> None:
    torch.manual_seed(1)

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, a, b = draw(5, 6), draw(2, 6), draw(4, 2)
    weight, bias = draw(4, 6).detach(), draw(4).detach() if biased else None
    mask = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 1.0], dtype=torch.float64)

    def product(x: Any, a: Any, b: Any) -> Any:
        return lora_product()(x, x * mask if drops else None, weight, bias, a, b, 0.7)

    assert torch.autograd.gradcheck(product, (x, a, b))


def test_dropout_drops_in_training_only_and_alike_for_a_seed(imported: tuple[Path, Any]) -> None:
    model = model_with_lora(imported[0], dropout=0.5)
    quiet, _ = outcome(model, train=False)
    fuse_lora(model)
    torch.testing.assert_close(outcome(model, train=False)[0], quiet, rtol=1e-5, atol=1e-6)
    dropped, grads = outcome(model)
    again, grads_again = outcome(model)
    assert not torch.allclose(dropped, quiet) and torch.equal(dropped, again)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


@pytest.mark.parametrize("share", [0.05, 0.5])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_share_is_dropped_and_the_mean_kept(share: float, precision: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(700, 1001, dtype=precision, requires_grad=True)
    out = _dropped(x, torch.nn.Dropout(share))
    out.sum().backward()
    gone = out == 0
    assert out.dtype == precision and float(gone.float().mean()) == pytest.approx(share, abs=0.002)
    assert float(out.detach().float().mean()) == pytest.approx(1, abs=0.005)
    assert x.grad is not None and torch.equal(x.grad == 0, gone)
    neighbours = float((gone[:, 1:] & gone[:, :-1]).float().mean())
    assert neighbours == pytest.approx(share**2, abs=0.003), "one number's eight are independent"


def test_disabled_adapters_and_variants_are_left_to_peft(imported: tuple[Path, Any]) -> None:
    model = model_with_lora(imported[0])
    fuse_lora(model)
    with model.disable_adapter():
        off = model(torch.arange(12)[None]).logits
    assert not torch.allclose(off, model(torch.arange(12)[None]).logits)
    assert fuse_lora(model_with_lora(imported[0], use_dora=True)) == 0
