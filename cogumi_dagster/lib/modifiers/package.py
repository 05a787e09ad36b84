"""Package a modifier: prune its weights, write the GGUF adapter with its contract, compress, compare."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cogumi_dagster.lib.compression.gguf_lora import export_lora
from cogumi_dagster.lib.compression.gguf_read import dequantize_checkpoint
from cogumi_dagster.lib.compression.package import PackageReport, pack
from cogumi_dagster.lib.evaluation.gguf_logits import flatten, gguf_answer_logits
from cogumi_dagster.lib.modifiers.prune import PruneReport, prune_where_quality_holds
from cogumi_dagster.lib.modifiers.train import REPLAY
from cogumi_dagster.lib.progress import Progress, silent
from cogumi_dagster.lib.serving.contract import FAMILIES, TOKENIZER_FILE, contract_of, family_versions
from cogumi_dagster.lib.training.batches import Pair, encode_pairs
from cogumi_dagster.lib.training.merge import ParityReport, answer_logits, parity
from cogumi_dagster.lib.training.student import load_checkpoint

ADAPTER_FILE = "modifier.gguf"
SECTION = "modifiers.training"
"""Of the profile, for errors."""
PARITY_EXAMPLES = 6
TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class ModifierPackageReport:
    """``parity``: transformers with the (pruned) adapter against llama.cpp with the packaged one."""

    adapter_bytes: int
    unpruned_bytes: int
    """Of the whole adapter as the same kind of file: F16, so that the ratio is what pruning and packing bring."""
    package: PackageReport
    pruning: PruneReport
    parity: ParityReport
    contract: dict[str, str]


def tokenizer_files(checkpoint: Path) -> dict[str, Path]:
    """The tokenizer's files of a checkpoint, by name."""
    return {name: checkpoint / name for name in TOKENIZER_FILES if (checkpoint / name).is_file()}


def package_modifier(
    adapter: Path,
    gguf: Path,
    tokenizer_from: Path,
    lessons: Sequence[Pair],
    validation: Sequence[Pair],
    out: Path,
    *,
    families: Mapping[str, str],
    max_length: int = 1024,
    prune_shares: Sequence[float] = (),
    prune_keeps: float = 0.95,
    level: int,
    dictionary_kb: int,
    progress: Progress = silent,
) -> ModifierPackageReport:
    """Write ``modifier.gguf`` (F16), its zstd package and ``contract.json`` to ``out``. ``families`` are the versions
    of the families of tasks that it was taught.

    It is pruned as far as it keeps its gain on ``validation``, lessons that it was not trained on, those of the replay
    left out (see ``prune``), and compared on ``lessons``. Longer ones than ``max_length`` tokens are left out, as in
    training.
    """
    from peft import PeftModel

    base_of = contract_of(gguf, tokenizer_files(tokenizer_from)).model_dump()
    contract = {**base_of, FAMILIES: family_versions(families)}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        scratch = Path(folder)
        dequantize_checkpoint(gguf, tokenizer_from, scratch / "served")
        base, tokenizer = load_checkpoint(scratch / "served", "float32")
        model = PeftModel.from_pretrained(base, adapter).eval()
        encoded, _ = encode_pairs(tokenizer, lessons, max_length, SECTION)
        held_back = [pair for pair in validation if pair.group != REPLAY]
        chosen, pruning = prune_where_quality_holds(
            model,
            adapter,
            encoded,
            encode_pairs(tokenizer, held_back, max_length, SECTION)[0] if held_back else [],
            scratch,
            shares=prune_shares,
            keeps=prune_keeps,
            progress=progress,
        )
        whole, size = (
            export_lora(source, path, base=tokenizer_from, contract=contract, type="F16")
            for source, path in ((adapter, scratch / ADAPTER_FILE), (chosen, out / ADAPTER_FILE))
        )
        compared = [lessons[item.index] for item in encoded[:PARITY_EXAMPLES]]
        reference = flatten(answer_logits(model, tokenizer, compared, max_length))
        other = flatten(gguf_answer_logits(gguf, tokenizer, compared, lora=out / ADAPTER_FILE))
        package = pack(out / ADAPTER_FILE, out / "package", level=level, dictionary_kb=dictionary_kb)
    (out / "contract.json").write_text(json.dumps(contract, indent=1, sort_keys=True))
    return ModifierPackageReport(size, whole, package, pruning, parity(reference, other), contract)


def export_adapter(adapter: Path, gguf: Path, tokenizer_from: Path, out: Path) -> int:
    """Write a PEFT adapter as GGUF with the contract of the base ``gguf``; return its bytes."""
    contract = contract_of(gguf, tokenizer_files(tokenizer_from)).model_dump()
    return export_lora(adapter, out, base=tokenizer_from, contract=contract)
