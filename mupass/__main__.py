"""``python -m mupass``."""

import sys

from mupass._cli import main

if __name__ == "__main__":
    sys.exit(main())
