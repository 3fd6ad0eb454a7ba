"""The Python API as one Markdown page, from the docstrings.

    python -m windquant.api

writes docs/api.md. Nothing is imported: the modules are parsed. A test checks that the page is current.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from windquant import dependencies

PAGE = Path("docs/api.md")
#: What one needs to use checkpoints, plans and banks, and to add to them; the machinery around the steps is left out.
MODULES = (
    "allocation", "bank", "calibration", "checkpoint", "configuration", "evaluation", "feedback", "manifest", "measure",
    "models", "naming", "packed", "plan", "quantizers", "recovery", "result", "result_file", "scales", "splits",
    "statistics", "step", "storage", "task", "units",
)  # fmt: skip
HEAD = """# Python API

<!-- Made by `python -m windquant.api` from the docstrings: do not edit. -->

What modules offer each other, module by module. Shapes stand in brackets: `[U]` are units, `[U, A]` units by actions,
`[rows, columns]` a weight. Every step is also a command: `python -m windquant.recovery --help`.
"""
Function = ast.FunctionDef | ast.AsyncFunctionDef


def page() -> str:
    """What the page should hold."""
    files = [path for path in dependencies.ROOT.rglob("*.py") if path.name != "__main__.py"]
    named = sorted((name(path), path) for path in files)
    modules = [(title, ast.parse(path.read_text(encoding="utf-8"))) for title, path in named if part(title) in MODULES]
    contents = ", ".join(f"[{title.partition('.')[2]}](#{title.replace('.', '')})" for title, _ in modules)
    return (
        "\n\n".join([HEAD.strip(), contents, *(text for title, tree in modules for text in module(title, tree))]) + "\n"
    )


def part(title: str) -> str:
    """The part of the package that a module belongs to: "bank" of "windquant.bank"."""
    return title.split(".")[1] if "." in title else ""


def name(path: Path) -> str:
    """Of a module, from its file."""
    parts = path.relative_to(dependencies.ROOT.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def module(title: str, tree: ast.Module) -> Iterator[str]:
    """Heading, first paragraphs, and what is public."""
    yield f"## {title}"
    if text := ast.get_docstring(tree):
        yield fenced(text)
    for node in tree.body:
        if isinstance(node, Function) and public(node):
            yield entry(f"`{node.name}{signature(node)}`", ast.get_docstring(node))
        elif isinstance(node, ast.ClassDef) and public(node):
            yield entry(f"class `{node.name}{bases(node)}`", ast.get_docstring(node))
            lines = [*fields(node), *methods(node)]
            if lines:
                yield "\n".join(lines)


def entry(head: str, text: str | None) -> str:
    return f"### {head}\n\n{fenced(text or '')}"


def fenced(text: str) -> str:
    """A docstring's paragraphs; those that are indented are code or formulas."""
    lines: list[str] = []
    code = False
    for line in text.splitlines():
        indented = line.startswith("    ")
        if line.strip() and indented != code and (indented or code):
            if code:
                while lines[-1] == "":
                    lines.pop()
            lines += ["```"] if code else ["```text"]
            if code:
                lines.append("")
            code = indented
        lines.append(line[4:] if code else line)
    return "\n".join([*lines, "```"] if code else lines)


def public(node: Function | ast.ClassDef) -> bool:
    """What has a docstring is meant for others; `_names` are not, and `main` and `run` are commands."""
    return not node.name.startswith("_") and node.name not in ("main", "run") and ast.get_docstring(node) is not None


def signature(node: Function) -> str:
    """Arguments and result, without self."""
    copied = ast.parse(ast.unparse(node)).body[0]
    assert isinstance(copied, Function)
    arguments = copied.args
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        del arguments.args[0]
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(arguments)}){result}"


def bases(node: ast.ClassDef) -> str:
    named = ", ".join(map(ast.unparse, node.bases))
    return f"({named})" if named else ""


def fields(node: ast.ClassDef) -> Iterator[str]:
    """The fields of a dataclass."""
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not item.target.id.startswith("_"):
            default = f" = {ast.unparse(item.value)}" if item.value else ""
            yield f"- `{item.target.id}: {ast.unparse(item.annotation)}{default}`"


def methods(node: ast.ClassDef) -> Iterator[str]:
    for item in node.body:
        if isinstance(item, Function) and not item.name.startswith("_"):
            text = " ".join((ast.get_docstring(item) or "").split())
            kinds = [ast.unparse(decorator) for decorator in item.decorator_list]
            shown = item.name if any("property" in kind for kind in kinds) else f"{item.name}{signature(item)}"
            yield f"- `{shown}`" + (f": {text}" if text else "")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
