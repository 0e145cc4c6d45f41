"""The dataclasses of a command, read from source without importing torch.

`from trl import SFTConfig` takes a core 10 s on a slow machine: it imports torch, peft and bitsandbytes, which a
dataclass of flags doesn't need. Here only the statement that defines a name is run, taken from its module's source.
Each name in it is found in the same way when it is first used. So the fields are those of the installed version.
Methods of dataclasses, `__post_init__` among them, are left out. Anything that can't be read this way raises an
exception, and the caller imports the module.
"""

import ast
import builtins
import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any


def argument_names(command: str) -> list[str]:
    """The names of the dataclasses in a command's `parse(__file__, ...)`.

    Args:
        command: the file of the command.
    """
    for node in ast.walk(ast.parse(Path(command).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "parse":
            return [argument.id for argument in node.args[1:] if isinstance(argument, ast.Name)]
    raise ValueError(f"{command} calls no parse.")


def argument_types(command: str) -> list[type]:
    """The dataclasses in a command's `parse(__file__, ...)`, read without its imports.

    Args:
        command: the file of the command.
    """
    names = _Names("__main__", Path(command))
    return [names[name] for name in argument_names(command)]


class _Names(dict[str, Any]):
    """The global names of a module. The statement that binds a name runs when the name is first looked up."""

    def __init__(self, module: str, file: Path) -> None:
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        own_builtins = {**vars(builtins), "__import__": _import}
        super().__init__(__name__=module, __package__=package, __file__=str(file), __builtins__=own_builtins)
        self.unbound = dict(_bindings(ast.parse(file.read_text(encoding="utf-8")).body))

    def __missing__(self, name: str) -> Any:
        statement = self.unbound.pop(name)  # KeyError: Python goes on to the builtins
        if isinstance(statement, ast.If):
            test = ast.unparse(statement.test)
            # a lazy package provides what it declares for type checkers
            taken = test.endswith("TYPE_CHECKING") or eval(test, self)
            self.unbound = {**self.unbound, **dict(_bindings(statement.body if taken else statement.orelse))}
            return self[name]
        for node in ast.walk(statement):  # only the annotations of fields are of use
            if isinstance(node, ast.FunctionDef):
                node.returns = None
            elif isinstance(node, ast.arg):
                node.annotation = None
        if isinstance(statement, ast.ClassDef):
            statement.body = [part for part in statement.body if getattr(part, "name", "") != "__post_init__"]
            for used in _names_at_definition(statement):  # a class body doesn't ask `__missing__`
                if used in self.unbound:
                    self[used]
        exec(compile(ast.Module([statement], []), self["__file__"], "exec", dont_inherit=True), self)
        return dict.__getitem__(self, name)


def _bindings(statements: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """The names that statements bind, each with its statement."""
    for statement in statements:
        match statement:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name, statement
            case ast.Assign(targets=targets):
                for part in (part for target in targets for part in ast.walk(target)):
                    if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                        yield part.id, statement
            case ast.Import(names=names):
                for alias in names:  # one at a time: the others may be slow
                    name = alias.asname or alias.name.partition(".")[0]
                    yield name, ast.copy_location(ast.Import([alias]), statement)
            case ast.ImportFrom(module=module, names=names, level=level):
                for alias in names:
                    name = alias.asname or alias.name
                    yield name, ast.copy_location(ast.ImportFrom(module, [alias], level), statement)
            case ast.If(body=body, orelse=orelse):
                yield from ((name, statement) for name, _ in _bindings([*body, *orelse]))
            case ast.Try(body=body) | ast.With(body=body):
                yield from _bindings(body)


def _names_at_definition(node: ast.AST) -> Iterator[str]:
    """The names that a class statement looks up when it runs: all but those in the bodies of its methods."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield node.id
    for field, value in ast.iter_fields(node):
        if not (field == "body" and isinstance(node, ast.FunctionDef | ast.Lambda)):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _names_at_definition(child)


class _Module:
    """Stands for a module that is read and not imported."""

    def __init__(self, name: str, file: Path) -> None:
        self._name, self._names = name, _Names(name, file)

    def __getattr__(self, name: str) -> Any:
        try:
            return self._names[name]
        except KeyError:
            return _module(f"{self._name}.{name}")


@functools.cache
def _module(name: str) -> Any:
    if type(sys.modules.get(name)) is ModuleType:  # imported already, and no lazy package
        return sys.modules[name]
    top, *inner = name.split(".")
    spec = importlib.util.find_spec(top)
    for folder in (spec and spec.submodule_search_locations) or []:
        path = Path(folder, *inner)
        for file in (path / "__init__.py", path.parent / f"{path.name}.py"):
            if file.is_file():
                return _Module(name, file)
    return importlib.import_module(name)  # no source, or a single file


def _import(name: str, names: Any = None, local: Any = None, wanted: Any = (), level: int = 0) -> Any:
    """What `import` does in the statements that run here."""
    if level:
        name = importlib.util.resolve_name("." * level + name, names["__package__"])
    if name.partition(".")[0] in sys.stdlib_module_names:
        return importlib.__import__(name, names, local, wanted)
    return _module(name if wanted else name.partition(".")[0])
