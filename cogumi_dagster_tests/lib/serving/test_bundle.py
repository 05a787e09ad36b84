"""Bundles written and opened: every way in which one can be off is refused by name."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.serving.bundle import load_assistant, open_bundle, write_bundle
from cogumi_dagster.lib.serving.contract import Contract, adapter_contract, contract_of, family_versions
from cogumi_dagster.lib.tasks import family_version

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
OTHER = "0" * 64


def write_gguf(path: Path, **metadata: str) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        writer.add_string(key.replace("__", "."), value)
    writer.add_tensor("weight", np.arange(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Parts:
    """What a bundle is made from, each part of which a test may spoil before ``write``."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.tokenizer_files = {"tokenizer.json": folder / "tokenizer.json", "chat_template.jinja": folder / "t.jinja"}
        self.tokenizer_files["tokenizer.json"].write_text('{"model": {}}')
        self.tokenizer_files["chat_template.jinja"].write_text(TEMPLATE)
        self.base = write_gguf(folder / "model-Q5_K_M.gguf", tokenizer__chat_template=TEMPLATE)
        self.contract = contract_of(self.base, self.tokenizer_files).model_dump()
        carried = {f"cogumi__{key}": value for key, value in self.contract.items()}
        self.adapters = {
            "code": write_gguf(folder / "code.gguf", **carried),
            "reasoning": write_gguf(folder / "reasoning.gguf"),
        }
        self.contracts: dict[str, dict[str, Any]] = {"reasoning": {**self.contract, "rank": 16}}
        self.router = folder / "router"
        (self.router / "deep").mkdir(parents=True)
        (self.router / "weights.npz").write_bytes(b"weights")
        (self.router / "deep" / "router.json").write_text("{}")
        self.escalation = folder / "detector.npz"
        self.escalation.write_bytes(b"detector")
        self.card: dict[str, Any] = {"profile": "tiny", "artifacts": {"gguf_model": "v1"}}

    def write(self, out: Path) -> Any:
        return write_bundle(
            out, base_gguf=self.base, adapters=self.adapters, contracts=self.contracts, router_dir=self.router,
            escalation=self.escalation, tokenizer_files=self.tokenizer_files, card=self.card,
        )  # fmt: skip


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path / "parts")


@pytest.fixture
def bundle(parts: Parts, tmp_path: Path) -> Path:
    parts.write(tmp_path / "bundle")
    return tmp_path / "bundle"


def change_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def rehash(bundle: Path, name: str) -> None:
    """Make the manifest agree with a file that was swapped, as an attacker would."""
    data = (bundle / name).read_bytes()
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    change_manifest(bundle, lambda manifest: manifest["files"].update({name: entry}))


def test_a_modifier_of_another_version_of_its_tasks_is_refused(parts: Parts, tmp_path: Path) -> None:
    carried = {f"cogumi__{key}": value for key, value in parts.contract.items()}
    present = family_versions({name: family_version(name) for name in ("scheduling", "gcd")})
    parts.adapters["code"] = write_gguf(parts.folder / "code2.gguf", **carried, cogumi__families=present)
    parts.write(tmp_path / "good")
    for number, stated in enumerate(("gcd=1 scheduling=1", "no_such_family=1")):
        parts.adapters["code"] = write_gguf(parts.folder / f"bad{number}.gguf", **carried, cogumi__families=stated)
        with pytest.raises(CogumiError, match=r"the modifier code was taught version 1 of .*, this package has"):
            parts.write(tmp_path / f"bad{number}")
        assert not (tmp_path / f"bad{number}").exists()


def test_a_bundle_opens_with_everything_in_it(parts: Parts, tmp_path: Path) -> None:
    report = parts.write(tmp_path / "bundle")
    bundle = open_bundle(tmp_path / "bundle")
    assert sorted(bundle.manifest.files) == [
        "adapters/code.gguf", "adapters/reasoning.gguf", "base.gguf", "escalation.npz", "router/deep/router.json",
        "router/weights.npz", "tokenizer/chat_template.jinja", "tokenizer/tokenizer.json",
    ]  # fmt: skip
    assert bundle.base_gguf.read_bytes() == parts.base.read_bytes()
    assert sorted(bundle.adapters) == ["code", "reasoning"]
    assert bundle.adapters["code"].read_bytes() == parts.adapters["code"].read_bytes()
    assert bundle.manifest.card == parts.card and bundle.answer_tokens == 512
    parts.card["answer_tokens"] = 1024
    parts.write(tmp_path / "taught")
    assert open_bundle(tmp_path / "taught").answer_tokens == 1024
    assert bundle.manifest.contract.base_sha256 == hashlib.sha256(parts.base.read_bytes()).hexdigest()
    assert bundle.manifest.contract.template_sha256 == hashlib.sha256(TEMPLATE.encode()).hexdigest()
    assert "python" in bundle.manifest.versions
    assert report.version == bundle.version
    assert report.files == 8
    assert report.bytes == sum(
        p.stat().st_size for p in (tmp_path / "bundle").rglob("*") if p.name != "manifest.json" and p.is_file()
    )
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_same_parts_give_the_same_version(parts: Parts, tmp_path: Path) -> None:
    assert parts.write(tmp_path / "one").version == parts.write(tmp_path / "two").version


def test_a_copied_or_moved_bundle_still_opens(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "copy")
    assert open_bundle(tmp_path / "copy").version == open_bundle(bundle).version


def test_an_empty_folder_may_be_written_to_and_a_full_one_not(parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    parts.write(tmp_path / "out")
    with pytest.raises(CogumiError, match="exists already"):
        parts.write(tmp_path / "out")


# --- opening -------------------------------------------------------------------------------------


def test_a_folder_without_a_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    with pytest.raises(CogumiError, match=r"is not a bundle: it has no manifest.json\n  mend: "):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["base.gguf", "adapters/code.gguf", "router/weights.npz", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_file_is_named(bundle: Path, name: str, verify: bool) -> None:
    (bundle / name).unlink()
    with pytest.raises(CogumiError, match=f"{name} is missing"):
        open_bundle(bundle, verify)


@pytest.mark.parametrize("name", ["adapters/extra.gguf", "notes.txt", "router/deep/.hidden"])
def test_an_extra_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).write_text("x")
    with pytest.raises(CogumiError, match=f"{name} in .* is not in its manifest"):
        open_bundle(bundle)


def test_one_changed_bit_is_found_by_hash_and_a_changed_size_even_without(bundle: Path) -> None:
    base = bundle / "base.gguf"
    data = bytearray(base.read_bytes())
    data[-1] ^= 1
    base.write_bytes(data)
    open_bundle(bundle, verify=False)
    with pytest.raises(CogumiError, match=r"base.gguf in .* was changed"):
        open_bundle(bundle)
    base.write_bytes(data + b"x")
    with pytest.raises(CogumiError, match=r"base.gguf in .* bytes, the manifest says"):
        open_bundle(bundle, verify=False)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "a\\b", "./base.gguf", "a//b", "", "c:/x"])
def test_a_manifest_that_points_outside(bundle: Path, name: str) -> None:
    (bundle.parent / "outside").write_text("x")
    entry = {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}
    change_manifest(bundle, lambda manifest: manifest["files"].update({name: entry}))
    with pytest.raises(CogumiError, match="names a file outside the bundle"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["base.gguf", "router", "manifest.json"])
def test_a_link_is_refused_though_its_target_is_right(bundle: Path, name: str, tmp_path: Path) -> None:
    (bundle / name).rename(tmp_path / "elsewhere")
    (bundle / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CogumiError, match=r"is a link|has no manifest"):
        open_bundle(bundle)


def test_a_pipe_is_refused_without_being_read(bundle: Path) -> None:
    os.mkfifo(bundle / "pipe")
    with pytest.raises(CogumiError, match=r"pipe in .* is a link or no plain file"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(format=2),
        lambda m: m.update(extra=1),
        lambda m: m.pop("contract"),
        lambda m: m["files"]["base.gguf"].update(sha256="short"),
        lambda m: m["files"]["base.gguf"].update(bytes=-1),
        lambda m: m["adapters"].update({"../x": m["contract"]}),
    ],
)
def test_a_manifest_of_another_shape(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    change_manifest(bundle, change)
    with pytest.raises(CogumiError, match=r"is not a bundle's manifest"):
        open_bundle(bundle)


@pytest.mark.parametrize("text", ["", "not json", "[]", "[" * 5_000, "\udcff"])
def test_a_manifest_that_is_no_json(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CogumiError, match=r"is not a bundle's manifest"):
        open_bundle(bundle)


def test_an_adapter_in_the_manifest_without_its_file(bundle: Path) -> None:
    change_manifest(bundle, lambda m: m["adapters"].update(automation=m["contract"]))
    with pytest.raises(CogumiError, match=r"does not list adapters/automation.gguf"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("key", "word"), [("base_sha256", "base"), ("tokenizer_sha256", "tokenizer"), ("template_sha256", "chat template")]
)
def test_a_modifier_of_another_base_is_refused(bundle: Path, key: str, word: str) -> None:
    change_manifest(bundle, lambda m: m["adapters"]["reasoning"].update({key: OTHER}))
    with pytest.raises(CogumiError, match=f"the modifier reasoning was made for another {word}"):
        open_bundle(bundle)


def test_a_swapped_adapter_is_refused_though_the_manifest_was_made_to_agree(bundle: Path, parts: Parts) -> None:
    carried = {f"cogumi__{key}": value for key, value in parts.contract.items()}
    write_gguf(bundle / "adapters/code.gguf", **{**carried, "cogumi__base_sha256": OTHER})
    rehash(bundle, "adapters/code.gguf")
    with pytest.raises(CogumiError, match="the modifier code carries another base_sha256"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["base.gguf", "tokenizer/tokenizer.json", "tokenizer/chat_template.jinja"])
def test_a_swapped_base_is_refused_though_the_manifest_was_made_to_agree(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes((bundle / name).read_bytes() + b" ")
    rehash(bundle, name)
    with pytest.raises(CogumiError, match="contract is not that of its files"):
        open_bundle(bundle)


def test_an_adapter_that_is_no_gguf(bundle: Path) -> None:
    (bundle / "adapters/code.gguf").write_bytes(b"GGUF" + b"\xff" * 60)
    rehash(bundle, "adapters/code.gguf")
    with pytest.raises(CogumiError, match="is not a GGUF file"):
        open_bundle(bundle)


# --- writing -------------------------------------------------------------------------------------


def test_writing_refuses_a_modifier_of_another_base(parts: Parts, tmp_path: Path) -> None:
    parts.contracts["reasoning"]["base_sha256"] = OTHER
    with pytest.raises(CogumiError, match="the modifier reasoning was made for another base"):
        parts.write(tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_writing_refuses_a_contract_that_the_gguf_contradicts(parts: Parts, tmp_path: Path) -> None:
    parts.contracts["code"] = parts.contract | {"template_sha256": OTHER}
    with pytest.raises(CogumiError, match="the modifier code carries another template_sha256"):
        parts.write(tmp_path / "bundle")


def test_writing_refuses_a_modifier_without_a_contract(parts: Parts, tmp_path: Path) -> None:
    parts.contracts.clear()
    with pytest.raises(CogumiError, match="the modifier reasoning has no valid contract: base_sha256"):
        parts.write(tmp_path / "bundle")


def test_writing_refuses_a_template_that_is_not_the_served_one(parts: Parts, tmp_path: Path) -> None:
    parts.tokenizer_files["chat_template.jinja"].write_text(TEMPLATE + " ")
    with pytest.raises(CogumiError, match="another chat template than the tokenizer files"):
        parts.write(tmp_path / "bundle")


@pytest.mark.parametrize("part", ["base", "escalation"])
def test_writing_names_a_missing_part(parts: Parts, tmp_path: Path, part: str) -> None:
    getattr(parts, part).unlink()
    with pytest.raises(CogumiError, match="there is no file"):
        parts.write(tmp_path / "bundle")


def test_writing_needs_a_router_a_tokenizer_and_a_card(parts: Parts, tmp_path: Path) -> None:
    del parts.card["artifacts"]
    with pytest.raises(CogumiError, match="card lacks artifacts"):
        parts.write(tmp_path / "bundle")
    parts.card["artifacts"] = {}
    parts.router = tmp_path / "none"
    with pytest.raises(CogumiError, match="there is no router"):
        parts.write(tmp_path / "bundle")
    parts.router = parts.folder / "router"
    del parts.tokenizer_files["tokenizer.json"]
    with pytest.raises(CogumiError, match=r"lack tokenizer.json"):
        parts.write(tmp_path / "bundle")


@pytest.mark.parametrize("card", [{"number": float("nan")}, {"path": Path("x")}])
def test_a_card_that_is_no_json_leaves_nothing_behind(parts: Parts, tmp_path: Path, card: dict[str, Any]) -> None:
    parts.card |= card
    with pytest.raises(CogumiError, match="manifest cannot be written"):
        parts.write(tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


def test_the_template_may_come_from_the_tokenizer_configuration_or_the_gguf(parts: Parts) -> None:
    del parts.tokenizer_files["chat_template.jinja"]
    assert contract_of(parts.base, parts.tokenizer_files).model_dump() == parts.contract
    config = parts.folder / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": TEMPLATE}))
    parts.tokenizer_files["tokenizer_config.json"] = config
    assert contract_of(parts.base, parts.tokenizer_files).model_dump() == parts.contract
    bare = write_gguf(parts.folder / "bare.gguf")
    config.write_text("{}")
    with pytest.raises(CogumiError, match="no chat template"):
        contract_of(bare, parts.tokenizer_files)


def test_an_adapters_contract_is_read_from_its_gguf(parts: Parts) -> None:
    assert adapter_contract("code", parts.adapters["code"], None) == Contract(**parts.contract)


# --- loading -------------------------------------------------------------------------------------


def test_the_parts_of_an_assistant_come_from_the_bundle(bundle: Path, monkeypatch) -> None:
    """The real engine, router and detector have tests of their own; here only that each gets its own file."""
    seen: dict[str, Any] = {}

    def fake(name: str, **members: Any) -> None:
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, f"cogumi_dagster.lib.{name}", module)

    def engine(gguf: Path, adapters: dict[str, Path], **options: Any) -> Any:
        seen.update(gguf=gguf, adapters=adapters, **options)
        return SimpleNamespace(adapters=tuple(adapters))

    fake("inference.llama", LlamaEngine=engine)
    fake("routing.router", Router=SimpleNamespace(load=lambda folder: seen.update(router=folder)))
    fake("routing.escalation", EscalationDetector=SimpleNamespace(load=lambda path: seen.update(escalation=path)))
    assistant = load_assistant(open_bundle(bundle), slots=3, context=99, threads=2)
    assert assistant.models == ["cogumi", "cogumi-base", "cogumi-code", "cogumi-reasoning"]
    assert seen == {
        "gguf": bundle / "base.gguf",
        "adapters": {name: bundle / "adapters" / f"{name}.gguf" for name in ("code", "reasoning")},
        "slots": 3, "context": 99, "threads": 2,
        "router": bundle / "router", "escalation": bundle / "escalation.npz",
    }  # fmt: skip
