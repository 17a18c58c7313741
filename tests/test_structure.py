"""The shape of the house: imports point one way without circles, files stay short, scripts stay thin."""

import ast
import subprocess
from pathlib import Path

from tests.conftest import REPO

PACKAGES = ("model", "dataset", "utils")


def tracked() -> list[Path]:
    """Python files that belong to the project."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=REPO, capture_output=True, text=True, check=True)
    return [Path(line) for line in listed.stdout.splitlines() if (REPO / line).exists()]


def imports(path: Path, top_level_only: bool) -> set[str]:
    """Project modules that a file imports, as dotted names."""
    tree = ast.parse((REPO / path).read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    known = {".".join(p.with_suffix("").parts) for p in tracked()}
    return {name for name in names if name in known}


def test_imports_have_no_circles() -> None:
    graph = {
        ".".join(path.with_suffix("").parts): imports(path, top_level_only=True)
        for path in tracked()
        if path.parts[0] in PACKAGES
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())
    assert len(done) > 40


def test_networks_know_neither_data_nor_engine() -> None:
    for path in tracked():
        if path.parts[0] == "model":
            wrong = {
                n for n in imports(path, False) if n.startswith(("dataset", "utils.engine", "utils.metrics"))
            }
            assert not wrong, f"{path} imports {sorted(wrong)}"


def test_files_are_short_and_scripts_thin() -> None:
    for path in tracked():
        lines = len((REPO / path).read_text(encoding="utf-8").splitlines())
        assert lines <= 500, f"{path} has {lines} lines"
        if len(path.parts) == 1 or path.parts[0] == "scripts":
            assert lines <= 100, f"{path} has {lines} lines"


def test_nothing_unsafe_and_no_large_files() -> None:
    for path in tracked():
        if path.parts[0] in (*PACKAGES, "scripts") or len(path.parts) == 1:
            tree = ast.parse((REPO / path).read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                bare = isinstance(node, ast.ExceptHandler) and node.type is None
                assert not bare, f"{path}:{node.lineno}: bare except"
                if isinstance(node, ast.Call):
                    name = ast.unparse(node.func)
                    assert name not in ("pickle.load", "pickle.loads", "yaml.load"), (
                        f"{path}:{node.lineno}: {name}"
                    )
                    assert not name.endswith(".cuda"), f"{path}:{node.lineno}: {name}"
                    if name == "torch.load":
                        safe = any(
                            k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords
                        )
                        assert safe, f"{path}:{node.lineno}: torch.load without weights_only=True"
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        size = (REPO / line).stat().st_size if (REPO / line).exists() else 0
        assert size < 1e6 or line.startswith("checkpoints/lisat_tiny"), f"{line}: {size} bytes"
