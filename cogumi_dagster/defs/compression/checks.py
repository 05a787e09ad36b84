"""What compression must keep."""

from collections.abc import Callable, Mapping
from typing import Any

from cogumi_dagster.defs.claims import Claim, ratio


def _link(name: str, figure: str) -> Callable[[Mapping[str, Any]], Any]:
    """A figure of one link of the parity chain."""
    return lambda metrics: {link["link"]: link for link in metrics["links"]}[name][figure]


def _perplexity(link: str, before: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda metrics: _link(link, "perplexity")(metrics) / _link(before, "perplexity")(metrics)


PRUNED_CHECKPOINT = (
    Claim("sparsity_as_asked", "sparsity_missing", "largest shortfall of a layer class from its target", at_most=0.01),
    Claim("masks_kept", "masks_intact", "what a step zeroed is zero after every later one", at_least=1.0, blocking=True),
    Claim("perplexity", ratio("perplexity_after", "perplexity_before"), "perplexity after over before, without recovery", at_most="perplexity_ratio"),
)  # fmt: skip
RECOVERED_CHECKPOINT = (
    Claim("mask_intact", "mask_intact", "every pruned weight is still zero", at_least=1.0, blocking=True),
    Claim("perplexity_recovered", ratio("perplexity_recovered", "perplexity_parent"), "perplexity over the unpruned parent's", at_most="perplexity_recovered_ratio"),
)  # fmt: skip
AWQ_CHECKPOINT = (
    Claim("logits_equal", "parity.mean_kl", "mean KL of folded against unfolded", at_most="export_kl", blocking=True),
    Claim("scales_applied", "scaled_layers", "normalisation layers whose scale changed", at_least=1),
)
W4A16_CHECKPOINT = (
    Claim(
        "perplexity",
        ratio("perplexity", "perplexity_parent"),
        "perplexity over the 16-bit parent's",
        at_most="perplexity_ratio",
    ),
)
GGUF_MODEL = (
    Claim("export_equals_parent", "f16_parity.mean_kl", "mean KL of the f16 GGUF in llama.cpp against transformers", at_most="export_kl", blocking=True),
    Claim("perplexity_within_budget", "perplexity_change", "perplexity of the served file over its parent's", at_most="perplexity_ratio"),
)  # fmt: skip
PACKAGED_BASE = (
    Claim("bit_identical", "bit_identical", "unpacking gives the same bytes", at_least=1.0, blocking=True),
    Claim("within_budget", lambda m: m["bytes_after"] / 1e6, "packed bytes, in MB", at_most="packaged_base_mb"),
)
COMPRESSION_FRONTIER = (
    Claim("bytes_predicted", "worst_prediction_error", "predicted against actual bytes, worst type", at_most="bytes_predicted_within"),
)  # fmt: skip
PARITY_CHAIN = (
    Claim("nothing_broken", lambda m: sum(bool(link["problem"]) for link in m["links"]), "links that the chain calls broken", at_most=0.0, blocking=True),
    Claim("same_ids", "same_ids", "prompts to which every link's tokenizer and template give the same ids", at_least=1.0, blocking=True),
    Claim("merged_equals_adapter", _link("merged", "mean_kl"), "mean KL of merged against student + adapter", at_most="merge_kl", blocking=True),
    Claim("awq_equals_recovered", _link("awq", "mean_kl"), "mean KL of the folded against the recovered checkpoint", at_most="export_kl", blocking=True),
    Claim("gguf_equals_awq", _link("gguf_f16", "mean_kl"), "mean KL of the f16 GGUF in llama.cpp against the AWQ parent", at_most="export_kl", blocking=True),
    Claim("unpacked_equals_quantized", _link("unpacked", "mean_kl"), "mean KL of the unpacked against the quantized file", at_most=0.0, blocking=True),
    Claim("served_equals_unpacked", _link("served", "mean_kl"), "mean KL of the server's first tokens against the unpacked file", at_most="served_kl", blocking=True),
    Claim("recovered_within_budget", _perplexity("recovered", "merged"), "perplexity of the solutions, pruned and recovered over merged", at_most="perplexity_recovered_ratio"),
    Claim("quantized_within_budget", _perplexity("quantized", "gguf_f16"), "perplexity of the solutions, quantized over f16", at_most="perplexity_ratio"),
    Claim("score_kept", "score_p_value", "chance (McNemar) of the difference between served and trained score", at_least=0.05),
)  # fmt: skip
