"""Networks: perception (per group) -> trunk (shared) -> heads (per task)."""
