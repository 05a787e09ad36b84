"""A rule of thumb for how good a student of a size will be in a quantization: for ranking, not for promising.

Loss = what the published scaling law gives for the student's parameters and pretraining tokens, plus what its weights'
types cost by llama.cpp's published perplexities. The law was fitted to other models and another text, training on this
project's data is not in it, and small students lose more in few bits than the 8B model of the table.
"""

import math
from collections.abc import Mapping
from math import prod

from cogumi_dagster.lib.compression.gguf_layout import Shape
from cogumi_dagster.lib.planning.shapes import ModelShape

IRREDUCIBLE, A, ALPHA, B, BETA = 1.8172, 482.01, 0.3478, 2085.43, 0.3658
"""L = E + A / N^alpha + B / D^beta in nats a token: Hoffmann et al. 2022, as Besiroglu et al. fitted it again
(arXiv 2404.10102)."""

PERPLEXITY = {
    "Q8_0": 6.234284, "Q6_K": 6.253382, "Q5_K": 6.336598, "Q5_1": 6.337857, "Q5_0": 6.363224, "Q4_K": 6.500529,
    "IQ4_NL": 6.455593, "Q4_1": 6.682737, "Q4_0": 6.700147, "Q3_K": 7.863786, "Q2_K": 9.323778,
}  # fmt: skip
"""Of Llama-3-8B on wikitext with (nearly) all weights in that type: llama.cpp, tools/perplexity/README.md, the rows
Q8_0 to Q2_K_S; IQ4_NL and Q2_K_S with an importance matrix."""
UNQUANTIZED = 6.231636


def pretraining_loss(shape: ModelShape) -> float | None:
    """Nats a token in 16 bits; None where the pretraining tokens are not published."""
    if shape.pretraining_tokens is None:
        return None
    return IRREDUCIBLE + A / shape.parameters**ALPHA + B / shape.pretraining_tokens**BETA


def type_penalty(shapes: Mapping[str, Shape], types: Mapping[str, str]) -> float:
    """Nats a token that a file loses to 16 bits: the mean over its weights of what each one's type loses."""
    matrices = {name: prod(shape) for name, shape in shapes.items() if len(shape) == 2}
    lost = sum(
        count * math.log(PERPLEXITY.get(types[name], UNQUANTIZED) / UNQUANTIZED) for name, count in matrices.items()
    )
    return lost / sum(matrices.values())
