"""What a strategy must show."""

from cogumi_dagster.defs.claims import Claim, ratio

STRATEGY_JOURNAL = (Claim("strategies_tried", "strategies", "strategies that were tried on problems", at_least=2),)
LEARNED_STRATEGY = (
    Claim("verified_share", lambda m: m["traces"] / (m["traces"] + m["rejected"]), "share of the teacher's traces that their verifier accepts", at_least=0.8),
    Claim("classes_balanced", "imbalance", "largest difference between the shares of a family's classes; of open answers, repeats of the commonest", at_most=0.05),
)  # fmt: skip
STRATEGY_ADAPTER = (
    Claim("supervised", "supervised_tokens", "tokens that carried loss", at_least=1, blocking=True),
    Claim("loss_fell", ratio("loss_last", "loss_first"), "training loss, last fifth of the steps over the first", at_most=0.999),
)  # fmt: skip
STRATEGY_EVALUATION = (
    Claim("better_than_untrained", lambda m: m["adapter_balanced_accuracy"] - m["untrained_balanced_accuracy"], "gain in balanced accuracy over the untrained student", at_least=0.05),
    Claim("balanced_accuracy", lambda m: m["stages"][2]["balanced_accuracy"], "balanced accuracy of the served student with adapter", at_least="strategy_balanced_accuracy"),
)  # fmt: skip
