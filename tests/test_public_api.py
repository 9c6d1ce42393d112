"""What is public is typed and described, so that editors and type checkers can help."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for folder in ("r3mem_fast", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any(part.startswith("triton") for part in path.parts)  # kernels' arguments are Triton's
    and path.name != "triton.py"
]


def public_functions(tree):
    """`(function, whether it is a method)` of the public functions of a module and of its public classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node, False
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            graph = any(getattr(base, "attr", None) == "Function" for base in node.bases)  # of autograd
            for inner in () if graph else node.body:
                named = isinstance(inner, ast.FunctionDef) and inner.name
                if named and (not named.startswith("_") or named in ("__init__", "__call__")):
                    yield inner, True


def own_nodes(function):
    """The nodes of a function, without those of functions inside of it."""
    waiting = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_functions_are_typed(path):
    for function, method in public_functions(ast.parse(path.read_text(encoding="utf-8"))):
        names = [decorator.id for decorator in function.decorator_list if isinstance(decorator, ast.Name)]
        given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        given = given[1:] if method and "staticmethod" not in names else given
        untyped = [argument.arg for argument in given if argument.annotation is None]
        assert not untyped, f"{function.name} in line {function.lineno}: {untyped}"
        returns = any(isinstance(node, ast.Return) and node.value is not None for node in own_nodes(function))
        managed = any("contextmanager" in ast.dump(decorator) for decorator in function.decorator_list)
        assert function.returns is not None or managed or not returns, (
            f"{function.name} in line {function.lineno} does not say what it returns"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_what_they_are_about(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            text = ast.get_docstring(node) or ""
            name = getattr(node, "name", path.name)
            assert not text.startswith(("Of ", "By ", "As ")), f"{name}: {text[:60]}"
            for line in text.splitlines():
                entry = line.strip().partition(": ")[2]
                assert not (line.startswith("    ") and entry.startswith(("Of ", "By which"))), (
                    f"{name}: {line.strip()}"
                )


@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "r3mem_fast").rglob("*.py")), *sorted((ROOT / "bench").rglob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_a_file_is_one_idea(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
