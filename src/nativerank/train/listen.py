"""Who hears of a run while it goes on."""

from typing import Any, Protocol


class Listener(Protocol):
    """Who shows the run to a person; warnings alone if `quiet`."""

    quiet: bool

    def begin(self, facts: dict[str, Any]) -> None: ...

    def row(self, row: dict[str, Any]) -> None: ...

    def warn(self, message: str) -> None: ...


class Silence:
    """Listens for the processes that have no person in front of them."""

    quiet = True

    def begin(self, facts: dict[str, Any]) -> None: ...

    def row(self, row: dict[str, Any]) -> None: ...

    def warn(self, message: str) -> None: ...
