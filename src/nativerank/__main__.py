"""`python -m nativerank` is the command line, so that torchrun can start it."""

from nativerank.cli.main import console

if __name__ == "__main__":
    console()
