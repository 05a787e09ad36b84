"""The adapter contract: a modifier is only served on the base, tokenizer and chat template it was trained on."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cogumi_dagster.lib.errors import CogumiError
from cogumi_dagster.lib.gguf_file import read_gguf

TOKENIZER_FILE = "tokenizer.json"
GGUF_PREFIX = "cogumi."
"""Before a contract's keys in an adapter's GGUF metadata, as in ``cogumi.base_sha256``."""
GGUF_TEMPLATE = "tokenizer.chat_template"

FAMILIES = "families"
"""The key of the versions of the task families that a modifier was taught: ``code_value=1 gcd=2``."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Contract(BaseModel):
    """What a modifier was trained on. On anything else it is silent garbage.

    SHA-256 of the base's GGUF file as served, of ``tokenizer.json``, and of the chat template's text in UTF-8.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_sha256: Sha256
    tokenizer_sha256: Sha256
    template_sha256: Sha256


def contract_of(base_gguf: Path, tokenizer_files: Mapping[str, Path]) -> Contract:
    """The contract that every modifier of this base must carry.

    Raises:
        CogumiError: no ``tokenizer.json``, no chat template, or a template in the GGUF that is not the tokenizer's.
    """
    if TOKENIZER_FILE not in tokenizer_files:
        raise CogumiError(f"the tokenizer files lack {TOKENIZER_FILE}", "save the tokenizer with save_pretrained")
    trained = template_of(tokenizer_files)
    served = gguf_strings(base_gguf, (GGUF_TEMPLATE,)).get(GGUF_TEMPLATE)
    text = served if trained is None else trained
    if text is None:
        raise CogumiError("the base has no chat template", "add chat_template.jinja to the tokenizer files")
    if served is not None and served != text:
        problem = f"{base_gguf.name} carries another chat template than the tokenizer files"
        raise CogumiError(problem, "export the GGUF again from the checkpoint of these tokenizer files")
    return Contract(
        base_sha256=sha256_of(base_gguf),
        tokenizer_sha256=sha256_of(tokenizer_files[TOKENIZER_FILE]),
        template_sha256=hashlib.sha256(text.encode()).hexdigest(),
    )


def template_of(tokenizer_files: Mapping[str, Path]) -> str | None:
    """The chat template's text: ``chat_template.jinja``, else the one in ``tokenizer_config.json``, else None."""
    if path := tokenizer_files.get("chat_template.jinja"):
        return path.read_bytes().decode("utf-8")
    if path := tokenizer_files.get("tokenizer_config.json"):
        try:
            template = json.loads(path.read_bytes()).get("chat_template")
        except (ValueError, AttributeError) as error:
            raise CogumiError(
                f"{path} is not a tokenizer's configuration: {error}", "save the tokenizer again"
            ) from None
        return template if isinstance(template, str) else None
    return None


def adapter_contract(name: str, gguf: Path, stated: Mapping[str, Any] | None) -> Contract:
    """A modifier's contract, as stated beside it and as carried in its GGUF metadata; where both exist they agree.

    Raises:
        CogumiError: neither exists, they differ, a hash is missing or malformed, the file is no GGUF.
    """
    keys = tuple(Contract.model_fields)
    inside = gguf_strings(gguf, tuple(GGUF_PREFIX + key for key in keys))
    carried = {key.removeprefix(GGUF_PREFIX): value for key, value in inside.items()}
    beside = {key: stated[key] for key in keys if key in stated} if stated else {}
    for key in keys:
        if key in carried and key in beside and carried[key] != beside[key]:
            problem = f"the modifier {name} carries another {key} in its GGUF than is stated beside it"
            raise CogumiError(problem, f"materialize packaged_modifier for {name} again")
    try:
        return Contract.model_validate(carried | beside)
    except ValidationError as error:
        at = error.errors()[0]
        what = f"the modifier {name} has no valid contract: {'.'.join(map(str, at['loc']))}: {at['msg']}"
        raise CogumiError(what, f"materialize packaged_modifier for {name} again") from None


def refuse_mismatch(name: str, adapter: Contract, base: Contract) -> None:
    """Raise CogumiError that names what the modifier was made for and what it would be served on."""
    words = {"base_sha256": "base", "tokenizer_sha256": "tokenizer", "template_sha256": "chat template"}
    for key, word in words.items():
        wanted, given = getattr(adapter, key), getattr(base, key)
        if wanted != given:
            raise CogumiError(
                f"the modifier {name} was made for another {word} ({wanted[:12]}), this bundle's is {given[:12]}",
                f"train the modifier {name} on this base: materialize modifier_adapter for {name}",
            )


def refuse_other_base(name: str, adapter: Path, base: Path) -> None:
    """Raise CogumiError where an adapter's metadata says that it was trained on another file than ``base``."""
    key = GGUF_PREFIX + "base_sha256"
    wanted = gguf_strings(adapter, (key,)).get(key)
    if wanted is not None and wanted != (given := sha256_of(base)):
        raise CogumiError(
            f"the adapter {name} was trained on another base ({wanted[:12]}) than {base.name} ({given[:12]})",
            "materialize the adapter anew: its asset and what is downstream of it",
        )


def family_versions(families: Mapping[str, str]) -> str:
    """As the text that goes into an adapter's metadata."""
    return " ".join(f"{name}={version}" for name, version in sorted(families.items()))


def refuse_other_families(name: str, gguf: Path) -> None:
    """Raise CogumiError where a modifier was taught another version of a family of tasks than this package has: its
    calls may be of a schema that is no longer that of the verifiers. An adapter that names no family passes."""
    from cogumi_dagster.lib.tasks import FAMILIES as KNOWN
    from cogumi_dagster.lib.tasks import family_version

    stated = gguf_strings(gguf, (GGUF_PREFIX + FAMILIES,)).get(GGUF_PREFIX + FAMILIES, "")
    for entry in stated.split():
        family, _, version = entry.partition("=")
        present = family_version(family) if family in KNOWN else "none"
        if version != present:
            raise CogumiError(
                f"the modifier {name} was taught version {version} of {family}, this package has {present}",
                f"materialize domain_failures and what follows for {name} again",
            )


def gguf_strings(path: Path, keys: tuple[str, ...]) -> dict[str, str]:
    """The string metadata of a GGUF file under ``keys``, those that exist. Raises CogumiError if it is no GGUF."""
    if not path.is_file():
        raise CogumiError(f"there is no file {path}", "materialize it first")
    try:
        fields = read_gguf(path).fields
        values = {key: fields[key].contents() for key in keys if key in fields}
    except Exception as error:  # the reader raises whatever numpy and struct do on a damaged file
        raise CogumiError(f"{path} is not a GGUF file that can be read: {error}", "export it again") from None
    return {key: value for key, value in values.items() if isinstance(value, str)}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
