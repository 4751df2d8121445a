"""Measure what `largebatch data verify` costs a core: scripts/verify_speed.py ROOT [REPEATS]

ROOT has train/ with one folder of images a class. Two sides read and hash each training image in turn: verify as it is,
and whole images decoded by Pillow, which is what verify did before it reported the warnings of libjpeg. Seconds are the
processor's.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

from largebatch.bench.compare import Side, take_turns
from largebatch.data.check import _verify
from largebatch.data.decode import decode
from largebatch.data.folders import Survey, class_folders


def main(root: Path, repeats: int) -> None:
    split = class_folders(root / "train", Survey(tolerant=False))

    def now() -> None:
        for row in range(len(split)):
            finding = _verify(split, row)
            assert finding.corrupt is finding.suspect is None, split.where(row)

    def before() -> None:
        for row in range(len(split)):
            data = split.read(row)
            hashlib.blake2b(data, digest_size=16).digest()
            decode(data)

    sides = {"verify": Side(now, len(split)), "pillow": Side(before, len(split))}
    timings = take_turns(sides, repeats, "verifying", clock=time.process_time)
    facts = {
        "images": len(split),
        "repeats": repeats,
        "milliseconds": {name: 1000 / timings.speed(name) for name in sides},
        "seconds_verify_to_pillow": vars(timings.cost("verify", "pillow")),
    }
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not all(map(str.isdecimal, sys.argv[2:])):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 3)
