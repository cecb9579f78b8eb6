"""``python -m vlearn``: see `vlearn.report_page.command_line`."""

import sys

from vlearn.report_page.command_line import main

if __name__ == "__main__":
    sys.exit(main())
