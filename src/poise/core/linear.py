"""A weight's address in a checkpoint."""

from dataclasses import dataclass

ROLES = (
    "embedding",
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.qkv",
    "attention.o",
    "ffn.gate",
    "ffn.up",
    "ffn.gate_up",
    "ffn.down",
    "expert.gate",
    "expert.up",
    "expert.gate_up",
    "expert.down",
    "router",
    "head",
    "other",
)
"""What a weight does. Fused projections have a role of their own; ``other`` is a linear layer whose
place is not recognised. Recipes match roles with shell patterns (``attention.*``)."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One matrix of a checkpoint that a plan may quantize.

    Attributes:
        name: the tensor's name in the checkpoint.
        rows: outputs of the layer; for a fused stack of experts, outputs times experts.
        columns: inputs of the layer: quantization groups run along them.
        role: one of ``ROLES``.
        block: index of the decoder block, None outside the stack (embedding, head).
        input_group: weights with the same value read the same activation.
        experts: experts in a fused [experts, out, in] tensor, None for one matrix.
        transposed: the file stores [in, out] (GPT-2's Conv1D); readers hand out [out, in].
        tied: an embedding that also serves as the output head.
    """

    name: str
    rows: int
    columns: int
    role: str
    block: int | None
    input_group: str
    experts: int | None = None
    transposed: bool = False
    tied: bool = False

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"{self.name}: unknown role {self.role!r}, one of {ROLES}")
        if self.experts is not None and self.rows % self.experts:
            raise ValueError(f"{self.name}: {self.rows} rows do not split into {self.experts} experts")

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, columns], as solvers and formats see the weight."""
        return self.rows, self.columns

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    @property
    def roles(self) -> tuple[str, ...]:
        """Every role it plays: a tied embedding is also the head."""
        return (self.role, "head") if self.tied else (self.role,)
