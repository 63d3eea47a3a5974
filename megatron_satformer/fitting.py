"""What fits into what, and how to tell that it does not. Must not know: what is fitted."""

from argparse import Namespace


def flag(name: str) -> str:
    """The flag of an option."""
    return f"--{name.replace('_', '-')}"


def near(value: int, of: int) -> str:
    """The multiples next to a value, to be told."""
    below, above = value // of * of, -(-value // of) * of
    return f"{below} or {above}" if below else str(above)


def require_multiple(args: Namespace, name: str, by: str, way_out: str = "") -> None:
    """Refuses an option that is no multiple of another.

    Args:
        args: with both.
        name: of the multiple.
        by: of the divisor.
        way_out: what else can be done, beside another divisor.

    Raises:
        ValueError: naming both, and the divisors that fit.
    """
    value, divisor = getattr(args, name), getattr(args, by)
    if value % divisor:
        fitting = [str(n) for n in range(1, min(value, 128) + 1) if value % n == 0]
        raise ValueError(
            f"{name} ({value}) must be a multiple of {by} ({divisor}). Use {flag(by)} "
            f"{', '.join(fitting)}" + f", {way_out}" * bool(way_out) + "."
        )
