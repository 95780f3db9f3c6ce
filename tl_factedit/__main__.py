"""``python -m tl_factedit``: the command line, where the script ``tl-factedit`` isn't on the path."""

import sys

from tl_factedit.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
