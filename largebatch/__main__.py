"""``python -m largebatch``, and what torchrun starts: ``torchrun … -m largebatch train …``."""

from largebatch.cli.main import main

if __name__ == "__main__":
    main()
