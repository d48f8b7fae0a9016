"""The checker that runs the annotations in tests: beartype, with an int allowed where a float is asked (PEP 484)."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Make ``check`` when it is asked for: ``tests.bench`` runs on machines that have no beartype."""
    if name != "check":
        raise AttributeError(name)
    from beartype import BeartypeConf, beartype

    globals()["check"] = made = beartype(conf=BeartypeConf(is_pep484_tower=True))
    return made
