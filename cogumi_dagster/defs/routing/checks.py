"""What routing must show. All figures are on rows that the fitted part has not seen."""

from cogumi_dagster.defs.claims import Claim

ROUTING_EXAMPLES = (
    Claim("both_labels", lambda m: min(m["base_right"]["successes"], m["base_right"]["count"] - m["base_right"]["successes"]), "answers of the rarer label (base right or wrong)", at_least=5),
)  # fmt: skip
CONFIDENCE_CALIBRATION = (
    Claim("calibration_error", "after.ece", "expected calibration error", at_most="ece"),
    Claim("better_than_base_rate", lambda m: m["of_base_rate"]["brier"]["value"] - m["after"]["brier"]["value"], "Brier score gained over predicting the base rate", at_least=0.0),
)  # fmt: skip
ROUTER_MODEL = (
    Claim("auroc", "of_router.auroc", "area under the ROC of 'the base is right'", at_least="auroc"),
    Claim("decides_fast", "milliseconds_median", "milliseconds a decision, median", at_most="router_ms"),
    Claim("recovers_gain", "gain_recovered", "share of the oracle's gain over the base recovered", at_least=0.3),
)
ESCALATION_DETECTOR = (
    Claim("accuracy", "accuracy", "accuracy on held-out groups of paraphrases", at_least="escalation_accuracy"),
    Claim("recall_dissatisfied", "recall_dissatisfied", "dissatisfied messages found", at_least="escalation_recall"),
)
