"""``python -m cloudinary_analyze``: the command line."""

import sys

from cloudinary_analyze.cli import main

if __name__ == "__main__":
    sys.exit(main())
