"""The two learned parts of the router, as arrays: a small network for P(right), a logistic model for the domain.

scikit-learn trains them; NumPy runs them. A network of 128-64-32-1 has 10,369 parameters (41 kB).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.routing.calibration import base_rate, logit, sigmoid
from cogumi_dagster.lib.routing.features import DIMENSIONS, HASH_DIMENSIONS, TEXT_DIMENSIONS, Floats

Arrays = Mapping[str, NDArray[np.generic]]

EPOCHS = 60
BATCH = 32
WEIGHT_DECAY = 1.0
"""L2 of the network. Cross-fitted log loss on 120 synthetic rows: 0.69 at 0.1, 0.60 at 1, 0.65 at 10."""

DOMAIN_PENALTY = 10.0
"""scikit-learn's C of the domain classifier. Rows have length 1, so little regularisation is needed."""


def parameter_count(hidden: Sequence[int]) -> int:
    """Weights and biases of 128 - hidden - 1. 10,369 for 64-32."""
    sizes = [DIMENSIONS, *hidden, 1]
    return sum((inputs + 1) * outputs for inputs, outputs in pairwise(sizes))


@dataclass(frozen=True)
class Network:
    """A feed-forward network with ReLU: layers of weights (inputs, outputs) and biases (outputs,), float32."""

    layers: tuple[tuple[NDArray[np.float32], NDArray[np.float32]], ...]

    @property
    def parameters(self) -> int:
        return sum(weights.size + bias.size for weights, bias in self.layers)

    def probabilities(self, features: Floats) -> Floats:
        """P(right) (n,) from features (n, 128)."""
        values = features.astype(np.float32)
        for weights, bias in self.layers[:-1]:
            values = np.maximum(values @ weights + bias, 0.0)
        weights, bias = self.layers[-1]
        return sigmoid((values @ weights + bias)[:, 0].astype(np.float64))

    def to_arrays(self) -> dict[str, NDArray[np.float32]]:
        named = {f"weights{i}": weights for i, (weights, _) in enumerate(self.layers)}
        return {**named, **{f"bias{i}": bias for i, (_, bias) in enumerate(self.layers)}}

    @classmethod
    def from_arrays(cls, arrays: Arrays, hidden: Sequence[int]) -> "Network":
        """Rebuild and check the shapes.

        Raises:
            CogumiError: an array is missing, has another shape or a number that is not finite.
        """
        sizes = [DIMENSIONS, *hidden, 1]
        layers = []
        for i, (inputs, outputs) in enumerate(pairwise(sizes)):
            weights = checked_array(arrays, f"weights{i}", (inputs, outputs))
            layers.append((weights, checked_array(arrays, f"bias{i}", (outputs,))))
        return cls(tuple(layers))


def checked_array(arrays: Arrays, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """One array of a saved router, as float32."""
    found = arrays.get(name)
    if found is None or found.shape != shape or not np.isfinite(found.astype(np.float32)).all():
        said = "is missing" if found is None else f"has shape {found.shape} or is not finite"
        raise CogumiError(f"the router's {name} {said}; {shape} is needed", "materialize router_model again")
    return found.astype(np.float32)


def fit_network(features: Floats, passed: Floats, hidden: Sequence[int], seed: int) -> Network:
    """Train on features (n, 128) and labels (n,). With one class: all weights zero, the bias its smoothed rate."""
    sizes = [DIMENSIONS, *hidden, 1]
    if passed.min() == passed.max():
        constant = [(np.zeros((i, o), np.float32), np.zeros(o, np.float32)) for i, o in pairwise(sizes)]
        constant[-1][1][:] = logit(np.array([base_rate(passed)]))
        return Network(tuple(constant))
    centre, spread = _standard(features)
    layers = _train((features - centre) / spread, passed, hidden, seed)
    # The standardisation goes into the first layer, so that the network reads raw features.
    weights, bias = layers[0]
    layers[0] = (weights / spread[:, None], bias - (centre / spread) @ weights)
    network = Network(tuple((w.astype(np.float32), b.astype(np.float32)) for w, b in layers))
    assert network.parameters == parameter_count(hidden)
    return network


def _standard(features: Floats) -> tuple[Floats, Floats]:
    """Centre and spread. Only confidence is standardised: 112 text features of unit variance would drown 16."""
    centre, spread = features.mean(axis=0), features.std(axis=0)
    centre[:TEXT_DIMENSIONS], spread[:TEXT_DIMENSIONS] = 0.0, 1.0
    return centre, np.where(spread > 1e-9, spread, 1.0)


def _train(inputs: Floats, passed: Floats, hidden: Sequence[int], seed: int) -> list[tuple[Floats, Floats]]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    model = MLPClassifier(
        tuple(hidden), alpha=WEIGHT_DECAY, batch_size=min(BATCH, len(inputs)), max_iter=EPOCHS, random_state=seed
    )
    with warnings.catch_warnings():
        # The number of epochs is the budget, not a failure to converge.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(inputs, passed.astype(int))
    return list(zip(model.coefs_, model.intercepts_, strict=True))


@dataclass(frozen=True)
class DomainClassifier:
    """Multinomial logistic regression on hashed text: weights (domains, 4096), bias (domains,), float32."""

    domains: tuple[str, ...]
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]

    def choose(self, hashed: Floats) -> str:
        """The likeliest domain of a hashed prompt (4096,)."""
        # Only the buckets in use: a product with all 4,096 would wake BLAS's threads, at 8 ms in the worst case.
        used = np.flatnonzero(hashed)
        return self.domains[int(np.argmax(self.weights[:, used] @ hashed[used].astype(np.float32) + self.bias))]


def fit_domains(hashed: Floats, domains: Sequence[str]) -> DomainClassifier:
    """Train on hashed prompts (n, 4096). Weights are rounded to the 16 bits in which they are saved."""
    from scipy import sparse
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    names = tuple(sorted(set(domains)))
    weights, bias = np.zeros((len(names), HASH_DIMENSIONS)), np.zeros(len(names))
    if len(names) > 1:
        model = LogisticRegression(C=DOMAIN_PENALTY, max_iter=1000)
        # L-BFGS on small vectors: BLAS's threads cost ten times more than they bring.
        with threadpool_limits(1, user_api="blas"):
            model.fit(sparse.csr_matrix(hashed), np.array(domains))
        # With two classes scikit-learn keeps one row: the second class against the first.
        weights = model.coef_ if len(names) > 2 else np.vstack([-model.coef_, model.coef_]) / 2
        bias = model.intercept_ if len(names) > 2 else np.concatenate([-model.intercept_, model.intercept_]) / 2
    return DomainClassifier(names, weights.astype(np.float16).astype(np.float32), bias.astype(np.float32))
