"""The model's part of a training script, and exports/modeling.py behind it, as one module that needs neither."""
from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType

WRAPPER = Path(__file__).resolve().parent / "modeling.py"
ROOTS = {"NanoSpeedrunConfig", "NanoSpeedrunForCausalLM"}
REPLACED = {"GPT.forward", "Ngrams.forward", "Pointer.forward"}  # by what modeling.py does


def names_in(node: ast.AST) -> set[str]:
    """Names in a piece of code; with a dot before them attributes, keywords and short texts."""
    found = set()
    for part in ast.walk(node):
        text = getattr(part, "value", None) if isinstance(part, ast.Constant) else None
        dotted = getattr(part, "attr", None), getattr(part, "arg", None), text
        found.update(f".{name}" for name in dotted if isinstance(name, str))
        if isinstance(part, ast.Name):
            found.add(part.id)
    return found


def defined_by(node: ast.stmt) -> list[str]:
    """The names that a statement of a module binds."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return [node.name] if hasattr(node, "name") else []


def is_operator(node: ast.AST) -> bool:
    """Whether it is one of the training's own torch operators, which no export reaches."""
    names = set().union(*map(names_in, getattr(node, "decorator_list", [])))
    return any(name.endswith("operator") for name in names)


def kept_members(node: ast.stmt, wanted: set[str]) -> list[ast.stmt]:
    """Of a class the parts that are used, of settings the fields as well; of anything else itself."""
    if not isinstance(node, ast.ClassDef):
        return [node]
    settings = any("dataclass" in names_in(one) for one in node.decorator_list)

    def used(part: ast.stmt) -> bool:
        if isinstance(part, ast.AnnAssign):
            return not settings or f".{part.target.id}" in wanted
        if not isinstance(part, ast.FunctionDef):
            return True
        always = node.name in ROOTS or part.name in ("forward", "backward") or part.name.startswith("__")
        return f"{node.name}.{part.name}" not in REPLACED and (always or f".{part.name}" in wanted)

    return [part for part in node.body if used(part)]


def reached(nodes: list[ast.stmt], roots: set[str]) -> set[str]:
    """All names that the definitions of the roots lead to."""
    wanted, size = set(roots), -1
    while size != len(wanted):
        size = len(wanted)
        for node in nodes:
            if wanted.isdisjoint(defined_by(node)) or isinstance(node, ast.Import | ast.ImportFrom):
                continue
            parts = kept_members(node, wanted)
            for key in ("bases", "decorator_list"):
                parts = parts + getattr(node, key, [])
            wanted.update(*map(names_in, parts))
    return wanted


def text_of(node: ast.stmt, lines: list[str], wanted: set[str]) -> str:
    """The lines of a statement, without the parts of a class that are not kept, and remarks to our own tests."""
    def span(part: ast.stmt) -> range:
        first = min([part.lineno, *(one.lineno for one in getattr(part, "decorator_list", []))])
        return range(first - 1, part.end_lineno)

    members, left_out = kept_members(node, wanted), set()
    for part in node.body if isinstance(node, ast.ClassDef) else []:
        left_out.update([] if part in members else span(part))
    text = [lines[i] for i in span(node) if i not in left_out]
    ours = "# differs from", "# ---"
    return "\n".join(line for line in text if not line.strip().startswith(ours)).strip("\n")


def modeling_code(script: ModuleType) -> str:
    """Source of a module with the script's model and the classes that transformers asks for."""
    sources = [Path(path).read_text(encoding="utf-8") for path in (script.__file__, WRAPPER)]
    (own, wrapper), lines = map(ast.parse, sources), [source.splitlines() for source in sources]
    ours = {name for node in wrapper.body for name in defined_by(node) if not isinstance(node, ast.ImportFrom)}
    theirs = [node for node in own.body if ours.isdisjoint(defined_by(node)) and not is_operator(node)]
    ends = [node for node in wrapper.body if getattr(node, "module", "") != "train_gpt"]
    wanted = reached(theirs + ends, ROOTS)
    imports, texts = {"from __future__ import annotations": None}, []
    for nodes, source in ((theirs, lines[0]), (ends, lines[1])):
        for node in nodes:
            if wanted.isdisjoint(defined_by(node)) or "__future__" == getattr(node, "module", ""):
                continue
            text = text_of(node, source, wanted)
            if isinstance(node, ast.Import | ast.ImportFrom):
                imports[text] = None
            else:
                texts.append(text)
    missing = [name for node in own.body if is_operator(node) for name in defined_by(node) if name in wanted]
    texts += [f"{' = '.join(missing)} = None  # operators of the training"] if missing else []
    head = f'"""The model of {Path(script.__file__).name}, for transformers; made by export.py of nanospeedrun."""'
    return "\n".join([head, *imports, ""]) + "\n\n" + "\n\n\n".join(texts) + "\n"
