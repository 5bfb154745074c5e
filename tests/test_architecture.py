"""The rooms: a module imports only lower levels, and on its own level only its own folder."""

import ast
from pathlib import Path

import pytest

import nativerank

SOURCE = Path(nativerank.__file__).parent
LEVELS = {
    0: ("schema", "version", "files", "extras", "allocator", "terminal"),
    1: ("config", "linalg", "distributed"),
    2: ("layers", "optim", "data"),
    3: ("methods", "models", "rank"),
    4: ("accounting", "evaluate", "hub"),
    5: ("train", "convert", "integrations"),
    6: ("experiments", "bench", "export", "scores", "plan"),
    7: ("scaling", "report"),
    8: ("reproduce",),
    9: ("cli",),
    10: ("__main__",),
}
LEVEL = {room: level for level, rooms in LEVELS.items() for room in rooms}
MODULES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
# Rooms whose heavy imports come at the first use of a name.
LAZY = {"__init__.py"}


def room(module: str) -> str:
    return module.split(".")[1]


def imports(tree):
    """(imported module, line) of everything of ours; a relative or bare one raises."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"line {node.lineno}: relative import")
            if node.module == "nativerank":
                raise ValueError(f"line {node.lineno}: bare from nativerank import hides what is imported")
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name.split(".")[0] == "nativerank" and "." in name)


def faults(own, tree):
    """What a module of the room `own` may not import."""
    for name, line in imports(tree):
        other = room(name)
        if other != own and LEVEL[other] >= LEVEL[own]:
            yield f"line {line}: {own} (level {LEVEL[own]}) imports {name} (level {LEVEL[other]})"


@pytest.mark.parametrize("path", [m for m in MODULES if str(m) not in LAZY], ids=str)
def test_a_module_imports_only_lower_levels(path):
    own = path.parts[0].removesuffix(".py")
    assert own in LEVEL, f"{own} has no level"
    tree = ast.parse((SOURCE / path).read_text(encoding="utf-8"))
    assert list(faults(own, tree)) == []


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_says_what_it_is_in_ascii(path):
    text = (SOURCE / path).read_text(encoding="utf-8")
    assert text.isascii()
    assert ast.get_docstring(ast.parse(text)) or not text.strip()


@pytest.mark.parametrize(
    ("own", "code", "count"),
    [
        ("optim", "from nativerank.layers.base import Gemm", 1),
        ("optim", "def f():\n    import nativerank.train.loop", 1),
        ("optim", "from nativerank.linalg.gram import gram\nfrom nativerank.optim.roles import Roles", 0),
        ("models", "from nativerank.methods import METHODS", 1),
        ("linalg", "import torch\nimport nativerank", 0),
    ],
)
def test_the_rule_sees_faults(own, code, count):
    assert len(list(faults(own, ast.parse(code)))) == count


@pytest.mark.parametrize("code", ["from . import x", "from .base import x", "from nativerank import linalg"])
def test_the_rule_refuses_what_it_cannot_follow(code):
    with pytest.raises(ValueError, match="line 1"):
        list(imports(ast.parse(code)))


def test_configuration_does_not_know_torch():
    for name in (*LEVELS[0], "config"):
        tree = ast.parse((SOURCE / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            assert not any((n or "").split(".")[0] in ("torch", "transformers", "numpy") for n in names)
