"""Recipes as YAML: ordered rules over roles and names. An unknown key is an error."""

import difflib
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from poise.core.comparison import GATES
from poise.core.errors import UsageError
from poise.core.plan import Option, Recipe, Rule
from poise.core.registry import build


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Option(_Strict):
    format: str
    activations: int | None = None


class _Rule(_Strict):
    role: str = "*"
    name: str = "*"
    options: list[_Option | str] = []
    keep: bool = False
    solver: str = "rtn"
    optional: bool = False


class _Recipe(_Strict):
    description: str
    rules: list[_Rule]
    gates: dict[str, float] = {}
    transforms: list[str] = []
    tune: str | None = None
    tune_up_to: int | None = None
    tokens: int | None = None


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with Poise."""
    return sorted(
        file.name.removesuffix(".yaml") for file in _folder().iterdir() if file.name.endswith(".yaml")
    )


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A shipped recipe by name, or a YAML file by path.

    Raises:
        UsageError: there is none, or it is not a valid recipe; names the file and the place.
    """
    text = str(name_or_path)
    if text in shipped_recipes():
        return _parse((_folder() / f"{text}.yaml").read_text(encoding="utf-8"), text, f"recipe {text}")
    path = Path(text)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            return _parse(path.read_text(encoding="utf-8"), path.stem, str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: cannot be read ({error})") from error
    near = difflib.get_close_matches(text, shipped_recipes(), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(
        f"no recipe {text!r}: {hint}there is {', '.join(shipped_recipes())}, or give a .yaml file"
    )


def _folder() -> Any:
    return resources.files("poise.recipes")


def _parse(text: str, name: str, where: str) -> Recipe:
    try:
        data = _Recipe.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: not YAML ({error})") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{where}: {place}: {first['msg']}{_nearest(first)}") from error
    for gate in data.gates:
        if gate not in GATES:
            raise UsageError(f"{where}: gates.{gate}: unknown gate; there is {', '.join(GATES)}")
    for spec in data.transforms:
        try:
            build("transform", spec)
        except UsageError as error:
            raise UsageError(f"{where}: transforms: {error}") from error
    rules = tuple(_rule(rule, f"{where}: rule {number}") for number, rule in enumerate(data.rules, 1))
    return Recipe(
        name=name,
        description=data.description,
        rules=rules,
        gates=data.gates,
        transforms=tuple(data.transforms),
        tune=data.tune,
        tune_up_to=data.tune_up_to,
        tokens=data.tokens,
    )


def _nearest(error: Any) -> str:
    if error["type"] != "extra_forbidden":
        return ""
    known = [*_Recipe.model_fields, *_Rule.model_fields, *_Option.model_fields]
    near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
    return f"; unknown key, did you mean {near[0]!r}?" if near else "; unknown key"


def _rule(rule: _Rule, where: str) -> Rule:
    if rule.keep == bool(rule.options):
        raise UsageError(f"{where}: give either options or keep: true")
    options = tuple(
        Option(format=option)
        if isinstance(option, str)
        else Option(format=option.format, activations=option.activations)
        for option in rule.options
    )
    try:
        for option in options:
            build("format", option.format)
        build("solver", rule.solver)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    return Rule(role=rule.role, name=rule.name, options=options, solver=rule.solver, optional=rule.optional)
