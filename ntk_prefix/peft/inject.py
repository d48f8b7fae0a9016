"""Adapters on a model: put on, switched, mixed, merged, counted."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ntk_prefix.checks import UsageError, check_rngs, expected
from ntk_prefix.peft.base import (
    AdapterConfig,
    AdapterParam,
    Host,
    InactiveParam,
    dotted,
    module_at,
    set_active,
    targets,
)
from ntk_prefix.peft.head import HeadConfig
from ntk_prefix.peft.record import LayerRecord, record, stand_in
from ntk_prefix.peft.sites import attention_site, released
from ntk_prefix.typing import Array, Int

__all__ = [
    "activate",
    "active_adapter",
    "apply",
    "configs",
    "delete_adapter",
    "disable_adapter",
    "merge",
    "mixed",
    "narrow_frozen",
    "non_negative",
    "print_trainable_parameters",
    "trainable_parameters",
]


def apply(
    model: Any,
    config: AdapterConfig | Sequence[AdapterConfig],
    *,
    name: str = "default",
    calibration: Mapping[str, Any] | None = None,
    rngs: nnx.Rngs | None = None,
) -> Any:
    """Put an adapter on a model, make it the active one, and make it the only thing that is trained.

    Args:
        model: any model of :mod:`ntk_prefix.models`, or an ``nnx.Module`` of your own: places of attention are found as in
            :mod:`ntk_prefix.peft.sites` (``nnx.MultiHeadAttention``, and modules with a ``core``), linear maps by their class.
            It is changed and returned.
        config: one method's configuration, or several that act together, such as LoRA and NTK-Attention; each finds its
            targets on the model as those before it left it. LoRA beside BitFit trains biases inside the maps that it
            wraps, in either order; the adapter as a whole then cannot be switched off.
        name: of the adapter; a model can host many.
        calibration: a small batch of real inputs, by the names of the model's arguments, for methods that measure
            something first, on the frozen model: an adapter that is active is switched off meanwhile. Of
            ``jax.ShapeDtypeStruct``, where only shapes are wanted (in ``nnx.eval_shape``): nothing is run, and what
            would be measured is made up.
        rngs: for random starts; ``nnx.Rngs(0)`` if None.

    Returns:
        The model. Its trained weights are those of type :class:`AdapterParam`, so
        ``nnx.Optimizer(model, tx, wrt=AdapterParam)``; wrap ``tx`` in :func:`non_negative`.

    Raises:
        ValueError: a target that matches nothing; a name that is taken; a method that changes weights in place
            beside another adapter; two methods that replace the same attention; a layer that cannot be measured.
    """
    chosen = [config] if isinstance(config, AdapterConfig) else list(config)
    rngs = nnx.Rngs(0) if rngs is None else rngs
    check_rngs(rngs)
    _check(model, chosen, name)
    measured = _measure(model, chosen, calibration) if calibration is not None else {}
    head = HeadConfig()
    has_head = hasattr(model, "head") and any(each.train_head for each in chosen) and head.hosts(model.head)
    try:
        for i, each in enumerate((*chosen, head) if has_head else chosen):
            for path in targets(model, each):
                if has_head and each is not head and path in ("head", "head.base"):
                    continue  # the head's own copy is trained
                module = module_at(model, path)
                changed = each.inject(module, name, rngs, measured.get((i, path)))
                if changed is not module:
                    _replace(model, path, changed)
    except BaseException:  # also what memory, a user's own method or Ctrl-C ends
        _remove(model, name)
        _freeze_in_place(model)
        raise
    model.adapter_configs = (*configs(model).items(), (name, tuple(chosen)))
    activate(model, name)
    return model


def _measure(model: Any, chosen: Sequence[AdapterConfig], calibration: Mapping[str, Any]) -> dict[Any, Any]:
    """Return what configurations want to know of the frozen model's layers, by the configuration's number and path."""
    wanted = {i: set(targets(model, each)) for i, each in enumerate(chosen) if each.needs_calibration}
    if not wanted:
        return {}
    if not isinstance(calibration, Mapping):
        raise expected(
            "calibration",
            'a batch by the names of the model\'s arguments, such as {"x": x}',
            type(calibration).__name__,
        )
    measured: dict[Any, Any] = {}
    if all(isinstance(value, jax.ShapeDtypeStruct) for value in calibration.values()):
        with jax.ensure_compile_time_eval():
            alike: dict[Any, Any] = {}  # layers of the same heads
            for i, path in ((i, path) for i, paths in wanted.items() for path in paths):
                layer = attention_site(module_at(model, path))
                assert layer is not None
                key = (i, layer.num_heads, layer.num_key_heads, layer.head_dim)
                if key not in alike:
                    alike[key] = chosen[i].measure(stand_in(layer, chosen[i].calibration_tokens))
                measured[i, path] = alike[key]
        return measured

    def measure(path: str, seen: LayerRecord) -> None:
        if any(path in paths for paths in wanted.values()):
            _check_seen(path, seen)
        for i, paths in wanted.items():
            if path in paths:
                try:
                    measured[i, path] = chosen[i].measure(seen)
                except ValueError as error:
                    raise UsageError(f"{path}: {error}; target= can leave the layer out") from error

    # at once, layer by layer: what all layers saw may be more than the model
    with disable_adapter(model):
        record(model, calibration, measure)
    return measured


def _check_seen(path: str, seen: LayerRecord) -> None:
    """Refuse a calibration batch of which a layer sees nothing, or what is no number."""
    tokens = np.asarray(seen.seen)
    if not tokens.any():
        raise expected("calibration", "at least one token that is not masked", f"none that {path} sees")
    if not all(np.isfinite(np.asarray(x)[tokens]).all() for x in (seen.query, seen.key, seen.value)):
        raise expected(
            "calibration", f"finite queries, keys and values in {path}", "NaN or infinity", "Look at the batch"
        )


def configs(model: Any) -> dict[str, tuple[AdapterConfig, ...]]:
    """Return the configurations of the adapters on a model, by name."""
    return dict(getattr(model, "adapter_configs", ()))


def active_adapter(model: Any) -> str | None:
    """Return the name of the active adapter, None if there is none."""
    in_place = [name for name, chosen in configs(model).items() if any(each.in_place for each in chosen)]
    return next((host.active for host in _hosts(model)), in_place[0] if in_place else None)


def activate(model: Any, name: str | None) -> None:
    """Make one adapter the active and trained one; None switches all of them off and trains nothing.

    Raises:
        ValueError: there is no such adapter, or the one there changes the model's own weights.
    """
    known = configs(model)
    if name is not None and name not in known:
        raise expected("name", f"an adapter among {sorted(known)}", repr(name))
    in_place = [n for n, cs in known.items() if any(c.in_place for c in cs)]
    if in_place and name not in in_place:
        raise expected(
            "name",
            "an adapter beside frozen weights",
            f"{name!r} beside {in_place}, which changed the weights themselves",
            "There is nothing to switch back to: load the model anew",
        )
    for host in _hosts(model):
        host.active = name
        for other, adapter in host.adapters.items():
            set_active(adapter, other == name)
    _set_positions(model)


@contextlib.contextmanager
def disable_adapter(model: Any) -> Iterator[None]:
    """Within it, the model is the frozen model; rows of a mixed batch go through no adapter either.

    Raises:
        ValueError: as :func:`activate`.
    """
    active = active_adapter(model)
    with _rows_of_none(model):
        activate(model, None)
        try:
            yield
        finally:
            activate(model, active)


@contextlib.contextmanager
def mixed(model: Any, rows: Int[Array, "B"], names: Sequence[str]) -> Iterator[None]:
    """Within it, row b of a batch goes through adapter ``names[rows[b]]``, and through none where ``rows[b] = -1``.

    ``rows`` may be traced, so one compiled program serves every assignment. A traced row cannot be refused: one that is
    none of ``names`` goes through no adapter. One such block may stand within another.

    Raises:
        ValueError: an unknown name, or none, a row that names none of them, adapters of different shapes, or methods that a
            mixed batch has no room for, such as prefixes that shift positions; as the model is called: another number of rows
            than the batch has.
    """
    known = configs(model)
    if not names:
        raise expected(
            "names", f"at least one adapter of {sorted(known)}", "none", "disable_adapter takes all of them off"
        )
    if unknown := set(names) - set(known):
        raise expected("names", f"adapters among {sorted(known)}", sorted(unknown))
    for each in (each for name in names for each in known[name] if each.unmixable):
        raise expected("names", f"adapters that {each.unmixable} in a mixed batch", each.method.replace("_", " "))
    rows = _checked_rows(rows, len(names))
    hosts = _hosts(model)
    if missing := [name for host in hosts for name in names if name not in host.adapters]:
        raise expected("names", "adapters on the same modules in a mixed batch", f"{sorted(set(missing))} on some only")
    with _rows_of_none(model):
        for host in hosts:
            host.names, host.rows = tuple(names), rows
        _set_positions(model)
        yield


@contextlib.contextmanager
def _rows_of_none(model: Any) -> Iterator[None]:
    """Within it no batch is mixed until that is said; what was is afterwards again."""
    before = [(host, host.names, host.rows) for host in _hosts(model)]
    try:
        for host, _, _ in before:
            host.rows = None
        yield
    finally:
        for host, names, rows in before:
            host.names, host.rows = names, rows
        _set_positions(model)


def delete_adapter(model: Any, name: str) -> None:
    """Take an adapter off the model; none is active afterwards.

    Raises:
        ValueError: as :func:`activate`.
    """
    if name not in configs(model):
        raise expected("name", f"an adapter among {sorted(configs(model))}", repr(name))
    activate(model, None)
    _remove(model, name)
    model.adapter_configs = tuple(pair for pair in configs(model).items() if pair[0] != name)


def merge(model: Any) -> Any:
    """Write the active LoRA adapter, and its head, into the weights, and take all adapters off.

    Raises:
        ValueError: an adapter that no weight can stand for; adapters none of which is active.
    """
    if configs(model) and active_adapter(model) is None:
        raise expected(
            "model", f"an active adapter among {sorted(configs(model))}", "none", "Activate one, or delete them"
        )
    foreign = {type(host).__name__: host.unmergeable for host in _hosts(model) if host.current() and host.unmergeable}
    if foreign:
        raise expected(
            "model",
            "an adapter that is an addition to weights",
            f"{sorted(foreign)}: {'; '.join(sorted(set(map(str, foreign.values()))))}",
            "No matrix of the model computes it: keep the adapter beside the model",
        )
    for path, module in list(nnx.iter_modules(model)):
        if isinstance(module, Host):
            _replace(model, dotted(path), module.bare() if module.current() is None else module.merge())
    # what an in-place method trained is from here on a weight like any other
    _freeze_in_place(model)
    released(model)
    model.adapter_configs = ()
    return model


def narrow_frozen(model: Any) -> Any:
    """Store what is frozen of linear maps in the dtype they compute in, where that is narrower than what they are in.

    In bfloat16 that is half the memory and bit for bit the same outputs. What ``from_pretrained(param_dtype=)`` made
    narrow stays so.

    Trained weights stay as they are, and so do norms and embeddings, which compute in float32. To be called once the
    adapter is on: what is narrow and trained later loses its small updates.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear) and module.dtype is not None:
            for parameter in (module.kernel, module.bias):
                if type(parameter) is nnx.Param and parameter.dtype.itemsize > jnp.dtype(module.dtype).itemsize:
                    parameter.set_value(parameter[...].astype(module.dtype))
    return model


def non_negative(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return the optimizer followed by the projection to >= 0 of every weight that is marked ``non_negative``.

    ``k`` starts at 0, where ``abs`` and ``exp`` have no gradient or no zero; projected descent has both.
    """

    def init(parameters: Any) -> _NonNegative:
        leaves, _ = jax.tree_util.tree_flatten_with_path(parameters, is_leaf=lambda x: isinstance(x, nnx.Variable))
        return _NonNegative(
            frozenset(
                jax.tree_util.keystr(path)
                for path, leaf in leaves
                if isinstance(leaf, nnx.Variable) and leaf.get_metadata().get("non_negative")
            )
        )

    def update(updates: Any, state: _NonNegative, parameters: Any = None) -> tuple[Any, _NonNegative]:
        def projected(path: tuple[Any, ...], change: Any, weight: Any) -> Any:
            if jax.tree_util.keystr(path) not in state.paths:
                return change
            # of Variables, and of the bare arrays that nnx.Optimizer hands over
            return jax.tree.map(lambda u, w: jnp.where(w + u < 0, -w, u), change, weight)

        is_leaf = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
        return jax.tree.map_with_path(projected, updates, parameters, is_leaf=is_leaf), state

    return optax.chain(optimizer, optax.GradientTransformation(init, update))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _NonNegative:
    """Which weights are projected: found where their marks are seen, and no numbers, so a checkpoint has none of it."""

    paths: frozenset[str]


def trainable_parameters(model: Any) -> tuple[int, int]:
    """Return how many numbers are trained, and how many the model has in all (calibration not counted)."""

    def count(of: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, of)))

    return count(AdapterParam), count(nnx.Param)


def print_trainable_parameters(model: Any) -> None:
    """Print what is trained, in the line that users of peft know."""
    trained, whole = trainable_parameters(model)
    print(f"trainable params: {trained:,} || all params: {whole:,} || trainable%: {100 * trained / whole:.4f}")


# ------------------------------------------------------------------------------------------ surgery


def _check(model: Any, chosen: list[AdapterConfig], name: str) -> None:
    if not chosen:
        raise expected("configs", "at least one configuration", "none")
    if not isinstance(name, str) or not name or "." in name:
        raise expected("name", "an adapter name without dots", repr(name))
    known = configs(model)
    if name in known:
        raise expected("name", "a new adapter name", f"{name!r}, which is there already", "Delete it first")
    if known and any(c.in_place for cs in (*known.values(), chosen) for c in cs):
        raise expected(
            "configs",
            "adapters beside frozen weights",
            "one that changes the weights themselves beside another",
            "Full fine-tuning and bitfit stand alone",
        )


def _replace(model: Any, path: str, module: nnx.Module) -> None:
    parent, _, last = path.rpartition(".")
    if last.isdigit():
        module_at(model, parent)[int(last)] = module
    else:
        setattr(module_at(model, parent), last, module)


def _remove(model: Any, name: str) -> None:
    """Forget an adapter; hosts without any are no longer needed, and would be in the way of another method's."""
    for path, module in list(nnx.iter_modules(model)):
        if isinstance(module, Host):
            if name in module.adapters:
                module.remove(name)
            if not module.adapters:
                _replace(model, dotted(path), module.bare())
    released(model)


def _hosts(model: Any) -> list[Host]:
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, Host)]


def _freeze_in_place(model: Any) -> None:
    """Make the model's own weights that an in-place method trained plain weights again."""
    for path, module in list(nnx.iter_modules(model)):
        if "adapters" not in path:
            for attribute, variable in list(vars(module).items()):
                if isinstance(variable, (AdapterParam, InactiveParam)):
                    setattr(module, attribute, nnx.Param(variable[...]))


def _checked_rows(rows: Int[Array, "B"], adapters: int) -> Int[Array, "B"]:
    """Return the rows, -1 in the place of what names no adapter where that cannot be refused."""
    rows = jnp.asarray(rows)
    if rows.ndim != 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise expected("rows", "integers [B]", f"{rows.dtype} {list(rows.shape)}")
    if not isinstance(rows, jax.core.Tracer):
        wrong = np.asarray(rows)
        if (wrong := wrong[(wrong < -1) | (wrong >= adapters)]).size:
            raise expected("rows", f"-1 or an index below {adapters}, one of the names", wrong[0])
    return jnp.where((rows >= 0) & (rows < adapters), rows, -1)


def _set_positions(model: Any) -> None:
    """Move the tokens' positions by what the active methods ask for, on top of what a user has set; not in a mixed batch.

    What the shift made of an offset is remembered beside it: if it is still there it is taken back, else the user has set
    the offset since, and it stays.
    """
    active = None if any(host.rows is not None for host in _hosts(model)) else active_adapter(model)
    shift = 0 if active is None else sum(each.position_shift for each in configs(model)[active])
    modules: list[Any] = [module for _, module in nnx.iter_modules(model)]
    for module in modules:
        # whoever passes the option on to another module has none of its own
        own = {"run", "position_offset"}.intersection(vars(module)) and hasattr(module, "position_offset")
        if own and (shift or hasattr(module, "adapter_shift")):
            before, shifted = getattr(module, "adapter_shift", (0, None))
            module.position_offset += shift - (before if module.position_offset == shifted else 0)
            module.adapter_shift = (shift, module.position_offset)
            if not shift:
                del module.adapter_shift
