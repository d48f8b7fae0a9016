"""The one place that touches neural-tangents, and keeps it alive on current JAX.

neural-tangents 0.6.5 (Novak et al., arXiv 1912.02803 and 2206.08720) is the last release; it was written for JAX 0.4
and does not import on anything newer than 0.5. ``load`` returns it in working order:

- its modules import through a private ``__import__`` that hands them *overlays*: views of ``jax``, ``jax.core`` and
  ``jax.interpreters.ad`` in which the names that moved or went are filled in. JAX itself is never changed;
- its ``experimental`` package, the only importer of TensorFlow, is an empty stand-in: ``empirical_ntk_fn_tf`` is lost
  and nothing else;
- functions whose private JAX machinery is gone are rebuilt on ``jax.linearize``, ``jax.make_jaxpr`` and
  ``jax.linear_transpose``: ``linear_jaxpr`` next door prepares models for structured derivatives, which so learn
  ``jax.checkpoint``, ``jnp.split``, ``custom_vjp`` and parameters used in several ways;
- predictions of singular kernels are finite.

Nothing happens at import: neural-tangents may be absent, and then only ``load`` raises.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import importlib.metadata
import logging
import math
import re
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.core
import jax.extend.core
import jax.extend.source_info_util
import jax.interpreters.ad
import jax.numpy as jnp
import numpy as np

from ntk_prefix.kernels.linear_jaxpr import equation_jvp, equation_vjp, linear_jaxpr

__all__ = ["TESTED_JAX", "UntestedJaxWarning", "load"]

TESTED_JAX = ("0.10.2", "0.11.2", "0.12.0.1")
"""The JAX versions that the tests of this adapter were run on."""

_OLDEST_JAX = "0.10.2"
_NEURAL_TANGENTS = "0.6.5"
_INSTALL = f"pip install --no-deps neural-tangents=={_NEURAL_TANGENTS} frozendict"

_log = logging.getLogger(__name__)
_lock = threading.RLock()


class UntestedJaxWarning(UserWarning):
    """neural-tangents is about to run on a JAX that its adapter was not tested with."""


def load() -> ModuleType:
    """Import neural-tangents, adapted to the JAX that is installed.

    The result is the package itself, complete: ``empirical_ntk_fn`` with all four implementations, ``linearize``,
    ``taylor_expand``, ``predict``, ``batch``, ``stax``, ``monte_carlo_kernel_fn``. Any thread may
    call it, any number of times. Afterwards a plain ``import neural_tangents`` finds it too.

    Returns:
        The module ``neural_tangents``.

    Raises:
        ImportError: it (or frozendict) is not installed, is not 0.6.5, JAX is older than 0.10.2, or it was imported
            before this function could adapt it.

    Warns:
      UntestedJaxWarning: JAX is not one of ``TESTED_JAX``.

    Numerics: neural-tangents broadcasts ranks freely. Under ``jax_numpy_rank_promotion="raise"`` call its ``stax`` and
    ``predict`` inside ``jax.numpy_rank_promotion("allow")``.
    """
    with _lock:
        return _load()


@functools.cache
def _load() -> ModuleType:
    _check_versions()
    if "neural_tangents" in sys.modules:
        raise ImportError(
            "neural_tangents was imported before ntk_prefix could adapt it to this JAX. "
            "Call ntk_prefix.kernels.neural_tangents.load() before anything imports it."
        )
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        # a first call under jit must not leave tracers in the module's constants
        with jax.ensure_compile_time_eval():
            package = importlib.import_module("neural_tangents")
    except BaseException:
        for name in [name for name in sys.modules if name.split(".")[0] == "neural_tangents"]:
            del sys.modules[name]
        raise
    finally:
        sys.meta_path.remove(finder)
    _mend(package, sys.modules["neural_tangents._src.empirical"], sys.modules["neural_tangents._src.predict"])
    return package


def _check_versions() -> None:
    """Refuse what cannot work before anything is imported; warn about what nobody tried."""
    for distribution in ("neural-tangents", "frozendict"):
        try:
            found = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError as error:
            raise ImportError(
                f"empirical kernels need {distribution}, which is not installed. Run: {_INSTALL} "
                "(--no-deps, because its metadata asks for TensorFlow, which nothing here uses)."
            ) from error
        if distribution == "neural-tangents" and found != _NEURAL_TANGENTS:
            raise ImportError(f"expected neural-tangents {_NEURAL_TANGENTS}, got {found}. Run: {_INSTALL}")
    installed, oldest = ([int(n) for n in re.findall(r"\d+", v)[:3]] for v in (jax.__version__, _OLDEST_JAX))
    if installed < oldest:
        raise ImportError(f"expected jax >= {_OLDEST_JAX}, got {jax.__version__}. Upgrade jax and jaxlib together.")
    if jax.__version__ not in TESTED_JAX:
        warnings.warn(
            f"neural-tangents was tested here with jax {', '.join(TESTED_JAX)}, not with {jax.__version__}. If a "
            'kernel fails, compare with implementation="jacobian", the plainest, or install a tested jax.',
            UntestedJaxWarning,
            stacklevel=4,
        )


# ----------------------------------------------------------- Importing: overlays instead of patches


class _Overlay(ModuleType):
    """A view of a module in which some names are filled in or replaced."""

    def __init__(self, base: ModuleType, **names: object) -> None:
        super().__init__(base.__name__, base.__doc__)
        self.__dict__.update(names, _base=base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_base"], name)


def _private_import() -> Callable[..., ModuleType]:
    """``__import__`` for neural-tangents' own modules: overlays where JAX has moved on, the ordinary import else."""
    core = _Overlay(
        jax.core,
        **{name: getattr(jax.extend.core, name) for name in ("Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var")},
        # gone, and compared with by identity only
        DShapedArray=None,
    )
    ad = _Overlay(
        jax.interpreters.ad,
        # a primitive that no program contains: its rules are registered and never asked for
        zeros_like_p=jax.extend.core.Primitive("zeros_like_of_neural_tangents"),
        source_info_util=jax.extend.source_info_util,
        config=SimpleNamespace(jax_enable_checks=False),
    )
    interpreters = _Overlay(jax.interpreters, ad=ad)
    overlays = {
        jax.core: core,
        jax.interpreters: interpreters,
        jax: _Overlay(jax, core=core, interpreters=interpreters),
    }
    util = _Overlay(
        ModuleType("jax.util"),
        safe_map=lambda function, *sequences: [function(*items) for items in zip(*sequences, strict=True)],
        safe_zip=lambda *sequences: list(zip(*sequences, strict=True)),
    )

    def import_(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> ModuleType:
        if level == 0 and name == "jax.util":
            return util
        module = builtins.__import__(name, globals, locals, fromlist or (), level)
        return overlays.get(module, module)

    return import_


class _AdaptedLoader(SourceFileLoader):
    """Runs a module of neural-tangents with its own ``__import__``."""

    def __init__(self, name: str, path: str, private: dict[str, Any]) -> None:
        super().__init__(name, path)
        self._private = private

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module's source; ``__builtins__`` in a module's globals is where ``import`` looks."""
        module.__dict__["__builtins__"] = self._private
        super().exec_module(module)


class _Finder(MetaPathFinder):
    """Finds neural-tangents' modules where they are installed, and hands them to the loader above."""

    def __init__(self) -> None:
        self._private = {**vars(builtins), "__import__": _private_import()}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module of neural-tangents; None for anything else."""
        if fullname.split(".")[0] != "neural_tangents":
            return None
        if fullname == "neural_tangents.experimental":
            return ModuleSpec(fullname, None, is_package=True)  # an empty package: this one imports TensorFlow
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.origin is not None:
            spec.loader = _AdaptedLoader(fullname, spec.origin, self._private)
        return spec


# ------------------------------------------------ Rebuilding: what leaned on machinery that is gone


def _mend(package: Any, empirical: Any, predict: Any) -> None:
    """Replace the functions of neural-tangents that cannot work as they are; same names, same signatures."""
    empirical._get_primals_out_and_pullback = functools.partial(_primals_out_and_pullback, empirical)
    empirical._eqn_vjp_fn = equation_vjp
    empirical._eqn_jvp_fn = functools.partial(equation_jvp, empirical._eqn_jvp_fn)
    automatic = empirical.NtkImplementation.AUTO
    empirical._implementation_to_ntk_fn[automatic] = functools.partial(_cheapest, empirical)
    # abstract arrays are no longer arrays to these three
    empirical.jnp = _Overlay(jnp, shape=_shape, size=lambda value: math.prod(_shape(value)), dtype=jnp.result_type)
    # "No Jacobian rule found": the derivative is then taken by autodiff, as exact, only dearer
    empirical.warnings = _Overlay(warnings, warn=_log.debug)
    package.predict.max_learning_rate = _max_learning_rate
    predict._make_inv_expm1_fn = _inverse_expm1


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if hasattr(value, "shape") else np.shape(value)


def _abstract(value: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(_shape(value), value.dtype if hasattr(value, "dtype") else jnp.result_type(value))


def _primals_out_and_pullback(
    empirical: Any,
    function: Callable[..., Any],
    mode: Any,
    _j_rules: bool,
    _s_rules: bool,
    _fwd: bool | None,
    *primals_in: Any,
) -> tuple[Any, Callable[[Any], Any]]:
    """Return outputs of ``function`` and the map that neural-tangents walks backwards through its linearization.

    Where reverse mode would return cotangents, ``_backward_pass`` collects df/dy or dy/dw, as ``mode`` says.
    """
    # loops unroll and jitted functions dissolve into primitives, which is what the structure rules know
    with jax.disable_jit():
        primals_out, pushforward = jax.linearize(function, *primals_in)
        program, consts = linear_jaxpr(
            pushforward, primals_in, functools.partial(empirical.rules.get_structure, _s_rules=_s_rules)
        )

    def pullback(cotangents: Any) -> Any:
        collected = empirical._backward_pass(
            program,
            mode=mode,
            consts=consts,
            primals_in=[jax.interpreters.ad.UndefinedPrimal(variable.aval) for variable in program.invars],
            cotangents_in=tuple(jax.tree.leaves(cotangents)),
            _j_rules=_j_rules,
            _s_rules=_s_rules,
            _fwd=_fwd,
        )
        return jax.tree.unflatten(jax.tree.structure(primals_in), collected)

    return primals_out, pullback


def _cheapest(empirical: Any, **options: Any) -> Callable[..., Any]:
    """Return the automatic implementation: every other one is compiled, and that with the fewest flops is used."""
    candidates = [
        jax.jit(empirical.empirical_ntk_fn(**options, implementation=implementation))
        for implementation in empirical.NtkImplementation
        if implementation != empirical.NtkImplementation.AUTO
    ]
    chosen: dict[Any, Callable[..., Any]] = {}

    def kernel_function(x1: Any, x2: Any, params: Any, **keywords: Any) -> Any:
        abstract = jax.tree.map(_abstract, (x1, x2, params, keywords))
        leaves, structure = jax.tree.flatten(abstract)
        key = structure, tuple(leaves)
        if key not in chosen:
            costs = [_flops(candidate, *abstract[:3], **abstract[3]) for candidate in candidates]
            _log.debug("flops of implementations 1, 2, 3: %s", costs)
            chosen[key] = candidates[costs.index(min(costs))]
        return chosen[key](x1, x2, params, **keywords)

    return kernel_function


def _flops(function: Any, *arguments: Any, **keywords: Any) -> float:
    """Return the compiler's estimate of a call's cost; infinite where structured derivatives do not know the function."""
    try:
        analysis = function.lower(*arguments, **keywords).compile().cost_analysis()
    except NotImplementedError as error:
        _log.debug("an implementation of the kernel does not support this function: %s", error)
        return float("inf")
    # a program that computes nothing has no such entry
    return float((analysis or {}).get("flops", 0.0))


def _max_learning_rate(
    ntk_train_train: jax.Array, y_train_size: int | None = None, momentum: int | float = 0.0, eps: float = 1e-12
) -> jax.Array:
    """Return the largest stable step for ``|F - y|^2 / (2 size)``: ``2 (1 + momentum) size / (lambda_max + eps)``.

    The kernel is in neural-tangents' layout, [n, n] or [n, n, d, d]; size n d is that of its matrix if left out.
    """
    half = ntk_train_train.ndim // 2
    order = (*range(0, 2 * half, 2), *range(1, 2 * half, 2))
    rows = jnp.transpose(ntk_train_train, order)
    side = math.prod(rows.shape[:half])
    largest = jnp.linalg.eigvalsh(rows.reshape(side, side))[-1]
    return 2 * (1 + momentum) * (y_train_size or side) / (largest + eps)


def _inverse_expm1(normalization: int | float) -> Callable[[Any, Any], Any]:
    """``(exp(-x t) - 1) / x`` for eigenvalues x, with its limit -t where the kernel is singular (there it was NaN)."""

    def function(eigenvalues: Any, times: Any) -> Any:
        positive = eigenvalues > 0
        safe = jnp.where(positive, eigenvalues, 1.0)
        change = jnp.expm1(-safe * times / normalization) / safe
        return jnp.where(positive, change, -times / normalization)

    return function
