"""Where arrays lie on a mesh: by the names of their axes, and by nothing else."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ntk_prefix as npx
from ntk_prefix import models, sharding
from ntk_prefix.checks import UsageError
from ntk_prefix.feature_maps import Anchors
from ntk_prefix.polynomial import polynomial_attention
from ntk_prefix.prefix_state import PrefixState
from ntk_prefix.sharding import axis_names, check_divides, constrain, weight_sharding
from ntk_prefix.training import Trainer, half_squared_error

SIZES: dict[str, int] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}
"""Of a small Llama."""


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    devices = np.array(jax.devices()[: data * fsdp * tensor])
    return jax.sharding.Mesh(devices.reshape(data, fsdp, tensor), sharding.AXES)


@pytest.mark.parametrize(
    ("path", "shape", "where"),
    [
        ("embeddings.embedding", (32, 16), P("tensor", "fsdp")),
        ("backbone.embeddings.tokens.embedding", (32, 16), P("tensor", "fsdp")),
        ("embeddings.positions.embedding", (32, 16), P()),
        ("layers.3.attention.query.kernel", (16, 16), P("fsdp", "tensor")),
        ("layers.3.attention.query.base.kernel", (16, 16), P("fsdp", "tensor")),
        ("layers.3.attention.value.bias", (16,), P("tensor")),
        ("layers.3.attention.out.bias", (16,), P()),
        ("layers.3.attention.out.kernel", (16, 16), P("tensor", "fsdp")),
        ("layers.3.attention_norm.scale", (16,), P()),
        ("layers.3.mlp.gate.kernel", (16, 64), P("fsdp", "tensor")),
        ("layers.3.mlp.down.kernel", (64, 16), P("tensor", "fsdp")),
        ("lm_head.kernel", (16, 32), P("fsdp", "tensor")),
        # nothing of an adapter is shared over fsdp
        ("layers.3.attention.query.adapters.default.a", (16, 8), P()),
        ("layers.3.attention.query.adapters.default.b", (8, 16), P(None, "tensor")),
        ("layers.3.attention.out.adapters.default.a", (16, 8), P("tensor")),
        ("layers.3.attention.core.adapters.default.z", (4, 4, 4), P("tensor")),
        ("layers.3.attention.core.adapters.default.k", (4, 4), P("tensor")),
        ("layers.3.attention.core.adapters.default.key", (8, 4, 4), P(None, "tensor")),
        ("head.adapters.default.kernel", (16, 4), P()),
        # an optimizer's moments lie with their weight
        ("optimizer.0.mu.layers.3.mlp.down.kernel", (64, 16), P("tensor", "fsdp")),
        # no name, or a size that does not divide: the longest axis that does, or none
        ("weights", (6, 2), P("fsdp")),
        ("embeddings.embedding", (31, 16), P(None, "fsdp")),
        ("layers.3.attention.query.kernel", (15, 16), P(None, "tensor")),
        ("step", (), P()),
    ],
)
def test_a_weight_lies_by_the_names_of_its_axes(path: str, shape: tuple[int, ...], where: P) -> None:
    assert weight_sharding(mesh(2, 2, 2), path, shape).spec == where
    assert weight_sharding(mesh(8, 1, 1), path, shape).spec == P()


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_every_weight_of_every_family_has_names(family: str) -> None:
    """One without would be shared as it comes."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    build = {
        "bert": lambda: models.Bert(models.BertConfig(vocab_size=32, **sizes), rngs=nnx.Rngs(0)),
        "llama": lambda: models.Llama(models.LlamaConfig(vocab_size=32, **sizes), rngs=nnx.Rngs(0)),
        "vit": lambda: models.Vit(models.VitConfig(model_type="vit", **sizes), rngs=nnx.Rngs(0)),
    }[family]
    unnamed = {
        ".".join(map(str, path))
        for path, leaf in nnx.to_flat_state(nnx.state(nnx.eval_shape(build)))
        if axis_names(".".join(map(str, path)), len(leaf.shape)) is None
    }
    assert unnamed == ({"embeddings.cls_token", "embeddings.position_embeddings"} if family == "vit" else set())


def test_a_tree_lies_as_its_weights_do_whatever_stands_around_them() -> None:
    layer = nnx.Dict(mlp=nnx.Dict(down=nnx.Linear(4, 8, rngs=nnx.Rngs(0))))
    state = {"trained": nnx.state(layer), "best": [nnx.state(layer)]}
    found = {str(each.spec) for each in jax.tree.leaves(sharding.tree_shardings(mesh(2, 2, 2), state))}
    assert found == {str(P("tensor", "fsdp")), str(P())}


def test_activations_are_constrained_on_a_mesh_only() -> None:
    x = jnp.zeros((8, 3, 4))
    assert constrain(x, "batch") is x
    made = {}
    for name, on in {"rows": mesh(2, 2, 2), "heads": mesh(1, 1, 8)}.items():
        with sharding.on(on):
            made[name] = jax.jit(lambda x: constrain(2 * x, "batch", None, "heads")).lower(x).as_text()
    assert "sharding_constraint" in made["rows"]
    assert '[{"data", "fsdp"}, {}, {"tensor"}]' in made["rows"]
    assert "[{}, {}, {}]" in made["heads"]  # four heads on eight devices are whole


def test_rows_that_do_not_divide_are_left_to_the_compiler() -> None:
    x = jnp.zeros((3, 4))
    with sharding.on(mesh(2, 2, 2)):
        assert constrain(x, "batch") is x


def test_no_constraint_inside_shard_map() -> None:
    """There arrays are parts already."""
    on = mesh(2, 2, 2)

    def part(x: jax.Array) -> jax.Array:
        assert sharding.current_mesh() is None
        return constrain(x, "batch")

    x = jnp.ones((8, 4))
    rows = P(("data", "fsdp", "tensor"))
    assert (jax.jit(jax.shard_map(part, mesh=on, in_specs=rows, out_specs=rows))(x) == x).all()


@pytest.mark.parametrize("mass", ["absolute", "relative"])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_attention_inside_a_shard_map_that_checks_what_varies(mass: str, implementation: str) -> None:
    """Rows and heads are divided, the state over heads alone: its gradient is the sum over rows."""
    draw = np.random.default_rng(0)
    query, key, value, points, z = (
        jnp.asarray(draw.standard_normal(s)) for s in ((4, 5, 4, 3), (4, 6, 2, 3), (4, 6, 2, 3), (2, 2, 3), (2, 2, 3))
    )
    state = PrefixState(z, jnp.ones((2, 2)), Anchors(points))

    def attend(state: PrefixState, *arrays: jax.Array) -> jax.Array:
        return state.attend(*arrays, is_causal=True, mass=mass, implementation=implementation)

    part = P("data", None, "tensor")
    divided = jax.shard_map(
        attend, mesh=mesh(data=2, tensor=2), in_specs=(P("tensor"), part, part, part), out_specs=part
    )

    def gradients(attend) -> tuple:
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(attend(*x) ** 2), argnums=(0, 1, 2, 3)))(
            state, query, key, value
        )

    for got, wanted in zip(*map(jax.tree.leaves, (gradients(divided), gradients(attend))), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-14)


DIVIDED = P("data", None, "tensor")
"""Rows and heads of queries and keys."""

ATTENTIONS = {
    "ntk": lambda query, key, value, z: npx.ntk_attention(query, key, value, z, z[..., 0] ** 2, is_causal=True),
    "prefix": lambda query, key, value, z: npx.prefix_attention(query, key, value, z[:, :2], z[:, 1:]),
    "softmax": lambda query, key, value, z: npx.softmax_attention(query=query, key=key, value=value, is_causal=True),
    "log-sum-exp": lambda query, key, value, z: npx.attention_with_lse(query, key, value),
    "state": lambda query, key, value, z: PrefixState(z, z[..., 0] ** 2, Anchors(z)).attend(query, key, value),
    "polynomial": lambda query, key, value, z: polynomial_attention(query, key, value, degree=1),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_takes_arrays_of_explicit_axes_and_its_results_lie_as_queries_do(name: str) -> None:
    """As ``jax.make_mesh`` makes them: without a word of ours, each operation in between would have to say where it lies."""
    on, draw = jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4]), np.random.default_rng(0)
    shapes = {"query": (2, 3, 4, 3), "key": (2, 3, 2, 3), "value": (2, 3, 2, 3), "z": (4, 3, 3)}
    arrays = {array: jnp.asarray(draw.standard_normal(shape)) for array, shape in shapes.items()}
    lie = dict.fromkeys(shapes, DIVIDED) | {"z": P("tensor"), "value": P("data")}
    placed = {array: jax.device_put(x, jax.NamedSharding(on, lie[array])) for array, x in arrays.items()}
    assert AxisType.Explicit in jax.typeof(placed["query"]).sharding.mesh.axis_types
    attend = jax.jit(lambda arrays: ATTENTIONS[name](**arrays))
    slopes = jax.jit(jax.grad(lambda arrays: sum(jnp.sum(x**2) for x in jax.tree.leaves(attend(arrays)))))
    for each in jax.tree.leaves(attend(placed)):
        assert jax.typeof(each).sharding.spec == P(*(*DIVIDED, None)[: each.ndim])
    for of in (attend, slopes):
        for got, wanted in zip(*map(jax.tree.leaves, (of(placed), of(arrays))), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-14)


def test_a_mesh_of_explicit_axes_is_one_that_the_compiler_divides_arrays_over() -> None:
    """As it is wherever a mesh is given: what is laid out over it, and what is traced for it, are of one kind."""
    on = jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4])
    x = jax.device_put(jnp.ones((4, 8)), sharding.batch_sharding(on))
    weight = jax.device_put(jnp.ones((8, 8)), weight_sharding(on, "layers.0.mlp.up.kernel", (8, 8)))
    assert weight.sharding.spec == P(None, "tensor")

    def product(x: jax.Array, weight: jax.Array) -> jax.Array:
        with sharding.on(on):
            return constrain(x @ weight, "batch", "mlp")

    assert jax.jit(product)(x, weight).sharding.spec == P("data", "tensor")


@pytest.mark.usefixtures("without_annotations")
def test_what_is_no_mesh_is_named() -> None:
    with pytest.raises(UsageError, match=r"mesh: expected a jax.sharding.Mesh or None, got list"):
        sharding.automatic(jax.devices())
    model = npx.TiedPrefixModel(2, 4, rngs=nnx.Rngs(0))
    with pytest.raises(UsageError, match=r"mesh: expected a jax.sharding.Mesh or None, got int"):
        npx.kernels.prefix_ntk(model, jnp.ones((1, 2)) / 2, mesh=8)
    with pytest.raises(UsageError, match=r"mesh: expected a jax.sharding.Mesh or None, got tuple"):
        Trainer(loss=half_squared_error, optimizer=optax.sgd(1.0), mesh=(2, 4))


def test_sums_inside_a_shard_map_that_checks_what_varies() -> None:
    draw = np.random.default_rng(0)
    key, value, query = (jnp.asarray(draw.standard_normal(shape)) for shape in ((7, 2, 3), (7, 2, 3), (1, 7, 2, 3)))
    heads = P(None, "tensor")

    def sums(key: jax.Array, value: jax.Array) -> jax.Array:
        return PrefixState.from_prefix(key, value, block=3).z

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return polynomial_attention(query, key[None], value[None], degree=2, is_causal=True)

    on = mesh(tensor=2)
    divided = jax.shard_map(sums, mesh=on, in_specs=(heads, heads), out_specs=P("tensor"))
    np.testing.assert_allclose(divided(key, value), sums(key, value), rtol=1e-12)
    of_each = P(None, None, "tensor")
    divided = jax.shard_map(attend, mesh=on, in_specs=(of_each, heads, heads), out_specs=of_each)
    np.testing.assert_allclose(divided(query, key, value), attend(query, key, value), rtol=1e-12)


def test_a_mesh_that_does_not_divide_the_model_is_refused_by_its_sizes() -> None:
    llama = models.LlamaConfig(**SIZES)
    check_divides(llama, fsdp=4, tensor=2)  # a vocabulary stays whole
    with pytest.raises(ValueError, match="--tensor: expected a divisor of the model's 8 query heads, got 3"):
        check_divides(llama, tensor=3)
    with pytest.raises(ValueError, match="--tensor: expected a divisor of the model's 2 key-value heads, got 4"):
        check_divides(llama, tensor=4)
    with pytest.raises(ValueError, match="--tensor: expected a divisor of the model's 9 MLP features, got 2"):
        check_divides(models.LlamaConfig(**{**SIZES, "intermediate_size": 9}), tensor=2)
    with pytest.raises(ValueError, match="--fsdp: expected a divisor of the model's 16 features, got 3"):
        check_divides(llama, fsdp=3)


@pytest.mark.parametrize("within", [False, True])
def test_models_refuse_texts_on_explicit_axes_and_say_what_makes_others(within: bool) -> None:
    explicit = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    automatic = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    model = models.Llama(models.LlamaConfig(**SIZES), rngs=nnx.Rngs(0))
    ids = jnp.arange(8).reshape(2, 4)
    there, here = (jax.device_put(ids, jax.NamedSharding(on, P("data"))) for on in (explicit, automatic))
    within_mesh = jax.set_mesh(explicit) if within else contextlib.nullcontext()
    with within_mesh, pytest.raises(UsageError, match=r"input_ids: expected .* automatic axes, .*AxisType\.Auto"):
        model(there)
    np.testing.assert_allclose(model(here).logits, model(ids).logits, atol=1e-6)
