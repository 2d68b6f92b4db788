import ast
from pathlib import Path

import xpander_celery.sandbox

ROOT = Path(xpander_celery.sandbox.__file__).parent


def test_the_sandbox_imports_nothing_of_the_rest_of_the_package() -> None:
    imported = {
        name
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in _names(node)
        if name.startswith("xpander_celery")
    }
    assert imported
    assert {name for name in imported if not name.startswith("xpander_celery.sandbox.")} == set()


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []
