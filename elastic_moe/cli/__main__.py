"""`python -m elastic_moe.cli`, for an install whose scripts are not on the path."""

import sys

from elastic_moe.cli import main

sys.exit(main())
