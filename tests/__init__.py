"""The checker that runs the annotations in tests: beartype, with an int allowed where a float is asked (PEP 484)."""

import functools
from typing import Any


def __getattr__(name: str) -> Any:
    """Make ``check`` when it is asked for: ``tests.bench`` runs on machines that have no beartype."""
    if name != "check":
        raise AttributeError(name)
    from beartype import BeartypeConf, beartype
    from jaxtyping import _decorator

    if hasattr(_decorator, "_make_fn_with_signature") and hasattr(_decorator, "_apply_typechecker"):
        _make_once(_decorator)
    globals()["check"] = made = beartype(conf=BeartypeConf(is_pep484_tower=True))
    return made


def _make_once(decorator: Any) -> None:
    """Let jaxtyping make the checks of a nested function once, not at each call of the one around it: a twentieth of the time.

    A check is a function of annotations alone: those of one name with equal annotations have one.
    """
    make, apply = decorator._make_fn_with_signature, decorator._apply_typechecker
    apply_once = functools.cache(apply)
    made: dict[Any, Any] = {}

    def make_once(name: str, qualname: str, module: str, signature: Any, output: bool) -> Any:
        if "<locals>" not in qualname:
            return make(name, qualname, module, signature, output)
        annotated = [(p.name, p.kind, p.annotation, p.default is p.empty) for p in signature.parameters.values()]
        key = (qualname, module, output, signature.return_annotation, *annotated)
        try:
            if key not in made:
                made[key] = make(name, qualname, module, signature, output)
            return made[key]
        except TypeError:  # an annotation without a hash
            return make(name, qualname, module, signature, output)

    def check(checker: Any, function: Any) -> Any:
        return (apply_once if "<locals>" in function.__qualname__ else apply)(checker, function)

    decorator._make_fn_with_signature, decorator._apply_typechecker = make_once, check
