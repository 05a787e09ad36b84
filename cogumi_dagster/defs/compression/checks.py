"""What compression must keep."""

from cogumi_dagster.defs.claims import Claim, ratio

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
    Claim("perplexity_within_budget", "perplexity_ratio", "perplexity of the served file over its parent's", at_most="perplexity_ratio"),
)  # fmt: skip
PACKAGED_BASE = (
    Claim("bit_identical", "bit_identical", "unpacking gives the same bytes", at_least=1.0, blocking=True),
    Claim("within_budget", lambda m: m["bytes_after"] / 1e6, "packed bytes, in MB", at_most="packaged_base_mb"),
)
COMPRESSION_FRONTIER = (
    Claim("bytes_predicted", "worst_prediction_error", "predicted against actual bytes, worst type", at_most="bytes_predicted_within"),
)  # fmt: skip
