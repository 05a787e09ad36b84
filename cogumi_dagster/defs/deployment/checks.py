"""What is shipped must show this."""

from cogumi_dagster.defs.claims import Claim

SERVING_BUNDLE = (
    Claim("modifiers", lambda m: len(m["adapter_bytes"]), "modifiers that are served", at_least=1),
    Claim(
        "gates_passed",
        lambda m: len(m["gate_not_passed"]),
        "modifiers that are served without having passed their gate",
        at_most=0,
    ),
)
SYSTEM_EVALUATION = (
    Claim("no_regression", lambda m: 1.0 - float(m["regresses"]), "routing loses no more than it wins, beyond chance", at_least=1.0),
    Claim("gain", "gain", "accuracy of the routed system minus the base alone", at_least=0.0),
    Claim("served_as_evaluated", "spot_checks_equal", "answers of the assistant that took the evaluated route; a confidence near its threshold may fall on the other side by rounding", at_least=1.0),
    Claim("benchmark", lambda m: m["benchmarks"][0]["accuracy"]["value"], "HumanEval pass@1 of the base", at_least="benchmark_accuracy"),
)  # fmt: skip
MODEL_CARD = (
    Claim("complete", "missing", "assets of the graph that the report lacks", at_most=0),
    Claim("predicted_bytes_within", "worst_size_error", "bytes planned from shapes against those made, worst file", at_most="bytes_predicted_within"),
)  # fmt: skip
