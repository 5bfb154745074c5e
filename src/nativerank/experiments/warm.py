"""A process that has imported what a run needs, and forks one run after the other: seconds of imports are paid once.

    python -m nativerank.experiments.warm      reads {"argv", "folder", "out", "err"} a line on standard input,
                                               writes {"pid"} when a run begins and {"code"} when it has ended

Every run is a fork of a process that has computed nothing (no thread pool, no CUDA), so runs know nothing of each other
and end with the bits of a fresh process. A run works in `folder` and writes to the files `out` and `err`. Linux only:
forking is not safe with the system libraries of macOS, and Windows lacks it.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

AVAILABLE = sys.platform == "linux"
COMMAND_LINE = "nativerank.cli.main"
# What `nativerank train` imports by itself, and the architecture that presets have.
NEEDED = (COMMAND_LINE, "nativerank.cli.train", "nativerank.train.loop", "transformers.models.llama.modeling_llama")


class Gone(Exception):
    """The warm process has died; the run that was asked for may not have begun."""


class Warm:
    """The other end of a warm process.

    Args:
        environment: of its runs. What libraries read when they are imported, such as OMP_NUM_THREADS, holds for all.
    """

    def __init__(self, environment: Mapping[str, str]):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,  # what libraries say when they are imported; a run has its own
            text=True,
            env=dict(environment),
            process_group=0,  # Ctrl-C is the grid's to pass on, as a second signal would end a run without saving
        )

    def run(self, argv: list[str], began: Callable[[int], None]) -> tuple[int, str, str]:
        """Exit code (-signal of a killed run), stdout and stderr of `nativerank ARGV`.

        Args:
            began: told the run's process number.

        Raises:
            Gone: the warm process died.
        """
        with tempfile.TemporaryDirectory(prefix="nativerank-") as folder:
            files = {name: Path(folder) / name for name in ("out", "err")}
            began(self._ask(argv, files)["pid"])
            code = self._answer()["code"]
            out, err = (file.read_text(encoding="utf-8", errors="replace") for file in files.values())
        return code, out, err

    def _ask(self, argv: list[str], files: Mapping[str, Path]) -> dict[str, Any]:
        assert self.process.stdin
        request = {"argv": argv, "folder": os.getcwd(), **{name: str(file) for name, file in files.items()}}
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise Gone from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise Gone
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """Lets the process end, once its run has."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.close()
        except OSError:
            pass  # what was written last had nobody to read it
        self.process.wait()
        self.process.stdout.close()


def serve() -> None:
    """Runs what is asked for, until nobody asks any more."""
    for name in NEEDED:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            become(request)
        tell({"pid": pid})
        _, status = os.waitpid(pid, 0)
        tell({"code": os.waitstatus_to_exitcode(status)})


def tell(answer: dict[str, Any]) -> None:
    """A line to whoever asked."""
    print(json.dumps(answer), flush=True)


def become(request: dict[str, Any]) -> None:
    """Makes this process the run, and does not return."""
    for number, file in enumerate((os.devnull, request["out"], request["err"])):
        flags = os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY
        opened = os.open(file, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(request["folder"])
    sys.argv = ["nativerank", *request["argv"]]
    importlib.import_module(COMMAND_LINE).console()


if __name__ == "__main__":
    serve()
