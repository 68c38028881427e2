"""Codes are those of the standard, and names find them however they are spelt."""

from __future__ import annotations

import pytest

from medmom.data.snomed import (
    ABNORMAL,
    MODIFIERS,
    PRIVATE_SCHEME,
    STRUCTURE,
    SUBSTANCE,
    TISSUE,
    Code,
    Property,
    coded,
    dicom_text,
)
from medmom.data.snomed_names import FINDINGS, PAIRED, PARTED, RIBS, SINGLE, SUBSTANCES, TISSUES, VERTEBRAE

SIDED = (
    *("kidney", "adrenal_gland", "subclavian_artery", "common_carotid_artery", "brachiocephalic_vein", "iliac_artery"),
    *("iliac_vena", "humerus", "scapula", "clavicula", "femur", "hip", "gluteus_maximus", "gluteus_medius"),
    *("gluteus_minimus", "autochthon", "iliopsoas", "kidney_cyst", "lung_upper_lobe", "lung_lower_lobe"),
)
TOTAL = (
    *("spleen", "gallbladder", "liver", "stomach", "pancreas", "lung_middle_lobe_right", "esophagus", "trachea"),
    *("thyroid_gland", "small_bowel", "duodenum", "colon", "urinary_bladder", "prostate", "sacrum", "heart", "aorta"),
    *("pulmonary_vein", "brachiocephalic_trunk", "atrial_appendage_left", "superior_vena_cava", "inferior_vena_cava"),
    *("portal_vein_and_splenic_vein", "spinal_cord", "brain", "skull", "sternum", "costal_cartilages", "vertebrae_S1"),
    *(f"vertebrae_{region}{k}" for region, n in (("C", 7), ("T", 12), ("L", 5)) for k in range(1, n + 1)),
    *(f"{name}_{side}" for name in SIDED for side in ("left", "right")),
    *(f"rib_{side}_{k}" for side in ("left", "right") for k in range(1, 13)),
)
"""The classes of TotalSegmentator's task ``total``."""

DECATHLON = (
    *("edema", "non-enhancing tumor", "enhancing tumour", "left atrium", "liver", "cancer", "PZ", "TZ"),
    *("hippocampus anterior", "hippocampus posterior", "lung tumour", "pancreas", "Vessel", "Tumour", "spleen"),
    *("colon cancer primaries", "hepatic vessels", "liver tumor", "pancreas tumour", "prostate peripheral zone"),
)

# SNOMED CT knows them; the part of it that comes with pydicom does not.
BEYOND = {
    *("74281007", "110765007", "65985001", "244849004", "68455001"),
    *("181674001", "78333006", "75297007", *(value for value, _ in RIBS)),
}

PLAIN = {
    **{name: Code(value, "SCT", meaning) for rows in (SINGLE, PAIRED) for name, (value, meaning) in rows.items()},
    **{name: Code(value, "SCT", meaning) for rows in (TISSUES, SUBSTANCES) for name, (value, meaning) in rows.items()},
    **{f"rib {number}": Code(value, "SCT", meaning) for number, (value, meaning) in enumerate(RIBS, 1)},
    **{
        f"{letter}{number} vertebra": Code(value, "SCT", f"{letter}{number} vertebra")
        for letter, values in VERTEBRAE.items()
        for number, value in enumerate(values, 1)
    },
    **{name: Code(*code) for name, code in FINDINGS.items()},
    **{f"modifier {name}": code for name, code in MODIFIERS.items()},
    **{code.meaning: code for code in (TISSUE, STRUCTURE, ABNORMAL, SUBSTANCE)},
}

# Verhoeff's check digit, which ends every identifier of SNOMED CT: multiplication in the dihedral group of order 10.
TURNS = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)


def has_valid_check_digit(value: str) -> bool:
    def times(a: int, b: int) -> int:
        if a < 5:
            return (a + b) % 5 + (0 if b < 5 else 5)
        return (a - b) % 5 + (5 if b < 5 else 0)

    result = 0
    for place, digit in enumerate(reversed(value)):
        number = int(digit)
        for _ in range(place % 8):
            number = TURNS[number]
        result = times(result, number)
    return result == 0


@pytest.mark.parametrize("name", PLAIN)
def test_code_and_meaning_are_those_of_the_standard(name: str) -> None:
    concepts = pytest.importorskip("pydicom.sr._concepts_dict").concepts
    code = PLAIN[name]
    meanings = {
        text for rows in concepts[code.scheme].values() for value, (text, _) in rows.items() if value == code[0]
    }
    assert (not meanings) == (code.value in BEYOND)
    assert not meanings or code.meaning in meanings


@pytest.mark.parametrize("value", sorted({code.value for code in PLAIN.values() if code.scheme == "SCT"}))
def test_identifiers_end_in_their_check_digit(value: str) -> None:
    assert has_valid_check_digit(value)


def test_a_wrong_digit_would_be_found() -> None:
    assert not has_valid_check_digit("10200005")
    assert not has_valid_check_digit("12000004")


@pytest.mark.parametrize("name", [*TOTAL, *DECATHLON])
def test_classes_of_known_models_have_a_code(name: str) -> None:
    found = coded(name)
    assert found.type.scheme != PRIVATE_SCHEME
    assert len(found.type.value) <= 16


def test_classes_of_one_model_keep_apart() -> None:
    assert len(TOTAL) == 117
    assert len({coded(name) for name in TOTAL}) == len(TOTAL)


@pytest.mark.parametrize(
    "names",
    [
        ("kidney_left", "Left Kidney", "left-kidney", "KIDNEY LEFT", "leftKidney", "left renal"),
        ("oesophagus", "Esophagus", "esophagus"),
        ("liver tumour", "liver_tumor", "Tumour of the liver", "hepatic tumor", "LiverTumour"),
        ("vertebrae_T12", "T12 vertebra", "vertebra t12"),
        ("rib_left_7", "left rib 7"),
        ("heart_atrium_left", "left atrium", "Left_Atrium", "left atrium of the heart"),
        ("hippocampus anterior", "anterior hippocampus"),
        ("gallbladder", "gall bladder", "Gallbladder"),
        ("clavicula_right", "right clavicle"),
        ("inferior_vena_cava", "postcava"),
        ("brain edema", "oedema of brain"),
        ("grey matter", "gray_matter"),
        ("non-enhancing tumor", "nonenhancing tumour"),
    ],
)
def test_spelling_does_not_matter(names: tuple[str, ...]) -> None:
    assert len({coded(name) for name in names}) == 1
    assert coded(names[0]).type.scheme != PRIVATE_SCHEME


def test_side_is_a_modifier_or_in_the_code() -> None:
    assert coded("kidney_left").modifiers == (MODIFIERS["left"],)
    assert coded("kidney").modifiers == ()
    assert coded("right ventricle").type == Code("53085002", "SCT", "Right ventricle")
    assert coded("right ventricle").modifiers == ()
    assert coded("left posterior hippocampus").modifiers == (MODIFIERS["left"], MODIFIERS["posterior"])


def test_finding_has_the_structure_as_its_region() -> None:
    cyst = coded("kidney_cyst_right")
    assert cyst == Property(ABNORMAL, Code("367643001", "SCT", "Cyst"), (), cyst.region, (MODIFIERS["right"],))
    assert cyst.region == Code("64033007", "SCT", "Kidney")
    assert coded("tumour").region is None
    assert coded("hepatic vessels").region == Code("10200004", "SCT", "Liver")


def test_categories_are_told_apart() -> None:
    wanted = {"liver": STRUCTURE, "fat": TISSUE, "cerebrospinal fluid": SUBSTANCE, "lung nodule": ABNORMAL}
    assert {name: coded(name).category for name in wanted} == wanted


@pytest.mark.parametrize(
    "name",
    [
        *(
            "left_liver",
            "left right kidney",
            "liver kidney",
            "prostate/uterus",
            "tumor core",
            "Anterior",
            "L9 vertebra",
        ),
        *("rib_left_13", "lung middle lobe left", "class 7", "", "  ", "...", "肝臓", "upper lobe"),
    ],
)
def test_what_is_not_known_is_not_guessed(name: str) -> None:
    found = coded(name)
    assert (found.category, found.type.scheme) == (TISSUE, PRIVATE_SCHEME)
    assert found.type.meaning == dicom_text(name)
    assert (found.modifiers, found.region) == ((), None)


def test_own_codes_are_stable_short_and_differ() -> None:
    codes = [coded(name).type.value for name in ("thing a", "thing b", "thing a")]
    assert codes[0] == codes[2] != codes[1]
    assert {len(code) for code in codes} == {16}


def test_tables_hold_no_name_twice() -> None:
    tables = (SINGLE, PAIRED, PARTED, TISSUES, SUBSTANCES, FINDINGS)
    names = [name for table in tables for name in table]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("a\\b", "a/b"), ("a\n\tb", "a b"), ("", "unnamed"), ("\x00", "unnamed"), ("x" * 70, "x" * 63), (" a ", "a")],
)
def test_texts_fit_an_element(text: str, wanted: str) -> None:
    assert dicom_text(text) == wanted
