"""(Recipe, linears, what the exporter accepts) -> Plan: one row a matrix, with the reason.

The first rule that matches a matrix decides. Its options are tried in order, and the first that the
exporter stores exactly is planned; if it takes none, the matrix is kept, and the row says why.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from poise.core.errors import UsageError
from poise.core.format import Format
from poise.core.linear import Linear
from poise.core.plan import Plan, PlanRow, Recipe, Rule
from poise.core.registry import build, spec_of

Accepts = Callable[[Linear, Format, int | None], str | None]


def make_plan(
    recipe: Recipe, linears: Sequence[Linear], exporter: str, accepts: Accepts, scale_dtype: str
) -> Plan:
    """Settles a recipe for a model and an exporter.

    Args:
        accepts: the exporter's answer: None, or the reason why it cannot store the format.
        scale_dtype: what ``scale="auto"`` becomes in this container.

    Raises:
        UsageError: a rule that is not marked optional matches no matrix of the model.
    """
    used: set[Rule] = set()
    rows = []
    for linear in linears:
        rule = next((rule for rule in recipe.rules if _matches(rule, linear)), None)
        if rule is not None:
            used.add(rule)
        rows.append(_row(linear, rule, accepts, scale_dtype))
    for number, rule in enumerate(recipe.rules, 1):
        if rule not in used and not rule.optional:
            raise UsageError(
                f"recipe {recipe.name}: rule {number} (role {rule.role!r}, name {rule.name!r}) decides for no "
                "matrix of this model: it matches nothing, or an earlier rule takes all it matches. Correct it, "
                "or mark it optional: true"
            )
    untrained = _untrained(recipe, linears)
    return Plan(
        recipe=recipe.name,
        exporter=exporter,
        rows=tuple(rows),
        transforms=recipe.transforms,
        tune=None if untrained else recipe.tune,
        untrained=untrained,
        tokens=recipe.tokens,
    )


def check_plan(plan: Plan, linears: Sequence[Linear], accepts: Accepts, scale_dtype: str) -> Plan:
    """A plan that was read from a file, with its formats settled; it must fit the model and the exporter.

    Raises:
        UsageError: names the first matrix that does not fit.
    """
    wanted, present = {row.name for row in plan.rows}, {linear.name for linear in linears}
    if wanted != present:
        name = sorted(wanted ^ present)[0]
        raise UsageError(
            f"the plan is for another model: {name} is only in the {'plan' if name in wanted else 'model'}"
        )
    rows = [plan.row(linear.name) for linear in linears]
    settled = [
        _settled(row, linear, accepts, scale_dtype) for row, linear in zip(rows, linears, strict=True) if row
    ]
    return replace(plan, rows=tuple(settled))


def _untrained(recipe: Recipe, linears: Sequence[Linear]) -> str | None:
    """Why a model is not trained although the recipe would."""
    weights, most = sum(linear.numel for linear in linears), recipe.tune_up_to
    if recipe.tune is None or most is None or weights <= most:
        return None
    return f"the recipe trains models of up to {most:,} weights, this has {weights:,}"


def _settled(row: PlanRow, linear: Linear, accepts: Accepts, scale_dtype: str) -> PlanRow:
    if row.format is None:
        return row
    format = build("format", row.format).resolve(scale_dtype)
    build("solver", str(row.solver))
    reason = format.misfit(*linear.shape) or accepts(linear, format, row.activations)
    if reason:
        raise UsageError(f"{row.name}: the plan asks for {row.format}, but {reason}")
    return replace(row, format=spec_of(format))


def _matches(rule: Rule, linear: Linear) -> bool:
    return any(fnmatchcase(role, rule.role) for role in linear.roles) and fnmatchcase(linear.name, rule.name)


def _row(linear: Linear, rule: Rule | None, accepts: Accepts, scale_dtype: str) -> PlanRow:
    if rule is None:
        return _kept(linear, "no rule of the recipe matches")
    if not rule.options:
        return _kept(linear, "the recipe keeps it")
    refused: list[str] = []
    for option in rule.options:
        format = build("format", option.format).resolve(scale_dtype)
        reason = format.misfit(*linear.shape) or accepts(linear, format, option.activations)
        if reason is None:
            return PlanRow(
                name=linear.name,
                role=linear.role,
                rows=linear.rows,
                columns=linear.columns,
                format=spec_of(format),
                solver=spec_of(build("solver", rule.solver)),
                activations=option.activations,
                reason="; ".join([f"recipe rule for role {rule.role}", *refused]),
            )
        refused.append(f"not {option.format}{_with(option.activations)}: {reason}")
    return _kept(linear, "; ".join(refused))


def _with(activations: int | None) -> str:
    return "" if activations is None else f" with {activations}-bit activations"


def _kept(linear: Linear, reason: str) -> PlanRow:
    return PlanRow(
        name=linear.name,
        role=linear.role,
        rows=linear.rows,
        columns=linear.columns,
        format=None,
        solver=None,
        activations=None,
        reason=reason,
    )
