"""Runs that the tests of the report look at."""

import pytest
from written_runs import full_rows, write_run


@pytest.fixture(scope="session")
def full_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "full", full_rows())
