"""`python -m nativerank` is the command line, so that torchrun can start it."""

import sys

from nativerank.cli.main import leave, main

if __name__ == "__main__":
    leave(main, sys.argv[1:])
