"""AutoAWQ 0.2.9 as a second engine for the scale search: no longer maintained, so patched narrowly.

What does not hold on a CPU, with today's transformers or for folding is replaced here, and nothing more:

- on a CPU its copy of the weights (``v.cpu()``) is no copy: the search multiplies it in place, and leaves every layer
  with the scales of its first grid point on the weights but not on the layer before. It runs, and the model is wrong.
- its way of catching the first layer's inputs runs the model with a cache, which every later forward of a layer would
  grow, and hands them to ``prepare_inputs_for_generation``.
- it would clip the weights, which a parent of equal logits must not have.
"""

import warnings
from typing import Any

from cogumi_dagster.lib.compression.compressor import BATCH, Calibration
from cogumi_dagster.lib.errors import CogumiError, nearest
from cogumi_dagster.lib.profile import AwqConfig

AUTOAWQ_GRID = 20
"""``n_grid`` of its search, which it does not let one set (awq/quantize/quantizer.py)."""


def search_autoawq(model: Any, tokenizer: Any, data: Calibration, config: AwqConfig) -> None:
    """Search the scales and fold them into ``model`` in place, without clipping or quantizing.

    Raises:
        CogumiError: AutoAWQ is not installed, or does not know the architecture.
    """
    try:
        with warnings.catch_warnings(record=True):  # on import it announces its end, past every filter
            from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP
            from awq.quantize.quantizer import AwqQuantizer
    except ImportError as error:
        raise CogumiError(
            f"AutoAWQ cannot be imported: {error}", "pip install autoawq, or set compression.awq.engine: llmcompressor"
        ) from error
    kind = model.config.model_type
    if kind not in AWQ_CAUSAL_LM_MODEL_MAP:
        raise CogumiError(f"AutoAWQ does not know {kind!r} models", nearest(kind, AWQ_CAUSAL_LM_MODEL_MAP))

    class Quantizer(AwqQuantizer):  # type: ignore[misc]
        def init_quant(self, n_samples: int = 128, max_seq_len: int = 512) -> tuple[Any, dict[str, Any], Any]:
            """(layers, arguments of a layer, inputs of the first layer (samples, tokens, hidden))."""
            return _first_layer(self.awq_model, self.model, data)

        def _compute_best_scale(
            self, x: Any, w_mean: Any, x_mean: Any, module2inspect: Any, *rest: Any, **options: Any
        ) -> Any:
            copying = module2inspect.register_state_dict_post_hook(_copy_state)
            try:
                return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *rest, **options)
            finally:
                copying.remove()

    wrapper = AWQ_CAUSAL_LM_MODEL_MAP[kind](model, kind, False, model.config, None, None)
    wrapper.quantize(
        tokenizer,
        quant_config={
            "zero_point": not config.symmetric,
            "q_group_size": config.group_size,
            "w_bit": config.bits,
            "version": "GEMM",
        },
        export_compatible=True,
        apply_clip=False,
        n_parallel_calib_samples=BATCH,
        quantizer_cls=Quantizer,
    )


def _copy_state(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, value in state.items():
        state[name] = value.clone()


def _first_layer(wrapper: Any, model: Any, data: Calibration) -> tuple[Any, dict[str, Any], Any]:
    import torch

    layers = wrapper.get_model_layers(model)
    with torch.no_grad():
        inputs = model.get_input_embeddings()(torch.tensor(data.data["input_ids"]))
        positions = torch.arange(inputs.shape[1])[None]
        # no mask: the samples are of one length, and attention without a mask is causal
        arguments = {"position_ids": positions, "position_embeddings": model.model.rotary_emb(inputs, positions)}
    return layers, {"attention_mask": None, **arguments}, inputs
