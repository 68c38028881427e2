"""Codes of SNOMED CT for the names that classes of CT and MR models have."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import NamedTuple

from medmom.data.snomed_names import FINDINGS, PAIRED, PARTED, RIBS, SINGLE, SPELLINGS, SUBSTANCES, TISSUES, VERTEBRAE


class Code(NamedTuple):
    """A coded concept as DICOM writes it.

    Attributes:
        value: Code value, at most 16 characters.
        scheme: Designator of the coding scheme: ``SCT`` for SNOMED CT, ``NCIt`` for the NCI thesaurus, ``99MEDMOM``
            for names that neither is known to hold.
        meaning: In words, at most 64 characters.
    """

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True)
class Property:
    """What a class of a label map is, in codes.

    Attributes:
        category: Of DICOM's context group 7150: anatomical structure, tissue, abnormal structure or body substance.
        type: The structure or finding itself.
        modifiers: Side or part of the structure; empty where the type says it, or there is none.
        region: Where a finding lies; None where the name does not say it.
        region_modifiers: Side of the region.
    """

    category: Code
    type: Code
    modifiers: tuple[Code, ...] = ()
    region: Code | None = None
    region_modifiers: tuple[Code, ...] = ()


PRIVATE_SCHEME = "99MEDMOM"

TISSUE = Code("85756007", "SCT", "Tissue")
STRUCTURE = Code("91723000", "SCT", "Anatomical Structure")
ABNORMAL = Code("49755003", "SCT", "Morphologically Abnormal Structure")
SUBSTANCE = Code("91720002", "SCT", "Body Substance")

MODIFIERS = {
    "left": Code("7771000", "SCT", "Left"),
    "right": Code("24028007", "SCT", "Right"),
    "anterior": Code("255549009", "SCT", "Anterior"),
    "posterior": Code("255551008", "SCT", "Posterior"),
}
SIDES = frozenset({"left", "right"})

SILENT = frozenset({"of", "the", "and"})


def coded(name: str) -> Property:
    """Says in codes what a class is.

    Case, order of the words, underscores and British or American spelling do not matter: ``kidney_left``,
    ``Left Kidney`` and ``left-kidney`` are one. The side of what comes in pairs is a modifier, unless the code itself
    says it (left atrium). A finding in a structure (``liver tumour``) has the structure as its region.

    Args:
        name: Of a class.

    Returns:
        Codes of SNOMED CT, of the NCI thesaurus for what enhances in a tumour. A name that is not known in full is
        not guessed at: it is a tissue with a code of the private scheme ``99MEDMOM``, made from the name, that means
        the name itself.

    Source:
        DICOM PS3.16, context groups 7150 (categories), 7151 (types) and 244 (sides), and SNOMED CT, for what those
        do not hold: single ribs, the first sacral vertebra, zones of the prostate, myocardium, muscles of hip and
        back, portal and splenic vein as one.
    """
    words = _words(name)
    return _anatomy(words) or _finding(words) or Property(TISSUE, _private(name))


def dicom_text(name: str) -> str:
    """Makes a text fit a DICOM element of 64 characters: no backslash or control character, and never empty."""
    text = "".join(mark if mark.isprintable() else " " for mark in name.replace("\\", "/"))
    # Readers count the space that pads an odd number of bytes.
    return " ".join(text.split())[:63].strip() or "unnamed"


def _words(name: str) -> frozenset[str]:
    parts = re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    return frozenset(" ".join(SPELLINGS.get(part, part) for part in parts).split()) - SILENT


def _anatomy(words: frozenset[str]) -> Property | None:
    """Looks a structure up by its words; a side only where there are two of it."""
    if words in _STRUCTURES:
        return _STRUCTURES[words]
    side = words & SIDES
    if len(side) != 1 or words - side not in _PAIRED:
        return None
    known = _STRUCTURES[words - side]
    return Property(known.category, known.type, (MODIFIERS[min(side)], *known.modifiers))


def _finding(words: frozenset[str]) -> Property | None:
    """Takes the words of a finding out, the longest first; what is left has to be a structure, or nothing."""
    for key in sorted(_FINDINGS, key=len, reverse=True):
        if not key <= words:
            continue
        if key == words:
            return Property(ABNORMAL, _FINDINGS[key])
        place = _anatomy(words - key)
        return place and Property(ABNORMAL, _FINDINGS[key], (), place.type, place.modifiers)
    return None


def _private(name: str) -> Code:
    return Code(hashlib.sha256(name.encode()).hexdigest()[:16].upper(), PRIVATE_SCHEME, dicom_text(name))


def _table() -> tuple[dict[frozenset[str], Property], frozenset[frozenset[str]]]:
    """Gives all structures by their words, and which of them come in pairs."""
    paired = dict(PAIRED)
    paired |= {f"rib {number}": rib for number, rib in enumerate(RIBS, 1)}
    single = dict(SINGLE)
    for letter, values in VERTEBRAE.items():
        for number, value in enumerate(values, 1):
            place = f"{letter}{number}"
            single[f"vertebra {place}"] = (value, f"{place} vertebra")
    groups = ((STRUCTURE, single | paired), (TISSUE, TISSUES), (SUBSTANCE, SUBSTANCES))
    table = {
        _words(name): Property(category, Code(value, "SCT", meaning))
        for category, rows in groups
        for name, (value, meaning) in rows.items()
    }
    vessel, liver, hippocampus = (table[frozenset({word})].type for word in ("vessel", "liver", "hippocampus"))
    table[_words("hepatic vessels")] = Property(STRUCTURE, vessel, (), liver)
    for name, part in PARTED.items():
        table[_words(name)] = Property(STRUCTURE, hippocampus, (MODIFIERS[part],))
    return table, frozenset(_words(name) for name in (*paired, *PARTED))


_STRUCTURES, _PAIRED = _table()
_FINDINGS = {_words(name): Code(*code) for name, code in FINDINGS.items()}
