"""What surrounds the tests (`surroundings.py`), in the processes that run them: torch takes seconds to import, and the
process that only hands the tests out needs none of it."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is imported."""
    hands_out = config.getoption("numprocesses") and not hasattr(config, "workerinput")
    if not hands_out:
        config.pluginmanager.import_plugin("surroundings")
