"""Package a modifier: prune its weights, write the GGUF adapter with its contract, compress, compare."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cogumi_dagster.lib.compression.gguf_lora import export_lora
from cogumi_dagster.lib.compression.gguf_read import dequantize_checkpoint
from cogumi_dagster.lib.compression.package import PackageReport, pack
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.gguf_logits import flatten, gguf_answer_logits
from cogumi_dagster.lib.serving.contract import TOKENIZER_FILE, contract_of
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.merge import ParityReport, answer_logits, parity
from cogumi_dagster.lib.training.student import load_checkpoint

ADAPTER_FILE = "modifier.gguf"
TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class ModifierPackageReport:
    """``parity``: transformers with the unpruned adapter against llama.cpp with the packaged one."""

    adapter_bytes: int
    package: PackageReport
    pruned_share: float
    parity: ParityReport
    contract: dict[str, str]


def tokenizer_files(checkpoint: Path) -> dict[str, Path]:
    """The tokenizer's files of a checkpoint, by name."""
    return {name: checkpoint / name for name in TOKENIZER_FILES if (checkpoint / name).is_file()}


def package_modifier(
    adapter: Path,
    gguf: Path,
    tokenizer_from: Path,
    pairs: Sequence[Pair],
    out: Path,
    *,
    prune_share: float,
    level: int,
    dictionary_kb: int,
) -> ModifierPackageReport:
    """Write ``modifier.gguf``, its zstd package and ``contract.json`` to ``out``."""
    from peft import PeftModel

    contract = contract_of(gguf, tokenizer_files(tokenizer_from)).model_dump()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        scratch = Path(folder)
        shutil.copytree(adapter, scratch / "adapter")
        zeroed = _prune_adapter(scratch / "adapter", prune_share) if prune_share > 0 else 0.0
        size = export_lora(scratch / "adapter", out / ADAPTER_FILE, base=tokenizer_from, contract=contract)
        dequantize_checkpoint(gguf, tokenizer_from, scratch / "served")
        base, tokenizer = load_checkpoint(scratch / "served", "float32")
        model = PeftModel.from_pretrained(base, adapter).eval()
        reference = flatten(answer_logits(model, tokenizer, pairs, 1024))
        other = flatten(gguf_answer_logits(gguf, tokenizer, pairs, lora=out / ADAPTER_FILE))
        package = pack(out / ADAPTER_FILE, out / "package", level=level, dictionary_kb=dictionary_kb)
    (out / "contract.json").write_text(json.dumps(contract, indent=1, sort_keys=True))
    return ModifierPackageReport(size, package, zeroed, parity(reference, other), contract)


def export_adapter(adapter: Path, gguf: Path, tokenizer_from: Path, out: Path) -> int:
    """Write a PEFT adapter as GGUF with the contract of the base ``gguf``; return its bytes."""
    contract = contract_of(gguf, tokenizer_files(tokenizer_from)).model_dump()
    return export_lora(adapter, out, base=tokenizer_from, contract=contract)


def _prune_adapter(adapter: Path, share: float) -> float:
    """Zero the smallest ``share`` of each LoRA matrix in place; return the share of zeros found after it."""
    import torch
    from safetensors.torch import load_file, save_file

    if not 0 <= share < 1:
        raise CogumiError(f"prune_share is {share}", "give a share from 0 to below 1")
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    zeros = total = 0
    for name, tensor in tensors.items():
        count = int(share * tensor.numel())
        if count:
            tensor.view(-1)[tensor.abs().flatten().topk(count, largest=False).indices] = 0.0
        zeros += int((tensor == 0).sum())
        total += tensor.numel()
        tensors[name] = tensor.to(torch.float32).contiguous()
    save_file(tensors, path)
    return zeros / total
