"""The public API says what it takes, gives and raises: `nativerank`, `nativerank.layers`, `nativerank.linalg`."""

import ast
import inspect
import re
import textwrap

import pytest
from docstring_parser import parse

import nativerank as nr


def public():
    """(dotted name, object) of every public function, class, and public method of such a class."""
    found = {f"nr.{name}": getattr(nr, name) for name in nr.__all__ if name not in (*nr.ROOMS, "__version__")}
    for room in nr.ROOMS:
        module = getattr(nr, room)
        found |= {f"nr.{room}.{name}": getattr(module, name) for name in module.__all__}
    for name, thing in list(found.items()):
        if inspect.isclass(thing):
            methods = {
                k: v for k, v in vars(thing).items() if not k.startswith("_") and (callable(v) or is_accessor(v))
            }
            found |= {f"{name}.{k}": unwrapped(v) for k, v in methods.items()}
    return {name: thing for name, thing in found.items() if callable(thing)}


def is_accessor(value):
    return isinstance(value, (property, classmethod, staticmethod))


def unwrapped(value):
    """The function behind a property or a class method."""
    return value.fget if isinstance(value, property) else inspect.unwrap(getattr(value, "__func__", value))


def own_doc(thing):
    """What is written at the thing itself, or at what it overrides."""
    return inspect.getdoc(thing) or ""


def parameters(thing):
    """Names of what a caller gives."""
    function = thing.__init__ if inspect.isclass(thing) else thing
    try:
        names = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return []
    return [name for name in names if name not in ("self", "cls", "args", "kwargs") and not name.startswith("_")]


def raises_value_error(thing):
    """Whether its own code, or a private function of its module that it calls, raises one."""
    functions = {node.name: node for node in ast.walk(parsed(inspect.getmodule(thing))) if is_function(node)}
    return raises_one(the_code(thing), functions, set())


def the_code(thing):
    """Of a class, what makes an object of it."""
    (node,) = parsed(thing).body
    made_by = ("__init__", "__post_init__")
    is_class = isinstance(node, ast.ClassDef)
    return ast.Module([n for n in node.body if getattr(n, "name", "") in made_by], []) if is_class else node


def parsed(thing):
    return ast.parse(textwrap.dedent(inspect.getsource(thing)))


def is_function(node):
    return isinstance(node, ast.FunctionDef)


def raises_one(code, functions, seen):
    nodes = list(ast.walk(code))
    raised = [n.exc for n in nodes if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call)]
    if any(getattr(call.func, "id", None) == "ValueError" for call in raised):
        return True
    called = {getattr(n.func, "id", None) or getattr(n.func, "attr", "") for n in nodes if isinstance(n, ast.Call)}
    called = {name for name in called if name.startswith("_")} & functions.keys() - seen
    return any(raises_one(functions[name], functions, seen | called) for name in called)


PUBLIC = public()


def test_there_is_something_to_check():
    assert {
        "nr.factorize",
        "nr.layers.LowRankLinear",
        "nr.layers.LowRankLinear.factors",
        "nr.linalg.gram",
    } <= PUBLIC.keys()


@pytest.mark.parametrize("name", PUBLIC)
def test_it_says_what_it_is(name):
    assert len(own_doc(PUBLIC[name])) > 15


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if parameters(thing)])
def test_every_argument_is_named(name):
    doc = own_doc(PUBLIC[name])
    missing = [p for p in parameters(PUBLIC[name]) if not re.search(rf"(?<!\w){re.escape(p)}(?!\w)", doc)]
    assert missing == []
    listed = {word.strip(" *") for param in parse(doc).params for word in param.arg_name.split(",")}
    assert listed <= {*parameters(PUBLIC[name]), "args", "kwargs"}, "a name under Args that it does not take"


OURS = [name for name, thing in PUBLIC.items() if getattr(thing, "__module__", "").startswith("nativerank")]


@pytest.mark.parametrize("name", OURS)
def test_what_it_raises_stands_there(name):
    if raises_value_error(PUBLIC[name]):
        assert re.search(r"Raises|ValueError", own_doc(PUBLIC[name]))


@pytest.mark.parametrize(
    "name", [name for name in OURS if re.match(r"nr\.linalg\.|.*\.(forward|factors|to_dense)$", name)]
)
def test_tensors_have_shapes(name):
    assert re.search(r"\((\.\.\.|S|E|d_out|d|r)[,)]", own_doc(PUBLIC[name]))
