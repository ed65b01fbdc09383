"""The wish (`Recipe`) and the fact (`Plan`): one row a tensor, with the reason."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to store a tensor: a format and what its inputs are rounded to at run time.

    Attributes:
        format: spec of a number format.
        activations: bits of the dynamic per-token integer activations, None to leave them alone.
    """

    format: str
    activations: int | None = None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Options, in order of preference, for the tensors that match.

    Attributes:
        role: shell pattern over roles.
        name: shell pattern over tensor names.
        options: tried in order; the first that the exporter accepts is planned. Empty: keep as it is.
        solver: spec of the solver that finds the codes.
        optional: the rule may match no tensor of the model.
    """

    role: str = "*"
    name: str = "*"
    options: tuple[Option, ...]
    solver: str = "rtn"
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An ordered list of rules: the first that matches a tensor decides.

    Attributes:
        transforms: specs of what is done to weights before they are rounded, in this order.
        tune: spec of the training that comes after it, or None.
        tune_up_to: weights of the largest model that is trained, since training holds all of it in memory; None for any.
        tokens: of calibration text; None for what the solvers need.
    """

    name: str
    description: str
    rules: tuple[Rule, ...]
    gates: dict[str, float] = field(default_factory=dict)
    transforms: tuple[str, ...] = ()
    tune: str | None = None
    tune_up_to: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """What happens to one matrix.

    Attributes:
        format: spec of its number format; None for a tensor that is kept as it is.
        solver: spec of its solver, None when kept.
        activations: bits of its dynamic integer activations, None when they are left alone.
        reason: why this and not another.
    """

    name: str
    role: str
    rows: int
    columns: int
    format: str | None
    solver: str | None
    activations: int | None
    reason: str

    @property
    def kept(self) -> bool:
        return self.format is None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every matrix of a model, in the model's order, for one exporter; ``transforms``, ``tune`` and
    ``tokens`` as in the recipe.

    Attributes:
        untrained: why the recipe's training is not planned; None if it is, or if there is none.
    """

    recipe: str
    exporter: str
    rows: tuple[PlanRow, ...]
    transforms: tuple[str, ...] = ()
    tune: str | None = None
    untrained: str | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        seen = [row.name for row in self.rows]
        if len(set(seen)) != len(seen):
            raise ValueError("a plan has one row a tensor; some tensor has two")

    def row(self, name: str) -> PlanRow | None:
        return next((row for row in self.rows if row.name == name), None)

    @property
    def quantized(self) -> list[PlanRow]:
        return [row for row in self.rows if not row.kept]

    def to_json(self) -> str:
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=1)

    @property
    def hash(self) -> str:
        """sha256 of the JSON form."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Raises ``ValueError`` for anything that is not a plan of this schema version."""
        try:
            data: dict[str, Any] = json.loads(text)
            if data.pop("schema_version") != SCHEMA_VERSION:
                raise ValueError(f"only schema_version {SCHEMA_VERSION} is known")
            rows = tuple(PlanRow(**row) for row in data.pop("rows"))
            transforms = tuple(data.pop("transforms", ()))
            return cls(rows=rows, transforms=transforms, **data)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a plan: {error}") from error
