"""python -m foretell: the same as the command foretell."""

import sys

from foretell.cli import main

if __name__ == "__main__":
    sys.exit(main())
