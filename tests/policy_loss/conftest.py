import pytest
from reference import kpo


@pytest.fixture(scope="session")
def kpo_reference():
    return kpo
