"""GRAD: find defects from normal pictures alone."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .grad import GRAD

__version__ = "0.2.0"
__all__ = ["GRAD"]


def __getattr__(name: str) -> Any:
    "`grad_nb.GRAD`, which loads torch, is imported when it is asked for."
    if name == "GRAD":
        from .grad import GRAD

        return GRAD
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
