"""One field chooses the trunk; the others give it its size."""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal[
    "shared", "single_head", "multi_head", "moe", "moore", "moe_topk", "soft_modules", "care", "paco", "film"
]

_PLAIN = ("widths", "activation", "layer_norm", "blocks")
FIELDS: dict[str, tuple[str, ...]] = {
    "shared": _PLAIN,
    "single_head": _PLAIN,
    "multi_head": _PLAIN,
    "moe": ("widths", "activation", "experts", "channels"),
    "moore": ("widths", "activation", "experts", "channels"),
    "moe_topk": ("widths", "activation", "experts", "top_k", "gate", "expert_width", "balance"),
    "soft_modules": ("widths", "experts", "encoder", "gate"),
    "care": ("widths", "activation", "layer_norm", "experts", "encoder", "context"),
    "paco": ("widths", "activation", "experts"),
    "film": ("widths", "activation", "layer_norm", "encoder", "context", "modulation"),
}
"""What each kind reads besides ``kind``."""


class TrunkConfig(BaseModel):
    """Which trunk, and its size. A field that the kind does not read must be left at its default."""

    model_config = ConfigDict(extra="forbid")

    kind: Kind = Field(
        default="multi_head",
        description="shared: task one-hot at the input, one head; single_head: one-hot at the features, one head; "
        "multi_head: no one-hot, a head per task; moe, moore: experts summed with task weights, moore's orthonormal, a "
        "head per task; moe_topk: experts gated per row; soft_modules, care, paco, film: as published, one head",
    )
    widths: tuple[int, ...] = Field(default=(), description="hidden layers; () hands the latents straight to the heads")
    activation: Literal["relu", "tanh"] = "relu"
    layer_norm: bool = False
    blocks: int = Field(default=0, ge=0, description="residual blocks of the last width behind the layers (BRC)")
    experts: int = Field(
        default=4,
        ge=1,
        description="K: experts (MOORE: 2/3/4 for MT3/5/7, 4/6 for MT10/50; MENTOR: 16), modules per layer "
        "(soft_modules: 2 or 4), encoders (CARE: 4 to 10), parameter sets (PaCo: 5 for MT10, 20 for MT50)",
    )
    channels: tuple[int, ...] = Field(
        default=(), description="moe, moore: 2x2 convolutions in front of each expert; needs perception.channels=[]"
    )
    top_k: int = Field(default=4, ge=1, description="moe_topk: experts that serve a row (MENTOR: 4)")
    expert_width: int = Field(default=256, ge=1, description="moe_topk: hidden layer of an expert (MENTOR: 256)")
    gate: tuple[int, ...] | None = Field(
        default=None, description="hidden layers of the gate; None: moe_topk 256 (MENTOR), soft_modules 256, 256"
    )
    balance: float = Field(
        default=0.002, ge=0, description="moe_topk: weight of load variance plus gate entropy (MENTOR's setting)"
    )
    encoder: tuple[int, ...] | None = Field(
        default=None, description="layers in front of widths; None: care, film 50, 50; soft_modules 400, 400"
    )
    context: int = Field(default=50, ge=1, description="care, film: width of a task's embedding (50)")
    modulation: Literal["channel", "scalar"] = Field(
        default="channel", description="film: a factor and a shift per channel, or per layer (MTRL's code bases)"
    )

    @property
    def recordable(self) -> bool:
        """Whether a CUDA graph can hold it: not where the host must know which experts the rows chose."""
        return self.kind != "moe_topk"

    @model_validator(mode="after")
    def _only_what_counts(self) -> Self:
        read = FIELDS[self.kind]
        for name, field in type(self).model_fields.items():
            if name != "kind" and name not in read and getattr(self, name) != field.default:
                kinds = ", ".join(kind for kind in get_args(Kind) if name in FIELDS[kind])
                raise ValueError(f"kind={self.kind} does not read {name}; {kinds} do(es): leave it out")
        if self.kind == "moe_topk" and self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} of experts={self.experts}: choose at most as many as there are")
        return self
