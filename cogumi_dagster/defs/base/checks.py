"""What the student and its training must show."""

from cogumi_dagster.defs.claims import Claim, ratio

STUDENT_MODEL = (
    Claim(
        "tokenizer_matches",
        ratio("tokenizer_same", "tokenizer_strings"),
        "varied strings with llama.cpp's ids",
        at_least=1.0,
        blocking=True,
    ),
    Claim(
        "tokenizer_round_trip",
        ratio("tokenizer_round_trips", "tokenizer_strings"),
        "varied strings that decode back to themselves",
        at_least=1.0,
    ),
)
TRIMMED_STUDENT = (
    Claim("ids_remapped", ratio("same_ids", "texts"), "corpus texts with the same tokens, renumbered", at_least=1.0, blocking=True),
    Claim("perplexity_kept", "perplexity_ratio", "perplexity against the untrimmed student", at_most="trim_perplexity_ratio"),
)  # fmt: skip
BASE_ADAPTER = (
    Claim(
        "loss_fell",
        ratio("loss_last", "loss_first"),
        "training loss, last fifth of the steps over the first",
        at_most=0.999,
    ),
    Claim(
        "validation_improved",
        ratio("validation_loss_after", "validation_loss_before"),
        "validation loss after over before",
        at_most=1.0,
    ),
)
BASE_CHECKPOINT = (
    Claim("merged_equals_adapter", "parity.mean_kl", "mean KL of merged against base + adapter", at_most="merge_kl", blocking=True),
    Claim("greedy_agreement", "parity.greedy_agreement", "share of tokens with the same first choice", at_least=0.98),
)  # fmt: skip
