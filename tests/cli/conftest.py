"""A terminal."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from types import SimpleNamespace

import pytest

STYLES = re.compile(rb"\x1b\[[\d;]*m")
CONTROLS = re.compile(rb"\x1b\[[\d;?]*[A-Za-z]")


@pytest.fixture
def terminal():
    """terminal(*words, columns=80, until=None, **environment): `nativerank ...` in a process of its own on a terminal.

    Has code, out (what the terminal got, as bytes) and text (the same without control codes). `until`: bytes that are
    waited for and answered by Ctrl-C.
    """

    def go(*words, columns=80, until=None, seconds=60, **environment):
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        clean = {
            name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")
        }
        child = subprocess.Popen(
            [sys.executable, "-m", "nativerank", *map(str, words)],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env=clean | {"TERM": "xterm-256color"} | environment,
        )  # fmt: skip
        os.close(slave)
        got = bytearray()

        def read():
            while True:
                try:
                    data = os.read(master, 65536)
                except OSError:  # the other end is closed
                    return
                if not data:
                    return
                got.extend(data)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            deadline = time.monotonic() + seconds
            while until is not None and until not in got and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            if until is not None and child.poll() is None:
                os.killpg(child.pid, signal.SIGINT)
            code = child.wait(timeout=seconds)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
            reader.join()
            os.close(master)
        return SimpleNamespace(code=code, out=bytes(got), text=CONTROLS.sub(b"", got).decode().replace("\r\n", "\n"))

    return go
