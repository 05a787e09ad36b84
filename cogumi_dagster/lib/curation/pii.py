"""Personal data and secrets in a text, found by shape and then checked: Luhn, address ranges, reserved examples."""

import ipaddress
import re

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
NATIONAL_ID = re.compile(r"(?<![\w.+*/=-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}" + NOT_SUM, re.A)
PLACEHOLDER_ID = frozenset({"123-45-6789", "078-05-1120", "219-09-9999"})
"""Numbers of advertisements and examples, never issued or withdrawn."""
IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d|-)", re.A)
PUBLIC_RESOLVERS = frozenset({"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9"})
DIGITS = re.compile(r"\d{3}[-. )]|\d{15}|\d\.\d{1,3}\.\d|\+\d", re.A)
"""What a phone, card, national id or address cannot do without: most texts end here."""
KEY = re.compile(
    r"(?<![A-Za-z0-9_-])(?:sk-[A-Za-z0-9_-]{20,}|(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,}"
    r"|glpat-[\w-]{20,}|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[\w-]{35}|hf_[A-Za-z0-9]{30,}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})|-----BEGIN (?:[A-Z]{2,10} ){0,3}PRIVATE KEY(?: BLOCK)?-----",
    re.A,
)


def pii(text: str) -> str | None:
    """Personal data or a secret: e-mail, phone, payment card, national id, public IPv4 address, key or token.

    Reserved examples (example.com, 555-01xx, private networks) and digits inside sums are no one's data.
    """
    if "@" in text and any(_real_email(match) for match in EMAIL.finditer(text)):
        return "pii:email"
    if any(_real_key(match.group()) for match in KEY.finditer(text)):
        return "pii:key"
    if not DIGITS.search(text):
        return None
    if any(not FICTIONAL_PHONE.search(match.group()) for match in PHONE.finditer(text)):
        return "pii:phone"
    if "+" in text and any(_real_phone_abroad(match, text) for match in PHONE_ABROAD.finditer(text)):
        return "pii:phone"
    if any(_real_card(match.group()) for match in CARD.finditer(text)):
        return "pii:card"
    if any(match.group() not in PLACEHOLDER_ID for match in NATIONAL_ID.finditer(text)):
        return "pii:national-id"
    if any(_real_address(match, text) for match in IPV4.finditer(text)):
        return "pii:ipv4"
    return None


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
