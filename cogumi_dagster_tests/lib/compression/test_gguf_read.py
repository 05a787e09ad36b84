from pathlib import Path

import pytest

from cogumi_dagster.lib.compression.gguf_read import dequantize_checkpoint, hf_state_dict, open_gguf
from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.evaluation.gguf_logits import flatten, gguf_answer_logits
from cogumi_dagster.lib.training.batches import Pair
from cogumi_dagster.lib.training.merge import answer_logits, parity
from cogumi_dagster.lib.training.student import load_checkpoint


def test_reading_back_an_export_gives_the_weights(student: Path, f16_gguf: Path) -> None:
    model, _ = load_checkpoint(student, "float32")
    state = hf_state_dict(open_gguf(f16_gguf))
    wanted = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert set(state) == set(wanted)
    for name, value in wanted.items():
        # bfloat16 weights are exact in float16 unless they are below its smallest normal number
        assert abs(state[name] - value.numpy()).max() < 1e-7, name


def test_the_dequantized_checkpoint_is_what_is_served(
    student: Path, quantized_gguf: Path, pairs: list[Pair], tmp_path: Path
) -> None:
    dequantize_checkpoint(quantized_gguf, student, tmp_path / "served")
    served, tokenizer = load_checkpoint(tmp_path / "served", "float32")
    state = hf_state_dict(open_gguf(quantized_gguf))
    assert all((served.state_dict()[name].numpy() == value).all() for name, value in state.items())
    assert served.config.tie_word_embeddings
    reference = flatten(answer_logits(served, tokenizer, pairs[:6], 512))
    report = parity(reference, flatten(gguf_answer_logits(quantized_gguf, tokenizer, pairs[:6])))
    assert report.mean_kl < 2e-3, "llama.cpp also rounds activations to 8 bit"
    parent, _ = load_checkpoint(student, "float32")
    assert parity(flatten(answer_logits(parent, tokenizer, pairs[:6], 512)), reference).mean_kl > 0


@pytest.mark.parametrize(
    "damage", ["missing", "empty", "not a gguf", "cut in the header", "cut in the tensors", "counts"]
)
def test_what_is_no_sound_gguf_is_refused(f16_gguf: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "bad.gguf"
    data = f16_gguf.read_bytes()
    match damage:
        case "empty":
            path.touch()
        case "not a gguf":
            path.write_bytes(b"PK\x03\x04" * 100)
        case "cut in the header":
            path.write_bytes(data[:5000])
        case "cut in the tensors":
            path.write_bytes(data[:-1000])
        case "counts":
            path.write_bytes(data[:8] + b"\xff" * 16 + data[24:10_000])
    with pytest.raises(CogumiError, match="there is no file" if damage == "missing" else "not a sound GGUF"):
        open_gguf(path)
