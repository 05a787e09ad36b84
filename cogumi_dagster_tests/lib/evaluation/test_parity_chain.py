"""The chain on a tiny random model, whole and with each link broken on purpose."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogumi_dagster.lib.compression.gguf_export import quantize_gguf, write_gguf
from cogumi_dagster.lib.compression.package import pack
from cogumi_dagster.lib.evaluation import parity_chain as module
from cogumi_dagster.lib.evaluation import parity_links
from cogumi_dagster.lib.evaluation.parity_chain import LINKS, Chain, ChainReport, _p_value, benchmark, check_chain
from cogumi_dagster.lib.training.batches import Pair, prompt_ids
from cogumi_dagster.lib.training.merge import merge_adapter
from cogumi_dagster.lib.training.student import load_checkpoint, save_checkpoint
from cogumi_dagster.lib.training.trim import trim_vocabulary

TASKS = 2


@pytest.fixture(scope="module", autouse=True)
def _short_answers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity_links, "ANSWER_TOKENS", 6)
        yield


def save_adapter(student: Path, out: Path) -> Path:
    """A LoRA whose B is not zero, with a rank and a scale of its own for the feed-forward layers."""
    import torch
    from peft import LoraConfig, get_peft_model

    model, _ = load_checkpoint(student, "float32")
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=targets, rank_pattern={"down_proj": 2}, task_type="CAUSAL_LM"
    )
    torch.manual_seed(1)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    adapted.save_pretrained(out)
    return out


def changed(checkpoint: Path, out: Path, change: Callable[[str, Any], None]) -> Path:
    """A copy with ``change(name, parameter)`` done to every parameter."""
    import torch

    model, tokenizer = load_checkpoint(checkpoint, "float32")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change(name, parameter)
    save_checkpoint(model.bfloat16(), tokenizer, out)
    return out


def prune(name: str, parameter: Any) -> None:
    if "proj" in name:
        parameter[parameter.abs() < 0.3 * parameter.std()] = 0.0


def fold(name: str, parameter: Any) -> None:
    """Powers of two, exact in any float: the norm doubled, the projections after it halved."""
    if "0.input_layernorm" in name:
        parameter.mul_(2)
    elif any(f"layers.0.self_attn.{kind}_proj" in name for kind in "qkv"):
        parameter.div_(2)


@pytest.fixture(scope="module")
def chain(full_student: Path, pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Every link made as the graph makes it, but for pruning and AWQ, which are done by hand."""
    folder = tmp_path_factory.mktemp("chain")
    drawn = [Pair(task.prompt, task.solution or "") for task in benchmark(TASKS)]
    trim_vocabulary(full_student, [*drawn, *pairs], pairs[:1], folder / "student")
    adapter = save_adapter(folder / "student", folder / "adapter")
    merge_adapter(folder / "student", adapter, folder / "merged", pairs[:2], max_length=512)
    recovered = changed(folder / "merged", folder / "recovered", prune)
    awq = changed(recovered, folder / "awq", fold)
    write_gguf(awq, folder / "f16.gguf")
    quantize_gguf(folder / "f16.gguf", folder / "model.gguf", "Q8_0")
    pack(folder / "model.gguf", folder / "package", level=1, dictionary_kb=8)
    return Chain(
        student=folder / "student",
        adapter=adapter,
        merged=folder / "merged",
        recovered=recovered,
        awq=awq,
        quantized=folder / "model.gguf",
        package=folder / "package",
        gguf_f16=folder / "f16.gguf",
    )


@pytest.fixture(scope="module")
def whole(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> tuple[ChainReport, Path]:
    out = tmp_path_factory.mktemp("report")
    return check_chain(replace(chain, gguf_f16=None), out, tasks=TASKS), out


def test_a_whole_chain_has_no_problem(whole: tuple[ChainReport, Path]) -> None:
    report, _ = whole
    assert [link.link for link in report.links] == list(LINKS)
    assert [link.problem for link in report.links] == [""] * len(LINKS)
    assert report.broken == ""
    assert (report.same_ids.successes, report.same_ids.count) == (TASKS * len(LINKS), TASKS * len(LINKS))


def test_links_that_must_be_equal_are_and_those_that_may_lose_do(whole: tuple[ChainReport, Path]) -> None:
    links = {link.link: link for link in whole[0].links}
    assert links["merged"].mean_kl < 1e-3 and links["gguf_f16"].mean_kl < 1e-4
    assert links["awq"].mean_kl < 1e-9, "powers of two are folded exactly"
    assert links["unpacked"].mean_kl == links["unpacked"].max_kl == 0
    assert 0 < links["served"].mean_kl < 1e-2 and links["served"].tokens == TASKS
    for name in ("recovered", "quantized"):
        assert not links[name].must_equal and links[name].mean_kl > 10 * links["gguf_f16"].mean_kl
    assert links["adapter"].mean_kl_first == 0 < links["recovered"].mean_kl_first
    assert links["gguf_f16"].mean_kl_first > 10 * links["gguf_f16"].mean_kl, "what pruning lost stays lost"
    assert all(link.max_kl >= link.mean_kl for link in links.values())
    assert links["served"].perplexity is None and links["unpacked"].perplexity == links["quantized"].perplexity


def test_every_link_is_scored_and_its_answers_are_kept(whole: tuple[ChainReport, Path]) -> None:
    report, out = whole
    assert {link.score.count for link in report.links} == {TASKS}
    assert report.score_p_value is None, "two tasks could never show a difference"
    rows = json.loads((out / "answers.json").read_text())
    assert [path.name for path in out.iterdir()] == ["answers.json"]
    assert [row["prompt"] for row in rows] == [task.prompt for task in benchmark(TASKS)]
    assert all(isinstance(row[link], str) for row in rows for link in LINKS)
    assert {row["unpacked"] == row["quantized"] for row in rows} == {True}


def test_the_benchmark_is_fixed_and_of_the_test_split() -> None:
    assert benchmark(8)[:TASKS] != [] and benchmark(8) == benchmark(8)
    assert {task.split for task in benchmark(8)} == {"test"}
    assert all(task.solution for task in benchmark(30))
    assert max(len(task.solution or "") for task in benchmark(30)) <= 56


@pytest.fixture
def problem(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str]]:
    """(names of broken links, problem of the last link) of a chain from one link to another."""

    def run(first: str, last: str, **changes: Path) -> tuple[str, str]:
        monkeypatch.setattr(module, "LINKS", LINKS[LINKS.index(first) : LINKS.index(last) + 1])
        report = check_chain(replace(chain, **changes), tmp_path / "out", tasks=TASKS)
        return report.broken, report.links[-1].problem

    return run


Problem = Callable[..., tuple[str, str]]


def merged_at(chain: Chain, out: Path, scale: float) -> Path:
    """The adapter merged at ``scale`` instead of alpha / rank."""
    from safetensors.torch import load_file

    factors = load_file(chain.adapter / "adapter_model.safetensors")

    def add(name: str, parameter: Any) -> None:
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in factors:
            parameter.add_(factors[f"{prefix}.lora_B.weight"] @ factors[f"{prefix}.lora_A.weight"], alpha=scale)

    return changed(chain.student, out, add)


@pytest.mark.parametrize(
    ("scale", "cause"), [(1.0, "merged at another scale than alpha / rank: 0."), (0.0, "the adapter is not merged")]
)
def test_an_unscaled_adapter_is_named(chain: Chain, problem: Problem, tmp_path: Path, scale: float, cause: str) -> None:
    broken, said = problem("adapter", "merged", merged=merged_at(chain, tmp_path / "wrong", scale))
    assert broken == "merged"
    assert said.startswith("another function: mean KL ") and cause in said


def test_a_tensor_changed_beside_the_adapter_is_named(chain: Chain, problem: Problem, tmp_path: Path) -> None:
    def spoil(name: str, parameter: Any) -> None:
        if name == "model.layers.1.self_attn.k_proj.weight":
            parameter.mul_(-1)

    _, said = problem("adapter", "merged", merged=changed(chain.merged, tmp_path / "wrong", spoil))
    assert "tensors moved that the adapter does not train: model.layers.1.self_attn.k_proj.weight (1)" in said


def test_scales_folded_on_one_side_are_named(chain: Chain, problem: Problem, tmp_path: Path) -> None:
    def half(name: str, parameter: Any) -> None:
        if "0.input_layernorm" in name:
            parameter.mul_(2)

    broken, said = problem("recovered", "awq", awq=changed(chain.recovered, tmp_path / "wrong", half))
    assert broken == "awq"
    assert "folded on one side only; moved: model.layers.0.input_layernorm.weight (1 tensors)" in said


def rewritten(
    gguf: Path, out: Path, *, metadata: dict[str, str | bool] | None = None, heads: dict[str, int] | None = None
) -> Path:
    """A copy with other metadata, or with the rows of some tensors as Hugging Face orders them."""
    from gguf import GGUFReader, GGUFWriter
    from gguf.constants import GGUFValueType
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    reader = GGUFReader(gguf)
    writer = GGUFWriter(out, "llama")
    kinds = {str: GGUFValueType.STRING, bool: GGUFValueType.BOOL}
    details = {name: MetadataDetails(kinds[type(value)], value) for name, value in (metadata or {}).items()}
    copy_with_new_metadata(reader, writer, details, [])
    if heads:
        changed = GGUFReader(out, "r+")
        for tensor in changed.tensors:
            for kind, count in heads.items():
                if f".{kind}." in tensor.name:
                    rows = np.array(tensor.data)
                    pairs = rows.reshape(count, len(rows) // count // 2, 2, -1)
                    tensor.data[:] = pairs.swapaxes(1, 2).reshape(rows.shape)
        changed.data.flush()
    return out


def test_unpermuted_heads_are_named(chain: Chain, problem: Problem, tmp_path: Path) -> None:
    config = json.loads((chain.awq / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    wrong = rewritten(chain.gguf_f16 or Path(), tmp_path / "wrong.gguf", heads=heads)
    broken, said = problem("awq", "gguf_f16", gguf_f16=wrong)
    assert broken == "gguf_f16"
    assert "the query and key heads are not permuted: rows of model.layers.0.self_attn.q_proj.weight" in said


def test_a_wrong_chat_template_is_named(chain: Chain, problem: Problem, tmp_path: Path) -> None:
    template = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    wrong = rewritten(chain.gguf_f16 or Path(), tmp_path / "wrong.gguf", metadata={"tokenizer.chat_template": template})
    broken, said = problem("awq", "gguf_f16", gguf_f16=wrong)
    assert broken == "gguf_f16"
    assert said.startswith(f"{TASKS} of {TASKS} prompts have other token ids: another chat template: '[INST] ")


def test_a_template_that_begins_with_bos_is_read_with_one(chain: Chain, tmp_path: Path) -> None:
    """Llama 3's files say so, and that BOS is to be added to plain text."""
    _, shared = load_checkpoint(chain.awq)
    file = rewritten(chain.gguf_f16 or Path(), tmp_path / "bos.gguf", metadata={"tokenizer.ggml.add_bos_token": True})
    pair = Pair("Say yes.", "yes")
    ids = prompt_ids(shared, pair.instruction)
    assert ids[0] == shared.bos_token_id
    assert parity_links.observe_gguf(file, [pair], shared).ids == [ids]


def test_a_wrong_pre_tokenizer_is_named(chain: Chain, problem: Problem, tmp_path: Path) -> None:
    wrong = rewritten(chain.gguf_f16 or Path(), tmp_path / "wrong.gguf", metadata={"tokenizer.ggml.pre": "falcon"})
    broken, said = problem("awq", "gguf_f16", gguf_f16=wrong)
    assert broken == "gguf_f16"
    assert "a wrong pre-tokenizer (tokenizer.ggml.pre is 'falcon')" in said


def test_a_package_of_another_file_is_named(chain: Chain, problem: Problem, tmp_path: Path) -> None:
    other = tmp_path / "model.gguf"
    shutil.copy2(chain.gguf_f16 or Path(), other)
    pack(other, tmp_path / "package", level=1, dictionary_kb=8)
    broken, said = problem("quantized", "unpacked", package=tmp_path / "package")
    assert (broken, said) == ("unpacked", "the package unpacks to another file than the quantized one: pack it again")


def test_a_server_with_another_template_is_named(
    chain: Chain, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = parity_links._Server
    asked = engine.chat

    def greet(self: Any, messages: Any, **options: Any) -> Any:
        return asked(self, [{"role": "system", "content": "Be brief."}, *messages], **options)

    monkeypatch.setattr(engine, "chat", greet)
    broken, said = problem("unpacked", "served")
    assert broken == "served"
    assert "the server applies another chat template, or adds a token" in said


def test_a_score_that_fell_is_told_from_chance_where_there_are_tasks_enough() -> None:
    drawn = benchmark(6)
    right, wrong = [task.solution or "" for task in drawn], [""] * 6
    assert _p_value(drawn, right, wrong) == pytest.approx(2 * 0.5**6)
    assert _p_value(drawn, right, right) == 1.0
    assert _p_value(drawn[:5], right[:5], wrong[:5]) is None
