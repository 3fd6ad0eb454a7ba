"""What a step's result depends on in the code: its module and every windquant module that it imports, by content.

The digest is of the parsed code without docstrings, so that a comment, a docstring or a new line reruns nothing.
Only the standard library is imported here: the Snakefile asks for every step at each start, so that a file is read and
parsed once.
"""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = "windquant"
ROOT = Path(__file__).resolve().parent
#: Modules that every step imports and none computes with: what they do never changes an artifact. (Importing the
#: package registers the packed format; rules whose steps load packed checkpoints name it.)
WITHOUT_EFFECT = {
    PACKAGE,
    *(f"{PACKAGE}.{name}" for name in ("dependencies", "exclusive", "integrity", "progress", "tracking")),
}
#: Files beside the code that belong to it.
DATA = (".yaml", ".json", ".jinja")


def digest(*names: str) -> str:
    """Digest of the modules `names` ("windquant.recovery") and everything of windquant that they import."""
    lines = [f"{_content(path)}  {name}\n" for module in closure(*names) for name, path in _files(module)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def closure(*names: str) -> list[str]:
    """The modules and all windquant modules that they import, sorted; imports inside functions count.

    Raises ModuleNotFoundError for a name that is no module of the package.
    """
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(imported(name) - WITHOUT_EFFECT)
    return sorted(found)


@cache
def imported(name: str) -> frozenset[str]:
    """The windquant modules that a module imports anywhere; for a package also what `python -m` runs, its __main__."""
    path = source(name)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    names = {entry(name)}
    for node in _statements(_tree(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            names.update({base}, (f"{base}.{alias.name}" for alias in node.names))  # a submodule, or just a name
    # importing windquant.a.b runs windquant.a too
    paths = [name.split(".") for name in names]
    names = {".".join(parts[:end]) for parts in paths for end in range(1, len(parts) + 1)}
    return frozenset(name for name in names if _find(name) is not None)


def entry(module: str) -> str:
    """The module that `python -m module` runs."""
    return f"{module}.__main__" if _find(f"{module}.__main__") else module


@cache
def settings(module: str) -> tuple[str, ...]:
    """The field names of a step's `Settings` dataclass, those of its bases first, without importing it."""
    return tuple(_fields(entry(module), "Settings"))


def _fields(module: str, name: str) -> list[str]:
    for node in _tree(source(module)).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
            own = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
            inherited = [field for base in bases for field in _fields(module, base)]
            return [*inherited, *(target.id for target in own if isinstance(target, ast.Name))]
        if isinstance(node, ast.ImportFrom) and node.module and _find(node.module):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _fields(node.module, alias.name)
    return []


def source(module: str) -> Path:
    """The file of a module or package; raises ModuleNotFoundError for a name that is not windquant's."""
    path = _find(module)
    if path is None:
        raise ModuleNotFoundError(f"{module}: no module of {ROOT}", name=module)
    return path


@cache
def _find(module: str) -> Path | None:
    first, *rest = module.split(".")
    path = ROOT.joinpath(*rest)
    candidates = [path / "__init__.py", *([path.with_suffix(".py")] if rest else [])]
    return next((file for file in candidates if file.is_file()), None) if first == PACKAGE else None


def _files(module: str) -> list[tuple[str, Path]]:
    """The module's file and, for a package, the data files in its folder; names relative to the package."""
    path = source(module)
    data = sorted(path.parent.rglob("*")) if path.name == "__init__.py" and module != PACKAGE else []
    files = [path, *(file for file in data if file.suffix in DATA)]
    return [(file.relative_to(ROOT).as_posix(), file) for file in files]


@cache
def _tree(path: Path) -> ast.Module:
    """The code of a file, without docstrings."""
    tree = ast.parse(path.read_bytes(), filename=str(path))
    for node in [tree, *_statements(tree)]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node, clean=False) is not None
            node.body = node.body[documented:]
    return tree


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements within a node, and what holds them (handlers, cases); no expressions, which are most of a tree."""
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):
        for child in getattr(node, field, ()):
            yield child
            yield from _statements(child)


@cache
def _content(path: Path) -> str:
    """Digest of a file; of code, without its docstrings and comments."""
    content = ast.dump(_tree(path)).encode() if path.suffix == ".py" else path.read_bytes()
    return hashlib.sha256(content).hexdigest()
