# SPDX-License-Identifier: Apache-2.0
"""Options that hold several values in one text: ``1,10``, ``64M,2G``, ``4:2``. Each raises ValueError in words."""

from __future__ import annotations


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str, option: str) -> list[int]:
    found = words(text)
    if not found or not all(word.isdigit() and int(word) > 0 for word in found):
        raise ValueError(f"{option} {text!r}: expected whole numbers above 0 with commas between them, such as 1,10")
    return [int(word) for word in found]


def sizes(text: str) -> list[int]:
    """``64M,2G`` in bytes, decimal units."""
    units = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    found = []
    for word in words(text):
        digits, unit = word[:-1], units.get(word[-1:].upper())
        if unit is None or not digits.isdigit() or int(digits) < 1:
            raise ValueError(f"--sizes {word!r}: expected a number and K, M, G or T, such as 64M or 2G")
        found.append(int(digits) * unit)
    if not found:
        raise ValueError("--sizes: none given, such as 64M,2G")
    return found


def ranks(reshard: str) -> tuple[int, int]:
    saved, _, ranks = reshard.partition(":")
    if not all(word.isascii() and word.isdigit() and 0 < int(word) <= 64 for word in (saved, ranks)):
        raise ValueError(f"--reshard {reshard!r}: expected two numbers of ranks from 1 to 64, such as 4:2")
    return int(saved), int(ranks)
