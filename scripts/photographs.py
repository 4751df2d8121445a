"""Write the JPEGs that `largebatch bench` reads where no files are given: scripts/photographs.py DIRECTORY COUNT."""

import sys
from pathlib import Path

from largebatch.bench.loader import write_photographs

if __name__ == "__main__":
    if len(sys.argv) != 3 or not sys.argv[2].isdecimal():
        sys.exit(__doc__)
    write_photographs(Path(sys.argv[1]), int(sys.argv[2]))
