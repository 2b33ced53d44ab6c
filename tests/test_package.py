"""The wheel: complete, and harmless in an environment that already has verl."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import verl_krpo

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "verl_krpo", source / "verl_krpo", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("verl_krpo-*.whl")
    return path


def test_the_wheel_holds_every_module_and_the_entry_points(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "verl_krpo").rglob("*.py")}
    assert modules <= names and "verl_krpo/py.typed" in names
    assert "[verl.plugins]\nverl_krpo = verl_krpo.plugin" in entry_points
    assert "verl-krpo = verl_krpo.cli:main" in entry_points


def test_installing_it_beside_verl_changes_no_other_package(wheel, tmp_path):
    report = tmp_path / "report.json"
    install = ["install", "--dry-run", "--quiet", "--force-reinstall", "--no-deps", "--report", str(report), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True, timeout=600)
    (ours,) = json.loads(report.read_text())["install"]
    requires = ours["metadata"]["requires_dist"]
    needed = [each for each in requires if "extra ==" not in each]
    assert needed[0] == "verl>=0.7" and all(name.isalnum() for name in needed[1:])  # no versions

    # With verl there, resolving them brings nothing in.
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", str(report), *needed],
        check=True,
        capture_output=True,
        timeout=600,
    )
    assert json.loads(report.read_text())["install"] == []


def test_the_command_names_its_version():
    done = subprocess.run([sys.executable, "-m", "verl_krpo", "--version"], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, f"{verl_krpo.__version__}\n")


def test_the_constraints_are_the_tested_versions_and_leave_torch_and_verl_to_setup():
    from packaging.requirements import Requirement

    from verl_krpo import versions

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {need.name: str(need.specifier) for need in map(Requirement, (x for x in lines if x and x[0] != "#"))}
    assert {"torch", "verl"}.isdisjoint(pinned)
    for name in ("ray", "transformers"):
        assert pinned[name] == f"=={versions.PACKAGES[name]}"
    setup = (ROOT / "scripts/setup.sh").read_text()
    assert all(f"{name}=={versions.PACKAGES[name]}}}" in setup for name in ("torch", "verl"))


def test_the_workflow_calls_scripts_that_are_there():
    import re

    called = re.findall(r"bash (scripts/\S+)", (ROOT / ".github/workflows/tests.yml").read_text())
    assert len(called) >= 4 and all((ROOT / script).is_file() for script in called)


def test_the_rooms_form_no_circle_and_only_the_command_line_knows_the_laboratory():
    import ast
    from graphlib import TopologicalSorter

    paths = {"/".join(p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / "verl_krpo").rglob("*.py")}
    modules = {name.removesuffix("/__init__").replace("/", "."): path for name, path in paths.items()}
    imported: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found = {f"{node.module}.{each.name}" for each in node.names}
                imported[name] |= {each if each in modules else node.module for each in found} & modules.keys() - {name}
    list(TopologicalSorter(imported).static_order())  # CycleError names a circle
    assert len(imported["verl_krpo.plugin.hooks"]) > 5
    of_others = {name for name, needs in imported.items() if not name.startswith("verl_krpo.lab") for need in needs
                 if need.startswith("verl_krpo.lab")}  # fmt: skip
    assert of_others == {"verl_krpo.cli"}
