import pytest
from reference import krpo


@pytest.fixture(scope="session")
def oracle():
    return krpo
