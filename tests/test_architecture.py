"""The rules of the house, checked: rooms and their layers, the package list, file lengths, what stays free of torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("comm", "parallel", "trainer", "launch")  # a room imports itself and those before it
ARITHMETIC = ("trainer/model", "trainer/fp8", "trainer/tensors")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))

# What a login node without torch must be able to import.
TORCH_FREE = (
    "dryvine.comm.config",
    "dryvine.comm.topology",
    "dryvine.parallel.config",
    "dryvine.parallel.partition",
    "dryvine.parallel.schedule.ir",
    "dryvine.parallel.schedule.table",
    "dryvine.parallel.schedule.lower",
    "dryvine.parallel.schedule.simulate",
    "dryvine.trainer.config",
    "dryvine.trainer.run_plan",
    "dryvine.trainer.faults",
    "dryvine.trainer.activations",
    "dryvine.trainer.ramps",
    "dryvine.trainer.model.memory",
    "dryvine.trainer.model.shape",
    "dryvine.launch.cli",
    "dryvine.launch.dry_run",
    "dryvine.launch.plan.plan",
)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def test_every_package_is_listed_once_and_none_is_missing() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix() for path in FILES}
    assert sorted(tool["packages"]) == sorted("dryvine." + folder.replace("/", ".") for folder in folders)
    assert tool["package-dir"] == {"dryvine." + f.replace("/", "."): f for f in folders}


def test_what_tests_share_imports_no_test() -> None:
    shared = (ROOT / "tests/support").glob("*.py")
    assert not [(path.name, name) for path in shared for name in imports(path) if re.search(r"\btest_", name)]


def test_no_folder_is_a_package_of_its_own() -> None:
    assert not [path for path in FILES if path.name == "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file_keeps_the_rules(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    allowed = ROOMS[: ROOMS.index(room) + 1]
    for name in imports(path):
        assert name.split(".")[0] not in ROOMS, f"bare import {name}: write dryvine.{name}"
        if "/".join(path.relative_to(ROOT).parts[:2]) in ARITHMETIC and path.name not in ("phases.py", "decoder.py"):
            assert not name.startswith("dryvine.parallel"), f"arithmetic knows nothing of the pipeline: {name}"
        if name.startswith("dryvine."):
            assert name.split(".")[1] in allowed, f"{room} must not import {name}"
    text = path.read_text()
    tree = ast.parse(text)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)], "module state"
    assert ast.get_docstring(tree), "no module docstring"
    assert text.count("\n") <= 400, "over 400 lines"


def test_files_of_tests_and_benchmarks_are_short_too() -> None:
    files = (path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
    assert not [path for path in files if path.read_text().count("\n") > 400]


def test_planning_needs_no_torch() -> None:
    code = f"import sys\nsys.modules['torch'] = None\nimport {', '.join(TORCH_FREE)}\n"
    code += "assert 'out of memory' in dryvine.trainer.faults.in_a_line(MemoryError())\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def kernels_in(path: Path) -> Iterator[tuple[ast.FunctionDef, str]]:
    """Functions decorated with `kernel_in`, each with the module that has its kernel."""
    tree = ast.parse(path.read_text())
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in tree.body:
        for call in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "kernel_in":
                named = constants[call.args[0].id] if isinstance(call.args[0], ast.Name) else call.args[0]
                yield node, ast.literal_eval(named)


def test_a_kernel_has_the_signature_of_its_definition() -> None:
    pairs = [(path, *pair) for path in FILES for pair in kernels_in(path)]
    assert len(pairs) >= 6
    for path, function, module in pairs:
        file = ROOT / (module.removeprefix("dryvine.").replace(".", "/") + ".py")
        (kernel,) = (
            node
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name == function.name
        )
        assert ast.unparse(kernel.args) == ast.unparse(function.args), f"{path}: {function.name} and its kernel differ"


def test_no_class_name_has_two_meanings() -> None:
    where: defaultdict[str, list[str]] = defaultdict(list)
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                where[node.name].append(path.relative_to(ROOT).as_posix())
    assert {name: files for name, files in where.items() if len(files) > 1} == {}


def test_every_public_name_is_used_outside_its_definition() -> None:
    texts = {path: path.read_text() for path in [*FILES, *(ROOT / "benchmarks").rglob("*.py")]}
    words = Counter(word for text in texts.values() for word in WORD.findall(text))
    names = [pair for path in FILES for pair in _public(texts[path])]
    assert {name for name, definition in names if words[name] == WORD.findall(definition).count(name)} == set()


WORD = re.compile(r"\w+")


def _public(text: str) -> Iterator[tuple[str, str]]:
    """Each public name that a file defines at its top level, and the source of its definition."""
    lines = text.splitlines()
    for node in ast.parse(text).body:
        names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        yield from ((name, source) for name in names if not name.startswith("_"))


def test_no_files_import_each_other_in_a_circle() -> None:
    modules = {"dryvine." + ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    needs = {name: _imported(path, modules) for name, path in modules.items()}
    while leaves := [name for name, others in needs.items() if not others]:
        for name in leaves:
            del needs[name]
        for others in needs.values():
            others.difference_update(leaves)
    assert needs == {}


def _imported(path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of ours that a file imports when it is imported: those named at its top level."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & modules.keys()
