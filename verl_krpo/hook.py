"""The one mechanism by which a function of others is replaced by one of ours that calls it.

A room that changes others' code at run time lists its hooks (plugin/hooks.py, backends/hooks.py). Each takes hold when
its module is imported, so that importing verl costs next to nothing more.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from types import ModuleType
from typing import Any

import wrapt

MARK = "__verl_krpo__"


@dataclass(frozen=True)
class Hook:
    """`module`.`name`(*args) becomes `around`(original, *args) once `module` is imported.

    why: what would be missing without it. until: from when on it can go. needed: a verl without such a function is an
    error, as nothing else would notice. cpu: only with VERL_PLATFORM=cpu.
    """

    module: str
    name: str
    around: Callable
    why: str
    until: str
    needed: bool = True
    cpu: bool = False

    def install(self) -> None:
        """Take hold when the module is imported, or now if it is."""
        wrapt.register_post_import_hook(self.attach, self.module)

    def attach(self, module: ModuleType) -> None:
        """Replace the function in the module, once. RuntimeError where a needed one is not there."""
        try:
            *path, name = self.name.split(".")
            owner = attrgetter(".".join(path))(module) if path else module
            wrap(owner, name, self.around)
        except AttributeError as error:
            if self.needed:
                raise RuntimeError(
                    f"there is no {self.module}.{self.name}, which verl-krpo needs ({self.why}): use a verl that it is "
                    "tested with (verl-krpo doctor names them), a newer verl-krpo, or uninstall it"
                ) from error

    def state(self) -> str:
        """In this process: `in force`, `waiting` for its module, or `missing`."""
        if self.module not in sys.modules:
            return "waiting"
        try:
            return "in force" if marked(attrgetter(self.name)(sys.modules[self.module])) else "missing"
        except AttributeError:
            return "missing"


def wrap(owner: Any, name: str, around: Callable) -> None:
    """Make owner.name(*args) call around(original, *args), once.

    Our own mark tells whether it is done. functools.wraps copies it: with a decorator of somebody else's over ours the
    function is still marked, and one below ours has no mark, so neither switches ours off nor doubles it.
    """
    original = getattr(owner, name)
    if marked(original):
        return

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        return around(original, *args, **kwargs)

    setattr(wrapped, MARK, True)
    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(wrapped) if static else wrapped)


def marked(function: Any) -> bool:
    """Whether a function is, or decorates, one that `wrap` made."""
    return hasattr(function, MARK)
