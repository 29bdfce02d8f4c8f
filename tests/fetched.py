"""Helper: tests that need what a network brings."""

import os
from typing import NoReturn

import pytest


def without(error: Exception) -> NoReturn:
    """Skips the tests that miss it; fails them in CI, where a skip would pass for a success.

    JAXREPRO_OFFLINE=1 says that CI has no network.
    """
    if os.environ.get("CI") and os.environ.get("JAXREPRO_OFFLINE") != "1":
        pytest.fail(f"{error} (JAXREPRO_OFFLINE=1 skips this)")
    pytest.skip(str(error))
