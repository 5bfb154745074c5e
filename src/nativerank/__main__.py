"""`python -m nativerank` is the command line, so that torchrun can start it."""

import sys

from nativerank.cli.main import main

sys.exit(main())
