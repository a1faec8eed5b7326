"""What a field of a preset may be, and a complaint that names it."""

from __future__ import annotations

from training.errors import UserError


def require(condition: bool, name: str, complaint: str) -> None:
    """Raises `UserError` about that field if not."""
    if not condition:
        raise UserError(f"{name} {complaint}")


def require_name(name: str, value: str) -> None:
    good = value and len(value) <= 64 and all(c.isascii() and (c.isalnum() or c in "-_") for c in value)
    require(bool(good), name, f"= {value!r} must be 1 to 64 letters, digits, '-' or '_'")
