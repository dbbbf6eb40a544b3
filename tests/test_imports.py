"""Who may import whom: the core knows nothing of the trainer around it."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "foundry_ext"
TRAINERS = {"composer", "llmfoundry", "streaming"}
MAY_IMPORT_TRAINERS = {
    "adapters.py",
    "cli.py",
    "data/config.py",
    "data/dataloader.py",
    "data/dataset.py",
    "data/sources.py",
    "data/tokenize.py",
    "inspection.py",
    "verify_packing.py",
    "verify_resume.py",
    "launch.py",
    "load_path.py",
    "plan_course.py",
    "models/composer_smollm2.py",
    "optimizers.py",
    "quickstart/story.py",
}
# Of what these import, directly or through other files of ours, nothing is a trainer's.
CORE = ("compare/", "data/batch.py", "data/packing.py", "methods.py", "models/")
WITHOUT_TORCH = ("compare/", "data/packing.py")
MODEL_PACKAGES = {"numpy", "torch", "transformers"}
OPTIONAL_KERNELS = {"flash_attn", "liger_kernel"}

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def is_core(file: str) -> bool:
    return file.startswith(CORE) and file != "models/composer_smollm2.py"


def is_model(file: str) -> bool:
    return file.startswith("models/") and is_core(file)


@cache
def imports(file: str) -> tuple[tuple[str, bool], ...]:
    """The modules a file names in imports, and whether each import runs with the module."""
    package = ["foundry_ext", *Path(file).parts[:-1]]
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, at_top: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((name.name, at_top) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found.extend((f"{module}.{name.name}", at_top) for name in node.names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, at_top and not inside)

    visit(ast.parse((PACKAGE / file).read_text()), True)
    return tuple(found)


def own_files(module: str) -> set[str]:
    """The files of ours that run when `module` is imported, packages above it included."""
    parts = module.split(".")[1:]
    files = set()
    for depth in range(len(parts) + 1):
        stem = "/".join(parts[:depth])
        files |= {f"{stem}/__init__.py".lstrip("/"), f"{stem}.py"}
    return files & set(FILES)


def reached(file: str) -> set[str]:
    """`file` and every file of ours that it imports, directly or not."""
    seen: set[str] = set()
    waiting = {file} | own_files("foundry_ext." + file.removesuffix(".py").replace("/", "."))
    while waiting:
        current = waiting.pop()
        seen.add(current)
        for module, _ in imports(current):
            if module.partition(".")[0] == "foundry_ext":
                waiting |= own_files(module) - seen
    return seen


def packages(file: str) -> set[str]:
    return {module.partition(".")[0] for module, _ in imports(file)}


def test_something_is_read():
    assert "launch.py" in FILES
    assert packages("launch.py") >= {"omegaconf", "llmfoundry"}
    assert reached("launch.py") >= {"__init__.py", "run_config.py", "run_sequence.py"}


@pytest.mark.parametrize("file", FILES)
def test_trainers_are_imported_only_where_they_may_be(file: str):
    if file not in MAY_IMPORT_TRAINERS and not file.startswith("callbacks/"):
        assert not packages(file) & TRAINERS


@pytest.mark.parametrize("file", list(filter(is_core, FILES)))
def test_the_core_reaches_no_trainer(file: str):
    for other in reached(file):
        assert not packages(other) & TRAINERS, f"{file} reaches {other}"


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith(WITHOUT_TORCH)])
def test_planning_and_comparing_reach_no_torch(file: str):
    for other in reached(file):
        assert "torch" not in packages(other), f"{file} reaches {other}"


@pytest.mark.parametrize("file", list(filter(is_model, FILES)))
def test_models_need_torch_and_transformers_alone(file: str):
    for module, at_top in imports(file):
        package = module.partition(".")[0]
        if package == "foundry_ext":
            assert module.startswith("foundry_ext.models"), module
        elif package in OPTIONAL_KERNELS:
            assert not at_top, f"{package} may be absent: import it inside a function"
        else:
            assert package in MODEL_PACKAGES | sys.stdlib_module_names, module


def test_packing_loads_without_torch():
    code = (
        "import sys, foundry_ext.data.packing;"
        "sys.exit(bool({'torch', 'transformers', 'composer', 'llmfoundry'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
