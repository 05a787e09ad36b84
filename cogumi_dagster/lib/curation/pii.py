"""Personal data and secrets in a text, found by shape and then checked: check digits, address ranges, examples.

Check digits of national numbers are python-stdnum's.
"""

import functools
import ipaddress
import re
from collections.abc import Callable
from importlib import import_module

EMAIL = re.compile(r"(?<![\w.+-])([\w.+-]+)@((?:[a-z0-9-]+\.)+[a-z]{2,})(?![\w@])", re.I | re.A)
EXAMPLE_DOMAIN = re.compile(r"(?:^|\.)(?:example\.(?:com|org|net|edu)|example|test|invalid|localhost)$", re.I)
"""RFC 2606: names reserved for documentation are nobody's address."""
NOT_SUM = r"(?![\w]|[ ]*[=+*/]|-\d|\.\d)"
"""Not followed by what would make the digits part of an expression or a longer number."""
PHONE = re.compile(
    r"(?<![\w.+*/=-])(?:\+?1[-. ]?)?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[-.])[2-9]\d{2}[-.]\d{4}" + NOT_SUM, re.A
)
PHONE_ABROAD = re.compile(r"(?<![\w+])\+[1-9]\d{0,2}(?:[ .-]\(?\d{1,7}\)?){2,5}" + NOT_SUM, re.A)
FICTIONAL_PHONE = re.compile(r"555\D?01\d\d$", re.A)
"""555-0100 to 555-0199 are set aside for fiction by the North American Numbering Plan."""
CARD = re.compile(
    r"(?<![\w.-])(?:\d{4}([ -])\d{4}\1\d{4}\1\d{4}|3[47]\d{2}([ -])\d{6}\2\d{5}|\d{15,16})" + NOT_SUM, re.A
)
CARD_BRAND = re.compile(
    r"4\d{15}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}|6(?:011|5\d\d)\d{12}"
)
SOCIAL_SECURITY = re.compile(r"(?<![\w.+*/=-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}" + NOT_SUM, re.A)
PLACEHOLDERS = frozenset(
    {"123-45-6789", "078-05-1120", "219-09-9999", "12345678Z", "DE89370400440532013000", "GB82WEST12345698765432"}
)
"""Numbers of advertisements, textbooks and manuals, never issued or withdrawn."""
NATIONAL = {
    "stdnum.br.cpf": r"\d{3}\.\d{3}\.\d{3}-\d{2}",
    "stdnum.cn.ric": r"[1-9]\d{5}(?:19|20)\d{9}[\dX]",
    "stdnum.es.dni": r"\d{8}-?[A-HJ-NP-TV-Z]",
    "stdnum.es.nie": r"[XYZ]-?\d{7}-?[A-Z]",
    "stdnum.fr.nir": r"[12] ?\d{2} ?[0-2]\d ?(?:\d{2}|2[AB]) ?\d{3} ?\d{3} ?\d{2}",
    "stdnum.it.codicefiscale": r"[A-Z]{6}\d{2}[A-EHLMPRST]\d{2}[A-Z]\d{3}[A-Z]",
}
"""Numbers whose shape and check digits together are hardly met by chance."""
NAMED_NATIONAL = {
    "stdnum.de.idnr": ("steuer", r"\d{2} ?\d{3} ?\d{3} ?\d{3}"),
    "stdnum.in_.aadhaar": ("aadhaar", r"[2-9]\d{3}[ -]?\d{4}[ -]?\d{4}"),
    "stdnum.nl.bsn": ("bsn", r"\d{9}"),
    "stdnum.pl.pesel": ("pesel", r"\d{11}"),
    "stdnum.ca.sin": ("social insurance", r"\d{3}[ -]?\d{3}[ -]?\d{3}"),
}
"""Plain runs of digits, taken for such a number only in a text that names it."""
INSURANCE = re.compile(
    r"(?<!\w)(?!BG|GB|KN|NK|NT|TN|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D](?!\w)", re.A
)
"""A British National Insurance number: prefixes as HMRC allots them (NIM39110); it has no check digit."""
IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?(?!\w)", re.A)
IPV4 = re.compile(r"\b(?<![.-])\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}(?!\w|\.\d|-)", re.A)
DOTTED = re.compile(r"\.\d{1,3}\.\d", re.A)
IPV6 = re.compile(r"(?<![\w:.])[23][0-9a-f]{3}:(?:[0-9a-f]{0,4}:){1,6}[0-9a-f]{0,4}(?![\w:])", re.I | re.A)
"""A global unicast address (2000::/3); ``a::b`` is C++."""
PUBLIC_RESOLVERS = frozenset({"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9"})
DIGITS = re.compile(r"\d(?:(?:[ .()-]{0,2}\d){5}|\d[A-Z]\d\d[A-Z]\d{3}[A-Z])", re.A)
"""What a phone, card, account or national id cannot do without: most texts end here."""
KEY = re.compile(
    r"(?<![A-Za-z0-9_-])(?:sk-[A-Za-z0-9_-]{20,}|[sr]k_live_[A-Za-z0-9]{20,}|gsk_[A-Za-z0-9]{40,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,}|glpat-[\w-]{20,}|npm_[A-Za-z0-9]{36}"
    r"|pypi-AgE[\w-]{50,}|SG\.[\w-]{20,}\.[\w-]{40,}|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[\w-]{35}|hf_[A-Za-z0-9]{30,}"
    r"|dop_v1_[0-9a-f]{64}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"
    r"|-----BEGIN (?:[A-Z]{2,10} ){0,3}PRIVATE KEY(?: BLOCK)?-----",
    re.A,
)
KEY_STARTS = (
    "sk-", "k_live_", "gsk_", "AKIA", "ASIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "npm_",
    "pypi-", "SG.", "xox", "AIza", "hf_", "dop_v1_", "eyJ", "PRIVATE KEY",
)  # fmt: skip
"""One of them is in every key: a search for plain text is far faster than the pattern."""


def pii(text: str) -> str | None:
    """Personal data or a secret: e-mail, key or token, phone, card, account, national id, public IP address.

    Reserved examples (example.com, 555-01xx, private networks) and digits inside sums are no one's data.
    """
    if "@" in text and any(_real_email(match) for match in EMAIL.finditer(text)):
        return "pii:email"
    if any(start in text for start in KEY_STARTS) and any(_real_key(match.group()) for match in KEY.finditer(text)):
        return "pii:key"
    if DIGITS.search(text) and (found := _number(text)):
        return found
    if DOTTED.search(text) and any(_real_address(match, text) for match in IPV4.finditer(text)):
        return "pii:ipv4"
    if ":" in text and any(_real_ipv6(match.group()) for match in IPV6.finditer(text)):
        return "pii:ipv6"
    return None


def _number(text: str) -> str | None:
    if any(not FICTIONAL_PHONE.search(match.group()) for match in PHONE.finditer(text)):
        return "pii:phone"
    if "+" in text and any(_real_phone_abroad(match, text) for match in PHONE_ABROAD.finditer(text)):
        return "pii:phone"
    if any(_real_card(match.group()) for match in CARD.finditer(text)):
        return "pii:card"
    if any(_checked("stdnum.iban", match.group()) for match in IBAN.finditer(text)):
        return "pii:account"
    return "pii:national-id" if _national(text) else None


def _national(text: str) -> bool:
    if any(match.group() not in PLACEHOLDERS for match in SOCIAL_SECURITY.finditer(text)):
        return True
    if INSURANCE.search(text):
        return True
    for module, pattern in _national_patterns():
        if any(_checked(module, match.group()) for match in pattern.finditer(text)):
            return True
    low = text.lower()
    return any(
        name in low and any(_checked(module, match.group()) for match in _alone(pattern).finditer(text))
        for module, (name, pattern) in NAMED_NATIONAL.items()
    )


@functools.cache
def _national_patterns() -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple((module, _alone(pattern)) for module, pattern in NATIONAL.items())


@functools.cache
def _alone(pattern: str) -> re.Pattern[str]:
    """Not within a longer word, number or expression."""
    return re.compile(rf"(?<![\w.+*/=-])(?:{pattern})" + NOT_SUM, re.A)


@functools.cache
def _check_of(module: str) -> Callable[[str], bool]:
    return import_module(module).is_valid  # type: ignore[no-any-return]


def _checked(module: str, written: str) -> bool:
    return re.sub(r"[ -]", "", written) not in PLACEHOLDERS and _check_of(module)(written)


def _real_email(match: re.Match[str]) -> bool:
    return match.group(1).lower() != "git" and not EXAMPLE_DOMAIN.search(match.group(2))


def _real_key(key: str) -> bool:
    if key.startswith("-----"):
        return True
    placeholder = "EXAMPLE" in key or "your" in key.lower() or len(set(key)) < 10
    return not placeholder and any(character.isdigit() for character in key)


def _real_phone_abroad(match: re.Match[str], text: str) -> bool:
    digits = sum(character.isdigit() for character in match.group())
    in_a_sum = text[: match.start()].rstrip()[-1:] in set("0123456789)=*/xyz")
    return 9 <= digits <= 15 and not in_a_sum


def _real_card(written: str) -> bool:
    digits = re.sub(r"\D", "", written)
    if not CARD_BRAND.fullmatch(digits):
        return False
    return _luhn(digits)


def _luhn(digits: str) -> bool:
    """ISO/IEC 7812-1: every second digit from the right is doubled, the digits of all add up to a multiple of 10."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _real_address(match: re.Match[str], text: str) -> bool:
    written = match.group()
    if written in PUBLIC_RESOLVERS or re.search(r"(?:version|section|v)[ .]?$", text[: match.start()], re.I):
        return False
    if all(len(part) == 1 for part in written.split(".")):  # 3.2.1.4 is a section or a version
        return False
    try:
        address = ipaddress.IPv4Address(written)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast


def _real_ipv6(written: str) -> bool:
    try:
        return ipaddress.IPv6Address(written).is_global
    except ValueError:
        return False
