"""`python -m autolora_hf` is `autolora`."""

import sys

from .cli import main


sys.exit(main())
