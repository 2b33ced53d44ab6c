"""The versions that this package is tested with: `scripts/test_compat.sh` tests, docs/compatibility.md shows them."""

from importlib.metadata import PackageNotFoundError, version

VERL = ("0.9.1", "0.9.0", "0.8.0", "0.7.1")
WITH_PLUGINS = "0.9.0"  # the first verl that loads entry points; before it, VERL_USE_EXTERNAL_MODULES
OLDEST = "0.7.0"

# What the test suite runs on. None: the suite needs none; a GPU job brings its own.
PACKAGES = {"torch": "2.13.0", "verl": "0.9.1", "ray": "2.60.0", "transformers": "5.10.4", "vllm": None}


def installed(package: str) -> str | None:
    """The installed version, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def untested() -> str | None:
    """One line where the installed verl is not among the tested versions, else None."""
    found = installed("verl")
    if found is None or found in VERL:
        return None
    return f"verl-krpo is not tested with verl {found} (tested: {', '.join(VERL)}): run `verl-krpo doctor`"
