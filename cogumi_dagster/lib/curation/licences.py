"""Licences that forbid training a model to give away: declared by a source, or noticed in a text."""

import re
from collections.abc import Collection

MARKERS = {
    name: re.compile(pattern, re.I)
    for name, pattern in {
        "agpl-header": r"under the terms of the GNU Affero General Public|SPDX-License-Identifier:\s*AGPL",
        "gpl-header": r"under the terms of the GNU (?:Lesser )?General Public|SPDX-License-Identifier:\s*L?GPL",
        "non-commercial": r"SPDX-License-Identifier:\s*CC-BY-NC"
        r"|licensed under (?:a |the )?(?:Creative Commons|CC)[- ](?:Attribution|BY)[- ]NonCommercial",
        "all-rights-reserved": r"(?:copyright|\(c\)|©)[^\n]{0,80}all rights reserved",
        "confidential": r"proprietary and confidential|unauthori[sz]ed copying of this file",
    }.items()
}
"""Notices that travel with copied text. The mere name of a licence is a subject to write about."""
HINTS = ("general public", "spdx-license", "noncommercial", "rights reserved", "and confidential", "copying of this")
"""Each marker holds one of them; most texts hold none."""
PERMISSIVE = re.compile(
    r"redistribution and use in source and binary forms|apache license|permission is hereby granted", re.I
)
"""BSD's own header says "all rights reserved" too."""
DECLARED = re.compile(r"\b(?:(A?GPL)|CC[ -]BY(?:-SA)?-(N[CD])|(proprietary))", re.I)


def declared(licence: object) -> str | None:
    """What a declared licence forbids ("nc", "nd", "gpl", "agpl", "proprietary"), or None."""
    match = DECLARED.search(licence) if isinstance(licence, str) else None
    return next(filter(None, match.groups())).lower() if match else None


def licence(stated: object, text: str, allowed: Collection[str] = ()) -> str | None:
    """A licence declared by the source, unless ``allowed`` names it, or a notice in the text."""
    if (kind := declared(stated)) and stated not in allowed:
        return f"licence:declared-{kind}"
    low = text.lower()
    if not any(hint in low for hint in HINTS):
        return None
    for name, pattern in MARKERS.items():
        if pattern.search(text) and not (name == "all-rights-reserved" and PERMISSIVE.search(text)):
            return f"licence:{name}"
    return None
