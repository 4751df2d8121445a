"""Damage of the kinds that copies have: cut short, closed with an end marker, zeroed, bytes changed at random."""

import random

END = b"\xff\xd9"
MARKERS = (0x00, 0x01, 0xC0, 0xC4, 0xD0, 0xD3, 0xD7, 0xD8, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, 0xE0, 0xE2, 0xF3, 0xFE, 0xFF)


def scan_of(data: bytes) -> int:
    """Return where the entropy-coded bytes of a baseline JPEG begin."""
    at = data.index(b"\xff\xda")
    return at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def closed(data: bytes, chance: random.Random) -> bytes:
    """Cut the file anywhere in its scan, and close it with an end marker."""
    return data[: chance.randrange(scan_of(data), len(data) - 2)] + END


def zeroed(data: bytes, chance: random.Random, count: int) -> bytes:
    """Put zeros where bytes of the scan were."""
    first = scan_of(data)
    count = min(count, (len(data) - 2 - first) // 2)
    at = chance.randrange(first, len(data) - 2 - count)
    return data[:at] + bytes(count) + data[at + count :]


def changed(data: bytes, chance: random.Random, first: int, last: int) -> bytes:
    """Change up to five bytes between two places."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 5)):
        found[chance.randrange(first, last)] = chance.randrange(256)
    return bytes(found)


def marked(data: bytes, chance: random.Random) -> bytes:
    """Put a marker into the scan."""
    at = chance.randrange(scan_of(data), len(data) - 2)
    return data[:at] + bytes([0xFF, chance.choice(MARKERS)]) + data[at + 2 :]


def steepened(data: bytes, chance: random.Random) -> bytes:
    """Make the steps of a quantization table as large as they can be."""
    at = data.index(b"\xff\xdb") + 5
    return data[:at] + bytes(chance.choice((255, chance.randrange(256))) for _ in range(64)) + data[at + 64 :]


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Damage a baseline JPEG in one of these ways, or in two."""
    first = scan_of(data)
    ways = (
        lambda data: closed(data, chance),
        lambda data: zeroed(data, chance, chance.choice((1, 16, 512, 4096))),
        lambda data: changed(data, chance, 0, first),
        lambda data: changed(data, chance, first, len(data)),
        lambda data: marked(data, chance),
        lambda data: steepened(data, chance),
    )
    found = chance.choice(ways)(data)
    try:
        return chance.choice(ways)(found) if chance.random() < 0.3 else found
    except ValueError:  # the first damage left no scan
        return found
