"""What a pattern cannot say: check digits, valid lengths, real addresses.

Each check takes the text a pattern found and gives how many of its characters are the find; 0 for none.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping

__all__ = ["CHECKS", "IBAN_LENGTHS"]

Check = Callable[[str], int]

_DOUBLED = bytes.maketrans(b"0123456789", bytes([0, 2, 4, 6, 8, 1, 3, 5, 7, 9]))
_PLAIN = bytes.maketrans(b"0123456789", bytes(range(10)))

_LENGTHS = (
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 "
    "ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 "
    "LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 "
    "QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30"
)
IBAN_LENGTHS: Mapping[str, int] = {entry[:2]: int(entry[2:]) for entry in _LENGTHS.split()}
"""Length of an IBAN by country, without spaces (SWIFT's IBAN registry)."""


def _card(text: str) -> int:
    """Luhn's check (ISO/IEC 7812-1)."""
    digits = text.encode().translate(None, b" .-")[::-1]
    total = sum(digits[::2].translate(_PLAIN)) + sum(digits[1::2].translate(_DOUBLED))
    return len(text) if total % 10 == 0 and len(digits) <= 19 and len(set(digits)) > 1 else 0


def _address(text: str) -> int:
    """A version 4 address is fully told by its pattern; one of version 6 is parsed, and has a digit (``ab::be:ad``)."""
    if ":" not in text:
        return len(text)
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return 0
    return len(text) if any(c.isdigit() for c in text) else 0


def _iban(text: str) -> int:
    """The country's length, and ISO 13616's check: moved and spelled in digits, it leaves 1 when divided by 97."""
    left = IBAN_LENGTHS.get(text[:2].upper(), 0)
    if not left:
        return 0
    end = 0
    while left and end < len(text):
        left -= text[end] != " "
        end += 1
    if left or text[end : end + 1].isalnum():
        return 0
    plain = text[:end].replace(" ", "")
    return end if int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1 else 0


def _phone(text: str) -> int:
    """A telephone number has 6 to 15 digits (ITU-T E.164); one with a country code or a trunk 0 has at least 8."""
    digits = sum(c.isdigit() for c in text)
    least = 8 if text[0] == "+" or text.lstrip("(").startswith("0") else 6
    return len(text) if least <= digits <= 15 else 0


def _key(text: str) -> int:
    """A key is random, so it has a digit; ``sk-learn-contrib-something`` is none."""
    return len(text) if not text.startswith("sk-") or any(c.isdigit() for c in text) else 0


CHECKS: Mapping[str, Check] = {
    "credit_card": _card,
    "ip_address": _address,
    "iban": _iban,
    "phone": _phone,
    "api_key": _key,
}
"""The checks, by type."""
