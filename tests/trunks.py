"""Trunks small enough for tests."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, dict[str, Any]] = {
    "moe_topk": {"experts": 3, "top_k": 2, "expert_width": 8, "gate": (8,)},
    "soft_modules": {"widths": (16, 16), "experts": 2, "encoder": (16,), "gate": (16,)},
}


def small(kind: str, *widths: int) -> dict[str, Any]:
    """Fields of ``TrunkConfig`` for a trunk of this kind, of these widths where it does not need others."""
    return {"kind": kind, "widths": widths, **SMALL.get(kind, {})}
