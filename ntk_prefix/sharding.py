"""Where arrays lie on a mesh: rules by the *names* of their axes, in one place.

A mesh has up to three axes, and any of them may be missing:

    data     rows of a batch; weights are repeated
    fsdp     rows of a batch, and each weight is shared: it is gathered where it is used (fully sharded data parallel)
    tensor   heads, the MLP's width and the vocabulary: each device computes its part of a layer (tensor parallel)

An array's axes have names (:data:`RULES`), a weight's follow from its path in a model. An axis whose size the mesh does
not divide stays whole. A mesh is handed to the code of a model by JAX's own context, for as long as a program is traced::

    with sharding.on(mesh):                       # the Trainer does
        x = sharding.constrain(x, "batch")        # rows over data and fsdp, the rest whole; nothing without a mesh

so that no model has a mesh, and one model may be traced for several.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ntk_prefix.checks import expected
from ntk_prefix.typing import Array

__all__ = [
    "AXES",
    "RULES",
    "automatic",
    "axis_names",
    "batch_sharding",
    "by_compiler",
    "check_divides",
    "check_placed",
    "constrain",
    "constrain_weights",
    "current_mesh",
    "dotted",
    "gathered",
    "on",
    "row_axes",
    "row_shares",
    "spec",
    "tree_shardings",
    "varying",
    "weight_sharding",
]

AXES = ("data", "fsdp", "tensor")
"""Of a mesh, the slowest links first."""

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "key_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
"""The name of an array's axis -> the mesh axes it is divided over. ``embed`` is that of a weight: the features of
activations are whole, and have no name."""

Name = str | None

_LINEAR: Mapping[str, tuple[Name, Name]] = {
    r"attention\.query": ("embed", "heads"),
    r"attention\.(key|value)": ("embed", "key_heads"),
    r"attention\.out": ("heads", "embed"),
    r"mlp\.(up|gate)": ("embed", "mlp"),
    r"mlp\.down": ("mlp", "embed"),
    r"lm_head": ("embed", "vocab"),
    r"embeddings\.patches": (None, "embed"),
    r"head": ("embed", None),
}
"""What linear maps lead from and to, by the end of their path."""

_OTHERS: Mapping[str, tuple[Name, ...]] = {
    r"embeddings(\.tokens)?\.embedding": ("vocab", "embed"),
    r"embeddings\.\w+\.embedding": (None, None),
    r"\w*norm\.(scale|bias)": (None,),
    r"\w+_scale": (None,),
    r"adapters\.\w+\.(z|z_left|z_right|basis)": ("heads", None, None),
    r"adapters\.\w+\.k": ("heads", None),
    r"adapters\.\w+\.unit": ("heads",),
    r"attention\.core\.adapters\.\w+\.(key|value)": (None, "key_heads", None),
}


def automatic(mesh: Any) -> Mesh:
    """Return a mesh whose arrays the compiler places; one of ``jax.make_mesh`` is explicit, and JAX mixes no two kinds.

    Raises:
        UsageError: no mesh.
    """
    if not isinstance(mesh, Mesh):
        raise expected("mesh", "a jax.sharding.Mesh or None", type(mesh).__name__)
    return Mesh(mesh.devices, mesh.axis_names)


# ------------------------------------------------------------------------------------------- weights


def axis_names(path: str, ndim: int) -> tuple[Name, ...] | None:
    """Return the names of a weight's axes; None if the path is none of a model here.

    Args:
        path: dotted, such as ``layers.0.attention.query.kernel``; what stands before it, such as ``backbone``, and the
            ``base`` of what an adapter wraps do not matter.
        ndim: how many axes the weight has.

    >>> axis_names("layers.0.mlp.down.kernel", 2)
    ('mlp', 'embed')
    >>> axis_names("layers.0.attention.query.adapters.default.b", 2)  # LoRA's factors follow their linear map
    (None, 'heads')
    """
    path = path.replace(".base.", ".")
    module, _, attribute = path.rpartition(".")
    names: tuple[Name, ...] | None = next((n for p, n in _OTHERS.items() if re.search(rf"(^|\.){p}$", path)), None)
    if names is None:
        host = re.sub(r"\.adapters\.[^.]+$", "", module)
        linear = next((n for p, n in _LINEAR.items() if re.search(rf"(^|\.){p}$", host)), None)
        if linear is not None:
            bias = (None if linear[1] == "embed" else linear[1],)  # a gather for each would take longer than it saves
            parts = {"kernel": linear, "bias": bias, "a": (linear[0], None), "b": (None, linear[1])}
            names = parts.get(attribute)
    if "adapters" in path.split("."):
        # whatever method it is of: small, and read by all
        names = tuple(None if name == "embed" else name for name in names or (None,) * ndim)
    return names if names is None or len(names) == ndim else None


def weight_sharding(mesh: Mesh, path: str, shape: Sequence[int]) -> NamedSharding:
    """Return where a weight lies, and what an optimizer keeps of it.

    Adapters lie whole on every device, but for their heads and the widths that "tensor" divides; so do the vectors of norms
    and biases, and tables of positions. Of other weights each device of "fsdp" has a share: of the axis called embed, else
    of the longest that it divides.

    Args:
        mesh: with any of the three axes; others, and none of these, are a mesh of one share.
        path: dotted, see :func:`axis_names`; a path that is none of a model here is a weight without names.
        shape: of the weight.
    """
    return NamedSharding(automatic(mesh), _weight_spec(mesh, path, shape))


def _weight_spec(mesh: Mesh | AbstractMesh, path: str, shape: Sequence[int]) -> PartitionSpec:
    names = axis_names(path, len(shape))
    placed = list(spec(mesh, names or (None,) * len(shape), shape))
    placed += [None] * (len(shape) - len(placed))
    shares = mesh.shape.get("fsdp", 1)
    whole = "adapters" in path.split(".") or (names is not None and "embed" not in names)
    if shares > 1 and "fsdp" not in placed and not whole:
        free = [axis for axis, size in enumerate(shape) if placed[axis] is None and size and size % shares == 0]
        if free:
            placed[max(free, key=lambda axis: shape[axis])] = "fsdp"
    while placed and placed[-1] is None:
        placed.pop()
    return PartitionSpec(*placed)


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """Return where each array of a state lies: a model's, an optimizer's or both, by the paths in the tree."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return weight_sharding(mesh, dotted(path), leaf.shape)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def dotted(path: tuple[Any, ...]) -> str:
    """Return the path of an array in a tree, without the last step from a Variable to its array."""
    keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
    return ".".join(keys[:-1] if keys and keys[-1] == "value" else keys)


# --------------------------------------------------------------------------------------- activations


def row_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Return the axes that rows are divided over: all but "tensor", whatever they are called."""
    return tuple(axis for axis in mesh.axis_names if axis != "tensor")


def row_shares(mesh: Mesh | AbstractMesh) -> int:
    """Return how many parts the rows of a batch have."""
    return math.prod(mesh.shape[axis] for axis in row_axes(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return where a batch lies: rows divided over all axes but "tensor"."""
    return NamedSharding(automatic(mesh), PartitionSpec(row_axes(mesh)))


def spec(mesh: Mesh | AbstractMesh, names: Sequence[Name], shape: Sequence[int]) -> PartitionSpec:
    """Return the partition of an array whose axes have these names; None is whole, and so is what does not divide."""
    placed: list[Any] = []
    for name, size in zip(names, shape, strict=True):
        axes = row_axes(mesh) if name == "batch" else tuple(a for a in RULES.get(name or "", ()) if a in mesh.shape)
        shares = math.prod(mesh.shape[axis] for axis in axes)
        divides = shares > 1 and size and size % shares == 0
        placed.append((axes if len(axes) > 1 else axes[0]) if divides else None)
    return PartitionSpec(*placed)


@contextlib.contextmanager
def on(mesh: Mesh | None) -> Any:
    """Trace what stands inside for a mesh; for one device if it is None."""
    if mesh is None:
        yield
    else:
        with jax.sharding.use_abstract_mesh(automatic(mesh).abstract_mesh):
            yield


def current_mesh() -> AbstractMesh | None:
    """Return the mesh that is traced for, None where there is none, or none that the compiler divides arrays over.

    That is :func:`on`'s, or one set by ``jax.set_mesh``. Inside ``shard_map`` and ``pmap`` there is none.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind is not AxisType.Auto for kind in mesh.axis_types):
        return None
    return mesh


Value = TypeVar("Value")
Parameters = ParamSpec("Parameters")


def _explicit_mesh(array: Any) -> AbstractMesh | None:
    """Return the mesh of explicit axes that an array lies on, None if there is none."""
    if not isinstance(array, jax.Array):
        return None
    mesh = jax.typeof(array).sharding.mesh
    return mesh if AxisType.Explicit in mesh.axis_types else None


def check_placed(name: str, array: Any) -> None:
    """Refuse an array that is divided over explicit axes, which each operation of a model would have to name.

    Raises:
        UsageError: naming the argument, and what makes a mesh that the compiler divides arrays over.
    """
    mesh = _explicit_mesh(array)
    if mesh is not None and any(jax.typeof(array).sharding.spec):
        advice = f"jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)}) makes some"
        raise expected(name, "an array on a mesh of automatic axes", f"explicit axes {mesh.axis_names}", advice)


def by_compiler(*axes: int) -> Callable[[Callable[Parameters, Value]], Callable[Parameters, Value]]:
    """Let the compiler place what stands between the arrays of a mesh of explicit axes and the results.

    Such a mesh is that of ``jax.make_mesh``: the types of its arrays say how they are divided, and so would each operation
    have to. Results lie as the first argument, the queries, does. Without such arrays nothing changes.

    Args:
        axes: of each result, the queries' first ones.
    """

    def decorate(attention: Callable[Parameters, Value]) -> Callable[Parameters, Value]:
        @functools.wraps(attention)
        def placed(*arguments: Parameters.args, **options: Parameters.kwargs) -> Value:
            leaves, structure = jax.tree.flatten((arguments, options))
            arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}
            explicit = next(filter(None, map(_explicit_mesh, arrays.values())), None)
            if explicit is None:
                return attention(*arguments, **options)

            def of_arrays(arrays: Mapping[int, Array]) -> Value:
                values = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
                arguments, options = jax.tree.unflatten(structure, values)
                return attention(*arguments, **options)

            query: Any = arguments[0] if arguments else options["query"]
            where = tuple(PartitionSpec(*jax.typeof(query).sharding.spec[:count]) for count in axes)
            known = not jax.sharding.get_abstract_mesh().empty
            with contextlib.nullcontext() if known else jax.sharding.use_abstract_mesh(explicit):
                return jax.sharding.auto_axes(of_arrays, out_sharding=where if len(where) > 1 else where[0])(arrays)

        return placed

    return decorate


def varying(tree: Value, *others: Any) -> Value:
    """Return arrays that differ from device to device wherever any of them does, or any of some others.

    Within a ``shard_map`` that checks it, what a loop starts with has to say so as what comes out of it does, and so has
    what a rule of differentiation is for; elsewhere nothing changes. Of an array marked here the derivative is summed.
    """
    axes = frozenset[str]().union(*map(_varies_over, jax.tree.leaves((tree, others))))

    def mark(x: Array) -> Array:
        missing = tuple(sorted(axes - _varies_over(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree) if axes else tree


def _varies_over(x: Any) -> frozenset[str]:
    return getattr(getattr(jax.typeof(x), "manual_axis_type", None), "varying", frozenset())  # under any JAX


def constrain(x: Value, *names: Name) -> Value:
    """Say where an array lies, by the names of its first axes; the others are whole. Nothing without a mesh.

    An array whose rows the mesh does not divide is left to the compiler.
    """
    mesh = current_mesh()
    if mesh is None:
        return x
    shape: tuple[int, ...] = x.shape  # type: ignore[attr-defined]
    names = (*names, *(None,) * (len(shape) - len(names)))
    placed = spec(mesh, names, shape)
    if "batch" in names and row_shares(mesh) > 1 and placed[names.index("batch")] is None:
        return x
    return jax.lax.with_sharding_constraint(x, placed)


def gathered(path: str, weights: Any) -> Any:
    """Say that weights lie whole, but for what "tensor" divides; for those that are used many times in a row.

    Args:
        path: where they stand in the model, such as ``lm_head``.
        weights: a state of the module there.
    """
    mesh = current_mesh()
    if mesh is None:
        return weights

    def whole(keys: tuple[Any, ...], leaf: Array) -> Array:
        names = axis_names(f"{path}.{dotted(keys)}", leaf.ndim) or (None,) * leaf.ndim
        return constrain(leaf, *(None if name == "embed" else name for name in names))

    return jax.tree_util.tree_map_with_path(whole, weights)


def constrain_weights(weights: Any, leading: int = 0) -> Any:
    """Say that weights lie as :func:`weight_sharding` lays them; nothing without a mesh.

    Args:
        weights: a state, by whose paths they are known.
        leading: axes before a weight's own, such as one of layers, which are whole.
    """
    mesh = current_mesh()
    if mesh is None:
        return weights

    def where_they_lie(keys: tuple[Any, ...], leaf: Array) -> Array:
        own = _weight_spec(mesh, dotted(keys), leaf.shape[leading:])
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*(None,) * leading, *own))

    return jax.tree_util.tree_map_with_path(where_they_lie, weights)


# ----------------------------------------------------------------------------------------- arguments


def check_divides(sizes: Any, *, fsdp: int = 1, tensor: int = 1, flag: str = "--") -> None:
    """Refuse a mesh that does not divide a model, by its sizes alone: nothing needs to be loaded.

    Heads are never cut: of grouped queries each device of "tensor" has whole groups, so it has to divide the key heads.
    A vocabulary that does not divide stays whole, which costs memory and is not refused.

    Args:
        sizes: a :class:`~ntk_prefix.models.backbone.BackboneConfig`.
        fsdp, tensor: sizes of the mesh's axes.
        flag: what stands before the axis' name in the message.

    Raises:
        UsageError: naming the axis and the size.
    """
    heads = sizes.num_attention_heads
    wanted = [
        ("tensor", tensor, "query heads", heads),
        ("tensor", tensor, "key-value heads", getattr(sizes, "num_key_value_heads", heads)),
        ("tensor", tensor, "MLP features", sizes.intermediate_size),
        ("fsdp", fsdp, "features", sizes.hidden_size),
    ]
    for axis, shares, what, size in wanted:
        if size % shares:
            raise expected(f"{flag}{axis}", f"a divisor of the model's {size} {what}", shares)
