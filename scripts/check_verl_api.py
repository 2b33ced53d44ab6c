"""What verl-krpo rests on in verl - names, private attributes, parameters - checked in a verl that is never imported.

python scripts/check_verl_api.py [PATH_OR_VERSION] [--all]

PATH: a folder with the package verl in it (site-packages, a checkout). VERSION: 0.9.1, or `newest`: pip downloads the
wheel. Without either: the verl of this environment. The table names what breaks; --all lists everything. A second table
says which of our hooks each trainer of verl's reaches, and whether the trainer starts at all: a name that is there
helps nobody where no trainer calls it.

What is needed is read from our own source: imports, uses of what was imported, calls, subclasses and hooks. Only what
no source shows is listed here, in SAID, CALLS, DOORS and REGISTERED.

Exit status: 0 nothing breaks; 1 krpo or kpo breaks; 2 only an optional hook, the CPU backend or a tool does.
"""

import ast
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

OURS = Path(__file__).parents[1] / "verl_krpo"
CORE = "krpo and kpo"
ROOMS = {"plugin": CORE, "backends": "CPU backend"}  # a tool otherwise

# module, function or None for the whole module, what its source has to say, room
SAID = [
    ("verl", None, ["VERL_USE_EXTERNAL_MODULES"], CORE),
    ("verl", None, ["verl.plugins"], "loading by entry point"),
    ("verl.trainer.ppo.ray_trainer", "compute_advantage", ["token_level_rewards", "response_mask", "index"], CORE),
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._compute_advantage", [], "sessions"),
    ("verl.trainer.ppo.v1.agent_loop_tq", "AgentLoopWorkerTQ._run_prompt", ["__rollout_n__"], "allocate"),
    ("verl.protocol", "DataProto.select_idxs", [], "sessions"),
    ("verl.utils.tracking", None, ["VERL_FILE_LOGGER_PATH"], "tools"),
    ("verl.plugin.platform.platform_manager", None, ["VERL_PLATFORM"], "CPU backend"),
]
# what verl calls of ours: module, function, the name it calls, the keywords that ours takes
CALLS = [
    (
        "verl.workers.utils.losses",
        "ppo_loss",
        "policy_loss_fn",
        {"old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config", "rollout_is_weights"},
        CORE,
    ),
]
# verl's main chooses the trainer, by trainer.use_v1
MAIN = ("verl.trainer.main_ppo", "main")
# where verl takes up ours without a hook
DOORS = [("verl.trainer.ppo.core_algos", "get_adv_estimator_fn"), ("verl.trainer.ppo.core_algos", "get_policy_loss_fn")]
# classes that verl finds by a registry, where a trainer is reached that uses it
REGISTERED = {
    ("verl.trainer.ppo.v1", "get_trainer_cls"): ["PPOTrainerSync", "PPOTrainerColocateAsync", "PPOTrainerSeparateAsync"]
}


@dataclass(frozen=True)
class Found:
    """Where a name is defined. node None: outside verl, or made at run time, so that nothing more can be said."""

    module: str
    node: ast.AST | None


class Verl:
    """The source of a verl: names resolved through its own imports."""

    def __init__(self, package: Path):
        self.package = package

    def path(self, module: str) -> Path | None:
        base = self.package.joinpath(*module.split(".")[1:])
        return next((p for p in (base / "__init__.py", base.with_suffix(".py")) if p.is_file()), None)

    @cache  # noqa: B019  (one a process)
    def tree(self, module: str) -> ast.Module | None:
        path = self.path(module)
        return ast.parse(path.read_text()) if path else None

    @cache  # noqa: B019
    def find(self, module: str, name: str) -> Found | None:
        """The definition of a module's name; None where there is none."""
        tree = self.tree(module)
        if tree is None:
            return None
        stars = []
        for node in _top(tree):
            if isinstance(node, ast.ImportFrom):
                source = self.source_of(node, module)
                if source == module:  # a package that imports a module of its own: looked up below
                    continue
                for alias in node.names:
                    if alias.name == "*":
                        stars.append(source)
                    elif (alias.asname or alias.name) == name:
                        return self.find(source, alias.name) if _is_verl(source) else Found(source, None)
            elif isinstance(node, ast.Import):
                if any((alias.asname or alias.name.split(".")[0]) == name for alias in node.names):
                    return Found(module, None)
            elif name in _defined(node):
                return Found(module, node)
        for source in stars:
            if _is_verl(source) and source != module and (found := self.find(source, name)):
                return found
        if self.path(f"{module}.{name}"):
            return Found(f"{module}.{name}", self.tree(f"{module}.{name}"))
        lazy = self.find(module, "__getattr__") if name != "__getattr__" else None
        return Found(module, None) if lazy and name in ast.unparse(tree) else None

    def source_of(self, node: ast.ImportFrom, module: str) -> str:
        if not node.level:
            return node.module or ""
        path = self.path(module)
        parts = module.split(".") if path and path.name == "__init__.py" else module.split(".")[:-1]
        parts = parts[: len(parts) - node.level + 1]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def attribute(self, found: Found, name: str) -> Found | None:
        if isinstance(found.node, ast.Module):
            return self.find(found.module, name)
        if isinstance(found.node, ast.ClassDef):
            return self.member(found, name)
        return Found(found.module, None)

    def member(self, owner: Found, name: str) -> Found | None:
        """A method, field, or `self.name` of a class or its bases."""
        opaque = False
        for each in self.lineage(owner):
            if each.node is None:
                opaque = True
                continue
            for node in each.node.body:
                if name in _defined(node):
                    return Found(each.module, node)
            if any(_is_self(node, name) and isinstance(node.ctx, ast.Store) for node in ast.walk(each.node)):
                return Found(each.module, None)
        return Found(owner.module, None) if opaque else None

    def lineage(self, owner: Found) -> list[Found]:
        """The class and its bases; Found(..., None) for one from outside verl."""
        classes = [owner]
        for base in owner.node.bases:
            root = base.value if isinstance(base, ast.Subscript) else base
            name = ast.unparse(root)
            if name.split(".")[-1] in ("ABC", "object", "Generic", "Protocol", "BaseModel"):
                continue
            found = self.find(owner.module, name) if "." not in name else None
            if found and isinstance(found.node, ast.ClassDef):
                classes += self.lineage(found)
            else:
                classes.append(Found(owner.module, None))
        return classes

    def parameters(self, found: Found) -> ast.arguments | list[str] | None:
        """A function's parameters (a class's: those of __init__), a dataclass's fields, None where unknown."""
        if isinstance(found.node, ast.FunctionDef | ast.AsyncFunctionDef):
            return found.node.args
        if not isinstance(found.node, ast.ClassDef):
            return None
        init = self.member(found, "__init__")
        if init:
            return self.parameters(init)
        fields = [n for c in self.lineage(found) for n in c.node.body if isinstance(n, ast.AnnAssign)]
        return [ast.unparse(field.target) for field in fields]


@dataclass
class Need:
    """Something of verl's that we rest on, where we do, and what is wrong with it (None: nothing)."""

    what: str
    where: str
    room: str
    problem: str | None = None


def needs(verl: Verl) -> list[Need]:
    """Everything that our source and SAID and CALLS rest on."""
    found: list[Need] = []
    for path in sorted(OURS.rglob("*.py")):
        relative = path.relative_to(OURS)
        room = ROOMS.get(relative.parts[0], "tools")
        found += in_source(verl, ast.parse(path.read_text()), str(relative), room)
    found += hooks(verl)
    for module, name, words, room in SAID:
        node = Found(module, verl.tree(module))
        for part in name.split(".") if name else []:
            node = node and verl.attribute(node, part)
        what = f"{module}.{name}" if name else module
        if node is None or node.node is None:
            found.append(Need(what, "called by name", room, "is not there"))
            continue
        constants = {n.value for n in ast.walk(node.node) if isinstance(n, ast.Constant)}
        missing = [word for word in words if word not in constants]
        found.append(Need(what, "called by name", room, f"no longer names {', '.join(missing)}" if missing else None))
    for module, name, called, keywords, room in CALLS:
        function = verl.find(module, name)
        if function is None:
            found.append(Need(f"{module}.{name}", "calls ours", room, "is not there"))
            continue
        calls = [n for n in ast.walk(function.node) if isinstance(n, ast.Call) and ast.unparse(n.func) == called]
        given = {keyword.arg for call in calls for keyword in call.keywords}
        problem = f"calls {called} with {sorted(given)}" if given != keywords else None
        found.append(Need(f"{module}.{name} -> {called}", "calls ours", room, problem))
    return found


def in_source(verl: Verl, tree: ast.Module, path: str, room: str) -> list[Need]:
    """The needs of one of our files: imports, attributes and calls of what was imported, and subclasses."""
    result = []

    def need(node: ast.AST, what: str, problem: str | None) -> None:
        result.append(Need(what, f"{path}:{node.lineno}", room, problem))

    names: dict[str, Found] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _is_verl(node.module or ""):
            for alias in node.names:
                target = verl.find(node.module, alias.name)
                need(node, f"{node.module}.{alias.name}", None if target else "is not there")
                if target:
                    names[alias.asname or alias.name] = target
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("register_post_import_hook"):
            function, module = node.args
            if isinstance(module, ast.Constant) and _is_verl(module.value):
                names[_first_parameter(tree, function)] = target = Found(module.value, verl.tree(module.value))
                need(node, module.value, None if target.node else "is not there")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            there = verl.attribute(names[node.value.id], node.attr)
            need(node, f"{node.value.id}.{node.attr}", None if there else "is not there")
        elif isinstance(node, ast.Call):
            target = _target(verl, names, node.func)
            if target and (problem := misfit(verl, node, target)):
                need(node, f"{ast.unparse(node.func)}(...)", problem)
        elif isinstance(node, ast.ClassDef):
            for base in node.bases:
                parent = names.get(ast.unparse(base))
                if parent and isinstance(parent.node, ast.ClassDef):
                    for what, problem in subclass(verl, node, parent, tree):
                        need(node, what, problem)
    return result


def misfit(verl: Verl, call: ast.Call, target: Found) -> str | None:
    """Why a call of ours does not fit the parameters, None where it does or cannot be told."""
    parameters = verl.parameters(target)
    if isinstance(parameters, list):  # a dataclass's
        unknown = [k.arg for k in call.keywords if k.arg and k.arg not in parameters]
        return f"has no field {', '.join(unknown)}" if unknown else None
    if parameters is None:
        return None
    positional = [p.arg for p in parameters.posonlyargs + parameters.args]
    positional = positional[1:] if positional[:1] in (["self"], ["cls"]) else positional
    known = positional + [p.arg for p in parameters.kwonlyargs]
    unknown = [k.arg for k in call.keywords if k.arg and k.arg not in known and not parameters.kwarg]
    if unknown:
        return f"has no parameter {', '.join(unknown)}"
    if len(call.args) > len(positional) and not parameters.vararg:
        return f"takes {len(positional)} positional arguments, we give {len(call.args)}"
    if call.args and isinstance(call.args[-1], ast.Starred) or any(k.arg is None for k in call.keywords):
        return None
    required = positional[: len(positional) - len(parameters.defaults)]
    required += [p.arg for p, d in zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True) if d is None]
    given = positional[: len(call.args)] + [k.arg for k in call.keywords]
    missing = [name for name in required if name not in given]
    return f"wants {', '.join(missing)}" if missing else None


def subclass(verl: Verl, ours: ast.ClassDef, parent: Found, tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """What our class rests on in verl's: attributes it reads, methods it overrides, abstract ones it must have."""
    local = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    mixins = [local[ast.unparse(base)] for base in ours.bases if ast.unparse(base) in local]
    bodies = [ours, *mixins]
    own = {name for body in bodies for node in body.body for name in _defined(node)}
    own |= {
        n.attr for b in bodies for n in ast.walk(b) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
    }
    parent_name = f"{parent.module}.{parent.node.name}"
    reads = {n.attr for b in bodies for n in ast.walk(b) if _is_self(n) or _is_super(n)}
    for name in sorted(reads - own | {n.attr for b in bodies for n in ast.walk(b) if _is_super(n)}):
        if not name.startswith("__"):
            yield f"{parent_name}.{name}", None if verl.member(parent, name) else "is not there"
    for node in (node for body in bodies for node in body.body):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("__"):
            continue
        theirs = verl.member(parent, node.name)
        if theirs and isinstance(theirs.node, ast.FunctionDef | ast.AsyncFunctionDef):
            accepted = {p.arg for p in node.args.posonlyargs + node.args.args + node.args.kwonlyargs}
            given = theirs.node.args.args + theirs.node.args.kwonlyargs
            new = [p.arg for p in given if p.arg not in accepted]
            wanted = new and not node.args.kwarg and not node.args.vararg
            yield f"{parent_name}.{node.name}(...)", f"has the parameter {', '.join(new)}" if wanted else None
    for each in verl.lineage(parent):
        for node in each.node.body if each.node else []:
            marks = [ast.unparse(d) for d in getattr(node, "decorator_list", [])]
            if any("abstract" in mark for mark in marks) and node.name not in own:
                yield f"{parent_name}.{node.name}", "is abstract, and ours has none"


def _hook_calls(tree: ast.AST) -> Iterator[tuple[ast.Call, list[ast.expr]]]:
    """Every Hook(...) and its positional arguments; one in a comprehension once for each line of what it runs over."""
    looped = {id(n.elt): n.generators[0].iter for n in ast.walk(tree) if isinstance(n, ast.GeneratorExp)}
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "Hook"):
        if id(call) in looped:
            yield from ((call, line.elts) for line in looped[id(call)].elts)
        else:
            yield call, call.args


def hooks(verl: Verl) -> Iterator[Need]:
    """The functions of both hooks.py, and that they still begin with the parameters that ours name."""
    listed = [OURS / room / "hooks.py" for room in ("plugin", "backends")]
    functions = {}
    for path in {*listed, *OURS.glob("backends/*.py")}:
        top = _top(ast.parse(path.read_text()))
        functions |= {n.name: n for n in top if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    calls = ((path, *call) for path in listed for call in _hook_calls(ast.parse(path.read_text())))
    for path, call, arguments in calls:
        module, name = (argument.value for argument in arguments[:2])
        if not _is_verl(module):
            continue
        room = _room_of(call)
        target = Found(module, verl.tree(module)) if verl.tree(module) else None
        for part in name.split("."):
            target = target and verl.attribute(target, part)
        problem = None if target else "is not there"
        if target and isinstance(target.node, ast.FunctionDef | ast.AsyncFunctionDef):
            theirs = [p.arg for p in target.node.args.args]
            ours = [p.arg for p in functions[ast.unparse(arguments[2]).split(".")[-1]].args.args[1:]]
            shift = "." in name  # self, whatever ours calls it
            if theirs[shift : len(ours)] != ours[shift:]:
                problem = f"begins with ({', '.join(theirs)}), ours with ({', '.join(ours)})"
        yield Need(f"{module}.{name}", f"{path.relative_to(OURS)}:{call.lineno}", room, problem)


@dataclass
class Trainer:
    """An entry point of verl's. refusal: what it says in place of starting; reached: ids of definitions in use."""

    name: str
    refusal: str | None
    reached: set[int]

    def reaches(self, verl: Verl, module: str, name: str) -> bool:
        """A method is reached where its class is."""
        found = verl.find(module, name.split(".")[0])
        return not self.refusal and found is not None and id(found.node) in self.reached


def trainers(verl: Verl) -> list[Trainer]:
    """What verl's main can start: the branches of its `if` on use_v1, or all of it where there is none."""
    main = verl.find(*MAIN)
    if main is None:
        return []
    branches = [n for n in main.node.body if isinstance(n, ast.If) and "use_v1" in ast.unparse(n.test)]
    if not branches:
        return [Trainer("the trainer", None, reached(verl, MAIN[0], [main.node]))]
    at = main.node.body.index(branches[0])
    before, after, branch = main.node.body[:at], main.node.body[at + 1 :], branches[0]
    ways = {"V1 trainer": branch.body, "legacy trainer": branch.orelse}
    if isinstance(branch.test, ast.UnaryOp):  # if not use_v1
        ways = dict(zip(ways, reversed(ways.values()), strict=True))
    result = []
    for name, body in ways.items():
        raised = [n.exc for n in body if isinstance(n, ast.Raise)]
        words = [n.value for n in ast.walk(raised[0]) if isinstance(n, ast.Constant)] if raised else []
        seen = set() if raised else reached(verl, MAIN[0], [*before, *body, *after])
        result.append(Trainer(name, " ".join(map(str, words)) if raised else None, seen))
    return result


def reached(verl: Verl, module: str, statements: list[ast.stmt]) -> set[int]:
    """ids of the functions and classes of verl's that these statements of a module use, and those use, and so on.

    A class that is named counts with all its methods and bases. Dotted names in strings, and REGISTERED, are followed.
    """
    seen: set[int] = set()
    waiting = [Found(module, ast.If(ast.Constant(True), statements, []))]
    while waiting:
        here = waiting.pop()
        if here.node is None or isinstance(here.node, ast.Module) or id(here.node) in seen:
            continue
        seen.add(id(here.node))
        imports = [n for n in ast.walk(here.node) if isinstance(n, ast.ImportFrom)]
        local = {a.asname or a.name: (verl.source_of(n, here.module), a.name) for n in imports for a in n.names}
        for node in ast.walk(here.node):
            if isinstance(node, ast.Name | ast.Attribute | ast.Constant):
                source, name = local.get(node.id, (here.module, node.id)) if isinstance(node, ast.Name) else ("", "")
                waiting.append(_used(verl, here.module, local, node) or Found("", None))
                waiting += [verl.find(source, each) or Found("", None) for each in REGISTERED.get((source, name), ())]
    return seen


def _used(verl: Verl, module: str, local: dict[str, tuple[str, str]], node: ast.AST) -> Found | None:
    """The definition that a name, an attribute of one, or a dotted name in a string stands for, where it is verl's."""
    if isinstance(node, ast.Name):
        source, name = local.get(node.id, (module, node.id))
        return verl.find(source, name) if _is_verl(source) else None
    if isinstance(node, ast.Attribute):
        owner = _used(verl, module, local, node.value)
        return verl.attribute(owner, node.attr) if owner and owner.node else None
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_verl(node.value) and "." in node.value:
        source, _, name = node.value.rpartition(".")
        return verl.find(source, name) if name.isidentifier() else None
    return None


def unreached(verl: Verl, ways: list[Trainer]) -> Iterator[Need]:
    """What krpo and kpo need and no trainer that starts would use."""
    for module, name, room in [(*door, CORE) for door in DOORS] + list(_hooks_of("plugin")):
        if (
            room == CORE
            and verl.find(module, name.split(".")[0])
            and not any(w.reaches(verl, module, name) for w in ways)
        ):
            yield Need(f"{module}.{name}", "by entry point", CORE, "is reached by no trainer that starts")


def _hooks_of(folder: str) -> Iterator[tuple[str, str, str]]:
    """(module, name, room) of the hooks on verl in our hooks.py of a folder."""
    for call, arguments in _hook_calls(ast.parse((OURS / folder / "hooks.py").read_text())):
        module, name = (argument.value for argument in arguments[:2])
        if _is_verl(module):
            yield module, name, _room_of(call)


def _room_of(call: ast.Call) -> str:
    """Whom a Hook(...) is for."""
    options = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
    if options.get("cpu"):
        return "CPU backend"
    return CORE if options.get("needed", True) else "optional hook"


def _is_verl(module: str) -> bool:
    return module == "verl" or module.startswith("verl.")


def _top(tree: ast.AST) -> Iterator[ast.AST]:
    """The statements of a module, those inside if, try and with too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _top(node)
        else:
            yield node


def _defined(node: ast.AST) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]


def _is_self(node: ast.AST, name: str | None = None) -> bool:
    read = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return read and name in (None, node.attr)


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node.value) == "super()"


def _first_parameter(tree: ast.Module, function: ast.expr) -> str:
    called = ast.unparse(function)
    return next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == called).args.args[0].arg


def _target(verl: Verl, names: dict[str, Found], function: ast.expr) -> Found | None:
    if isinstance(function, ast.Name):
        return names.get(function.id)
    if isinstance(function, ast.Attribute) and (owner := _target(verl, names, function.value)):
        return verl.attribute(owner, function.attr)
    return None


def unpacked(wanted: str | None, where: Path) -> Path:
    """The package verl: of this environment, under a path, or of a wheel that pip downloads. ValueError: none there."""
    if wanted is None:
        spec = importlib.util.find_spec("verl")  # of a top-level package it imports nothing
        if spec is None or spec.origin is None:
            raise ValueError("no verl in this environment: name a folder or a version")
        return Path(spec.origin).parent
    if Path(wanted).exists():
        package = next((p for p in (Path(wanted) / "verl", Path(wanted)) if (p / "__init__.py").is_file()), None)
        if package is None:
            raise ValueError(f"{wanted} has no package verl in it")
        return package
    requirement = "verl" if wanted == "newest" else f"verl=={wanted}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", where, requirement]
    subprocess.run(command, check=True)
    (wheel,) = where.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(where)
    return where / "verl"


def main(
    verl: Annotated[str | None, typer.Argument(metavar="[PATH_OR_VERSION]")] = None,
    everything: Annotated[bool, typer.Option("--all", help="List what holds as well.")] = False,
) -> None:
    """What verl-krpo rests on in verl, checked without importing it."""
    with tempfile.TemporaryDirectory() as folder:
        package = unpacked(verl, Path(folder))
        source = Verl(package)
        ways = trainers(source)
        found = needs(source) + list(unreached(source, ways))
        taken_up = [*DOORS, *(hook[:2] for room in ("plugin", "backends") for hook in _hooks_of(room))]
        marks = [
            (f"{at}.{what}", *("yes" if way.reaches(source, at, what) else "-" for way in ways))
            for at, what in taken_up
        ]
        version = package / "version/version"
        name = version.read_text().strip() if version.is_file() else str(package)
    broken = [need for need in found if need.problem]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("verl has", "", "for", "needed at"):
        table.add_column(column, overflow="fold")
    for need in found if everything else broken:
        color = "red" if need.room == CORE else "yellow"
        table.add_row(need.what, need.problem or "yes", need.room, need.where, style=color if need.problem else None)
    console = Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 160)
    if table.rows:
        console.print(table)
    if ways:
        by_way = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("krpo and kpo are taken up by", *(way.name for way in ways)):
            by_way.add_column(column, overflow="fold")
        for mark in marks:
            by_way.add_row(*mark)
        console.print(by_way)
    for way in ways:
        if way.refusal:
            console.print(f"{way.name} refuses to start: {way.refusal}")
    console.print(f"verl {name}: {len(found)} things needed, {len(broken)} of them not there or changed")
    raise typer.Exit(1 if any(need.room == CORE for need in broken) else 2 if broken else 0)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
