"""Adapters on a model: put on, switched, mixed, merged, counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import optax
from flax import nnx

from ntk_prefix.checks import UsageError
from ntk_prefix.models.attention import AttentionCore, AttentionLayer
from ntk_prefix.models.backbone import LeadingRows
from ntk_prefix.peft.base import AdapterConfig, AdapterParam, Calibration, Host, NonNegativeParam, RestingParam
from ntk_prefix.peft.methods.ntk_attention import NTKAttentionConfig
from ntk_prefix.peft.methods.prefix_propagation import PrefixPropagationConfig
from ntk_prefix.peft.methods.prefix_tuning import PrefixTuningConfig
from ntk_prefix.peft.methods.weights import HeadConfig
from ntk_prefix.peft.record import LayerRecord, record
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

PARAMETERS = (AdapterParam, NonNegativeParam, RestingParam)

NON_NEGATIVE = ("k",)
"""Attributes of adapters that are trained as :class:`NonNegativeParam`."""


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
        model: any model of :mod:`ntk_prefix.models`; it is changed and returned.
        config: one method's configuration, or several that act together, such as LoRA and NTK-Attention.
        name: of the adapter; a model can host many.
        calibration: a small batch of real inputs (keyword arguments of the model) for methods that measure
            something first.
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
    _check(model, chosen, name)
    plan = [(each, targets(model, each)) for each in chosen]
    if hasattr(model, "head") and any(each.train_head for each in chosen):
        plan = [(each, [path for path in paths if path != "head"]) for each, paths in plan]
        plan.append((HeadConfig(), ["head"]))
    wanted = {
        path: each
        for each, paths in plan
        if isinstance(each, NTKAttentionConfig) and each.needs_calibration
        for path in paths
    }

    def measure(path: str, seen: LayerRecord) -> Any:
        try:
            return wanted[path].measure(seen) if path in wanted else None
        except ValueError as error:
            raise UsageError(f"{path}: {error}; target= can leave the layer out") from error

    # at once, layer by layer: what all layers saw may be more than the model
    measured = record(model, calibration, measure) if wanted and calibration is not None else {}
    try:
        for each, paths in plan:
            for path in paths:
                module = module_at(model, path)
                if isinstance(each, NTKAttentionConfig):
                    changed = each.inject(module, name, rngs, measured.get(path))
                else:
                    changed = each.inject(module, name, rngs)
                if changed is not module:
                    _replace(model, path, changed)
    except ValueError:
        _remove(model, name)
        raise
    model.adapter_configs = (*configs(model).items(), (name, tuple(chosen)))
    activate(model, name)
    return model


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
        raise UsageError(f"expected an adapter among {sorted(known)}, got {name!r}")
    in_place = [n for n, cs in known.items() if any(c.in_place for c in cs)]
    if in_place and name not in in_place:
        raise UsageError(
            f"expected adapters beside frozen weights, got {in_place}, which changed the weights themselves: "
            "there is nothing to switch back to, so load the model anew"
        )
    for host in _hosts(model):
        host.active = name
        for other, adapter in host.adapters.items():
            _retype(adapter, trained=other == name)
    _shift_positions(model, known.get(name, ()) if name is not None else ())


@contextlib.contextmanager
def disable_adapter(model: Any) -> Iterator[None]:
    """Within it, the model is the frozen model.

    Raises:
        ValueError: as :func:`activate`.
    """
    active = active_adapter(model)
    activate(model, None)
    try:
        yield
    finally:
        activate(model, active)


@contextlib.contextmanager
def mixed(model: Any, rows: Int[Array, "B"], names: Sequence[str]) -> Iterator[None]:
    """Within it, row b of a batch goes through adapter ``names[rows[b]]``, and through none where ``rows[b] = -1``.

    ``rows`` may be traced, so one compiled program serves every assignment.

    Raises:
        ValueError: an unknown name, adapters of different shapes, or of prefixes that shift positions.
    """
    known = configs(model)
    if unknown := set(names) - set(known):
        raise UsageError(f"expected adapters among {sorted(known)}, got {sorted(unknown)}")
    if any(c.in_place for name in names for c in known[name]):
        raise UsageError(f"expected adapters beside frozen weights in a mixed batch, got {sorted(names)}")
    if any(isinstance(c, PrefixTuningConfig) and c.shift_positions for name in names for c in known[name]):
        raise UsageError("expected adapters that leave positions alone in a mixed batch, got shift_positions=True")
    if any(isinstance(c, PrefixPropagationConfig) for name in names for c in known[name]):
        raise UsageError("expected adapters that leave the rows alone in a mixed batch, got prefix propagation")
    hosts = _hosts(model)
    before = [host.names for host in hosts]
    active = active_adapter(model)
    if missing := [name for host in hosts for name in names if name not in host.adapters]:
        raise UsageError(f"expected adapters on the same modules in a mixed batch, got {set(missing)} on some only")
    try:
        _shift_positions(model, ())
        for host in hosts:
            host.names, host.rows = tuple(names), rows
        yield
    finally:
        for host, all_names in zip(hosts, before, strict=True):
            host.names, host.rows = all_names, None
        _shift_positions(model, known.get(active, ()) if active is not None else ())


def delete_adapter(model: Any, name: str) -> None:
    """Take an adapter off the model; none is active afterwards.

    Raises:
        ValueError: as :func:`activate`.
    """
    if name not in configs(model):
        raise UsageError(f"expected an adapter among {sorted(configs(model))}, got {name!r}")
    activate(model, None)
    _remove(model, name)
    model.adapter_configs = tuple(pair for pair in configs(model).items() if pair[0] != name)


def merge(model: Any) -> Any:
    """Write the active LoRA adapter, and its head, into the weights, and take all adapters off.

    Raises:
        ValueError: an adapter that no weight can stand for.
    """
    foreign = sorted(
        {type(host).__name__ for host in _hosts(model) if host.current() is not None and not hasattr(host, "merge")}
    )
    if foreign:
        raise UsageError(
            f"expected an adapter that is an addition to weights, got {foreign}: phi(q) Z / (A 1 + phi(q) k) is a "
            "nonlinear function of the query with a denominator shared with attention, so no matrix of the model "
            "computes it, and neither what trained tokens add to it; keep the adapter beside the model"
        )
    for path, module in list(nnx.iter_modules(model)):
        if isinstance(module, Host):
            merged = getattr(module, "merge", None)
            _replace(model, dotted(path), merged() if merged and module.current() is not None else _bare(module))
        else:
            for attribute, variable in list(vars(module).items()):
                # what an in-place method trained is from here on a weight like any other
                if type(variable) is AdapterParam:
                    setattr(module, attribute, nnx.Param(variable[...]))
    model.adapter_configs = ()
    return model


def narrow_frozen(model: Any) -> Any:
    """Store what is frozen of linear maps in the dtype they compute in: in bfloat16 half the memory, bit for bit the same
    outputs.

    Trained weights stay as they are, and so do norms and embeddings, which compute in float32. To be called once the
    adapter is on: what is narrow and trained later loses its small updates.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear) and module.dtype is not None:
            for parameter in (module.kernel, module.bias):
                if type(parameter) is nnx.Param:
                    parameter.set_value(parameter[...].astype(module.dtype))
    return model


def non_negative(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return the optimizer followed by the projection of every :class:`NonNegativeParam` to >= 0.

    ``k`` starts at 0, where ``abs`` and ``exp`` have no gradient or no zero; projected descent has both.
    """

    def chosen(path: tuple[Any, ...], leaf: Any) -> bool:
        if isinstance(leaf, nnx.Variable):
            return isinstance(leaf, NonNegativeParam)
        # nnx.Optimizer hands over bare arrays: there the place says what the type no longer does
        parts = [getattr(part, "key", getattr(part, "name", None)) for part in path]
        return "adapters" in parts and parts[-1] in NON_NEGATIVE

    def mask(tree: Any) -> Any:
        return jax.tree.map_with_path(chosen, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))

    return optax.chain(optimizer, optax.masked(optax.keep_params_nonnegative(), mask))


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
        raise UsageError("expected at least one configuration, got none")
    if not name or "." in name:
        raise UsageError(f"expected an adapter name without dots, got {name!r}")
    known = configs(model)
    if name in known:
        raise UsageError(f"expected a new adapter name, got {name!r}, which is there already: delete it first")
    if known and any(c.in_place for cs in (*known.values(), chosen) for c in cs):
        raise UsageError(
            "expected adapters beside frozen weights, got one that changes the weights themselves beside another: "
            "full fine-tuning and bitfit stand alone"
        )


def targets(model: Any, config: AdapterConfig) -> list[str]:
    """Return the dotted paths of the modules that a configuration selects; those inside a host are not looked at."""
    candidates = []
    inside: list[str] = []
    for path, module in sorted(nnx.iter_modules(model), key=lambda item: len(item[0])):
        place = dotted(path)
        if any(place.startswith(host + ".") for host in inside):
            continue
        if isinstance(module, Host):
            inside.append(place)
        if config.hosts(module):
            candidates.append((place, module))
    found = [place for place, module in candidates if config.selects(place, module)]
    if not found:
        raise UsageError(
            f"expected a target that matches modules, got {config.target!r} ({config.method}), which matches none of "
            f"{[place for place, _ in candidates][:8]} ..."
        )
    return found


def module_at(model: Any, path: str) -> Any:
    """Return the module at a dotted path."""
    for key in filter(None, path.split(".")):
        model = model[int(key)] if key.isdigit() else getattr(model, key)
    return model


def _replace(model: Any, path: str, module: nnx.Module) -> None:
    parent, _, last = path.rpartition(".")
    if last.isdigit():
        module_at(model, parent)[int(last)] = module
    else:
        setattr(module_at(model, parent), last, module)


def dotted(path: Sequence[Any]) -> str:
    """Return a module's path as it is written: ``layers.0.attention``."""
    return ".".join(map(str, path))


def _bare(host: Host) -> Any:
    """Return what stood in a host's place: the linear map it wraps, no leading rows, or a plain core."""
    if isinstance(host, LeadingRows):
        return LeadingRows(host.num_layers, host.features)
    return host.base if hasattr(host, "base") else AttentionCore()


def _remove(model: Any, name: str) -> None:
    """Forget an adapter; hosts without any are no longer needed, and would be in the way of another method's."""
    for path, module in list(nnx.iter_modules(model)):
        if isinstance(module, Host):
            if name in module.adapters:
                module.remove(name)
            if not module.adapters:
                _replace(model, dotted(path), _bare(module))


def _hosts(model: Any) -> list[Host]:
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, Host)]


def _retype(adapter: nnx.Module, *, trained: bool) -> None:
    """Give an adapter's weights the type that says whether they are trained."""
    for attribute, variable in list(vars(adapter).items()):
        if not isinstance(variable, PARAMETERS) or isinstance(variable, Calibration):
            continue
        kind = (NonNegativeParam if attribute in NON_NEGATIVE else AdapterParam) if trained else RestingParam
        if type(variable) is not kind:
            setattr(adapter, attribute, kind(variable[...]))


def _shift_positions(model: Any, active: Sequence[AdapterConfig]) -> None:
    """Count a prefix in the positions of the tokens where its configuration says so."""
    shift = sum(c.num_tokens for c in active if isinstance(c, PrefixTuningConfig) and c.shift_positions)
    for _, module in nnx.iter_modules(model):
        if hasattr(module, "position_offset") and not isinstance(module, AttentionLayer):
            module.position_offset = shift
