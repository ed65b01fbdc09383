"""Finding things by name: the file's name is its key.

``formats/nf4.py`` is found as ``get("format", "nf4")``: no list to edit. A third party adds the same
with an entry point in the group ``poise.formats`` (``poise.solvers``, ...). A *spec* is a name with
arguments, written as a call, ``int(bits=4, group=64)``: it is what recipes, plans and manifests hold.
"""

import ast
import dataclasses
import difflib
import importlib
import inspect
import pkgutil
import re
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from poise.core.errors import UsageError

KINDS = {
    "format": ("poise.formats", "poise.core.format", "Format"),
    "solver": ("poise.solvers", "poise.core.solver", "Solver"),
    "transform": ("poise.transforms", "poise.core.transform", "Transform"),
    "exporter": ("poise.exporters", "poise.core.exporter", "Exporter"),
    "engine": ("poise.engines", "poise.core.engine", "Engine"),
    "metric": ("poise.metrics", "poise.core.metric", "Metric"),
    "collector": ("poise.calibration.collectors", "poise.core.collector", "Collector"),
}
"""kind -> (package that holds one file a thing, module and name of the base class)."""


def _package(kind: str) -> ModuleType:
    if kind not in KINDS:
        raise UsageError(f"unknown kind {kind!r}: one of {', '.join(KINDS)}")
    return importlib.import_module(KINDS[kind][0])


def _base(kind: str) -> type:
    _, module, name = KINDS[kind]
    base: type = getattr(importlib.import_module(module), name)
    return base


def _files(kind: str) -> frozenset[str]:
    """Names that the files of a kind's package give."""
    folders = tuple(_package(kind).__path__)
    return _names_in(folders, tuple(Path(folder).stat().st_mtime_ns for folder in folders))


@cache
def _names_in(folders: tuple[str, ...], changed: tuple[int, ...]) -> frozenset[str]:
    """Looked up once until a folder changes: every matrix asks for its solver and its format."""
    modules = pkgutil.iter_modules(folders)
    return frozenset(_key(module.name) for module in modules if not module.name.startswith("_"))


def _key(name: str) -> str:
    """``second_moment`` is written ``second-moment``; types of llama.cpp, such as ``q4_0``, stay as they are."""
    return re.sub(r"(?<=[a-z])_", "-", name)


def names(kind: str) -> list[str]:
    """Every name of a kind, sorted: the files of its folder and the entry points of third parties."""
    group = _package(kind).__name__
    return sorted({*_files(kind), *(point.name for point in entry_points(group=group))})


def get(kind: str, name: str) -> type[Any]:
    """The class that a name stands for.

    Args:
        kind: one of ``KINDS``.
        name: the file's name, with ``-`` or ``_``.

    Raises:
        UsageError: nothing of that name; the message offers the nearest one.
    """
    key = _key(name)
    if key in _files(kind):
        module = importlib.import_module(f"{KINDS[kind][0]}.{key.replace('-', '_')}")
        base = _base(kind)
        found = [
            item
            for item in vars(module).values()
            if inspect.isclass(item)
            and issubclass(item, base)
            and item.__module__ == module.__name__
            and not item.__name__.startswith("_")
        ]
        if len(found) != 1:
            raise UsageError(
                f"{module.__file__} must define exactly one public {base.__name__}, it defines {len(found)}"
            )
        cls: type[Any] = found[0]
        return cls
    for point in entry_points(group=KINDS[kind][0]):
        if _key(point.name) == key:
            loaded: type[Any] = point.load()
            return loaded
    known = names(kind)
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"no {kind} named {name!r}: {hint}there is {', '.join(known)}")


def name_of(thing: object) -> str:
    """The registry name of an instance or class: its file's name."""
    cls = thing if inspect.isclass(thing) else type(thing)
    return _key(cls.__module__.rpartition(".")[2])


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Splits ``"int(bits=4, group=64)"`` into ``("int", {"bits": 4, "group": 64})``.

    Raises:
        UsageError: not a name or a call with literal keyword arguments.
    """
    name, bracket, _ = spec.strip().partition("(")
    if not bracket:
        return name, {}
    try:
        call = ast.parse("_" + spec.strip()[len(name) :], mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(kw.arg is None for kw in call.keywords):
            raise ValueError("arguments must be named")
        arguments = {str(kw.arg): ast.literal_eval(kw.value) for kw in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise UsageError(
            f"cannot read {spec!r} ({error}): write it as a name, or as a call with named values, "
            "for instance int(bits=4, group=64)"
        ) from error
    return name, arguments


def build(kind: str, spec: str) -> Any:
    """The instance that a spec stands for; every bad argument is a ``UsageError``.

    Solvers joined by ``->`` are a ``Chain``.
    """
    if kind == "solver" and "->" in spec:
        from poise.core.solver import Chain

        return Chain(steps=tuple(build(kind, step) for step in spec.split("->")))
    name, arguments = parse_spec(spec)
    if kind == "format":
        name, arguments = _with_bits(name, arguments)
    cls = get(kind, name)
    try:
        return cls(**arguments)
    except TypeError as error:
        fields = [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
        raise UsageError(f"{spec}: {error}; {name} takes {', '.join(fields) or 'no arguments'}") from error


def _with_bits(name: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """``nf4`` is short for ``nf(bits=4)``, ``int8(group=64)`` for ``int(bits=8, group=64)``."""
    short = re.fullmatch(r"([a-z]+)(\d+)", name)
    if short and _key(name) not in names("format") and short[1] in names("format"):
        return short[1], {"bits": int(short[2]), **arguments}
    return name, arguments


def spec_of(thing: Any) -> str:
    """The shortest spec that builds an equal instance: only fields that differ from their default."""
    if isinstance(steps := getattr(thing, "steps", None), tuple):
        return " -> ".join(spec_of(step) for step in steps)
    given = [
        f"{field.name}={getattr(thing, field.name)!r}"
        for field in (dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ())
        if getattr(thing, field.name) != field.default
    ]
    return f"{name_of(thing)}({', '.join(given)})" if given else name_of(thing)


def fitting_formats(columns: int, bits: float) -> list[str]:
    """Formats with defaults for every field, within one bit of ``bits``, whose blocks divide rows of ``columns``."""
    found = []
    for name in names("format"):
        cls = get("format", name)
        if any(field.default is dataclasses.MISSING for field in dataclasses.fields(cls)):
            continue
        format = cls()
        if abs(format.bits - bits) <= 1 and columns % format.block == 0:
            found.append(name)
    return found
