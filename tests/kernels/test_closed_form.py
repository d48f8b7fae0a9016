"""``prefix_ntk``: the kernel of a finite prefix, however it is given, cut into blocks or shared among devices.

The reference is always the Gram matrix of the Jacobian that autodiff makes of the model. Tolerances: a kernel entry is
a sum over m tokens of products whose factors went through a dozen roundings; errors are taken relative to the largest
entry and came out below 2e-15 in float64 and 2e-6 in float32, so 1e-12 and 2e-5 leave room for other machines and for
other orders of summation, and none for a wrong formula.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from ntk_prefix import FixedValuePrefixModel, RandomPrefix, TiedPrefixModel
from ntk_prefix.kernels import prefix_ntk
from ntk_prefix.kernels.closed_form import WIDEST_SCORES
from ntk_prefix.one_layer import attention_mass, fixed_outputs, tied_outputs
from ntk_prefix.random_prefix import TILE
from ntk_prefix.training import Trainer, half_squared_error

N, D, M, OUTPUTS = 3, 2, 10, 3
EXACT, SINGLE = 1e-12, 2e-5
ROOT = Path(__file__).parents[2]

Model = TiedPrefixModel | FixedValuePrefixModel


def inputs(rows: int = N, seed: int = 7, scale: float = 1.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(seed), (rows, D)) / np.sqrt(D)


both_models = pytest.mark.parametrize("kind", ["tied", "fixed"])
# every pair of options, in half of their combinations
cases = pytest.mark.parametrize(
    ("kind", "symmetric", "rectangle"),
    [
        pytest.param("tied", True, False, id="tied-symmetric-square"),
        pytest.param("tied", False, True, id="tied-plain-rectangle"),
        pytest.param("fixed", True, True, id="fixed-symmetric-rectangle"),
        pytest.param("fixed", False, False, id="fixed-plain-square"),
    ],
)


def others(rectangle: bool) -> jax.Array | None:
    """The second set of inputs: other points and another number of them, or none."""
    return inputs(rows=2, seed=8) if rectangle else None


def prefix(kind: str, m: int = M, symmetric: bool = True, **options: object) -> RandomPrefix:
    outputs = OUTPUTS if kind == "fixed" else None
    key = nnx.Rngs(0).params()
    return RandomPrefix(key=key, d=D, m=m, symmetric=symmetric, model=kind, outputs=outputs, **options)  # type: ignore[arg-type]


def model(kind: str, m: int = M, symmetric: bool = True) -> Model:
    """The model that starts from ``prefix`` of the same arguments."""
    if kind == "tied":
        return TiedPrefixModel(D, m, symmetric=symmetric, rngs=nnx.Rngs(0))
    return FixedValuePrefixModel(D, m, OUTPUTS, symmetric=symmetric, rngs=nnx.Rngs(0))


def tied_outputs_through_key(weights: jax.Array, signs: jax.Array, x: jax.Array) -> jax.Array:
    """The tied model with its values held: what is left of its derivative is the key part."""
    return jnp.matmul(attention_mass(weights, x), signs * jax.lax.stop_gradient(weights))


@functools.cache
def jacobian(outputs: Callable) -> Callable:
    return jax.jit(jax.jacrev(outputs))


def gram(outputs: Callable, model: Model, x1: jax.Array, x2: jax.Array | None = None) -> jax.Array:
    """H(W) by autodiff: the Jacobians' Gram matrix over m."""
    left, right = (jacobian(outputs)(model.weights[...], model.signs[...], x) for x in (x1, x1 if x2 is None else x2))
    return jnp.einsum("ikrc,jlrc->ikjl", left, right) / model.m


def autodiff(model: Model, x1: jax.Array, x2: jax.Array | None = None) -> jax.Array:
    return gram(tied_outputs if isinstance(model, TiedPrefixModel) else fixed_outputs, model, x1, x2)


def difference(got: jax.Array, expected: jax.Array) -> float:
    """Largest error, relative to the largest entry."""
    assert got.shape == expected.shape
    wide = np.asarray(expected, float)
    return float(abs(np.asarray(got, float) - wide).max() / abs(wide).max())


def mesh(*shape: int) -> Mesh:
    axes = ("tokens", "more")[: len(shape)]
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(shape))


class TestEqualsAutodiff:
    @cases
    def test_for_given_weights(self, kind: str, symmetric: bool, rectangle: bool) -> None:
        given, x2 = model(kind, symmetric=symmetric), others(rectangle)
        kernel = prefix_ntk(given, inputs(), x2)
        outputs = D if kind == "tied" else OUTPUTS
        assert kernel.shape == (N, outputs, N if x2 is None else 2, outputs)
        assert difference(kernel, autodiff(given, inputs(), x2)) < EXACT

    @cases
    def test_for_a_prefix_drawn_on_the_fly(self, kind: str, symmetric: bool, rectangle: bool) -> None:
        x2 = others(rectangle)
        kernel = prefix_ntk(prefix(kind, symmetric=symmetric), inputs(), x2)
        assert difference(kernel, autodiff(model(kind, symmetric=symmetric), inputs(), x2)) < EXACT

    @pytest.mark.parametrize("rectangle", [False, True])
    def test_for_the_key_part(self, rectangle: bool) -> None:
        tied, x2 = model("tied", symmetric=False), others(rectangle)
        through_key = gram(tied_outputs_through_key, tied, inputs(), x2)
        assert difference(prefix_ntk(tied, inputs(), x2, part="key"), through_key) < EXACT
        # control: the key part alone is not the kernel of the tied model
        assert difference(prefix_ntk(tied, inputs(), x2, part="key"), autodiff(tied, inputs(), x2)) > 0.1
        # the fixed model learns through its keys only
        fixed = model("fixed")
        assert difference(prefix_ntk(fixed, inputs(), x2, part="key"), autodiff(fixed, inputs(), x2)) < EXACT

    def test_for_the_key_part_of_a_drawn_prefix(self) -> None:
        through_key = gram(tied_outputs_through_key, model("tied"), inputs())
        assert difference(prefix_ntk(prefix("tied"), inputs(), part="key"), through_key) < EXACT

    @pytest.mark.parametrize(("kind", "block"), [("tied", 5), ("tied", 7), ("fixed", 1), ("fixed", 1000)])
    def test_for_blocks_that_divide_the_prefix_or_do_not(self, kind: str, block: int) -> None:
        given = model(kind, symmetric=False)
        assert difference(prefix_ntk(given, inputs(), block=block), autodiff(given, inputs())) < EXACT

    def test_for_a_single_token_and_a_single_input(self) -> None:
        """m = 1: the attention is one whatever the key, so only the value is learned."""
        alone = model("tied", m=1, symmetric=False)
        kernel = prefix_ntk(alone, inputs(rows=1))
        np.testing.assert_array_equal(kernel[0, :, 0], np.eye(D))
        assert abs(prefix_ntk(alone, inputs(rows=1), part="key")).max() == 0

    @both_models
    def test_after_training(self, kind: str) -> None:
        """Once trained the pairs have parted: F is not zero, nor is the center."""
        start, x = model(kind), inputs()
        trainer = Trainer(loss=half_squared_error, optimizer=optax.sgd(0.02), reduction="sum")
        state, step = trainer.init(start), trainer.stepper(start)
        batch = (x, jnp.ones((N, D if kind == "tied" else OUTPUTS)))
        for _ in range(5):
            state, _ = step(state, batch)
        trained = trainer.model(start, state)
        assert abs(trained(x)).max() > 0.1
        assert difference(prefix_ntk(trained, x), autodiff(trained, x)) < EXACT
        # control: it is no longer the kernel of the start
        assert difference(prefix_ntk(trained, x), prefix_ntk(start, x)) > 1e-3

    @both_models
    @pytest.mark.parametrize("x64", [False], indirect=True)
    def test_in_float32(self, kind: str, x64: bool) -> None:
        given, x = model(kind, m=300), inputs()
        kernel = prefix_ntk(given, x)
        with jax.enable_x64(True):
            wide = model(kind, m=300)
            wide.weights[...], wide.signs[...] = (part[...].astype(float) for part in (given.weights, given.signs))
            expected = autodiff(wide, x.astype(float))
        assert kernel.dtype == jnp.float32
        assert EXACT < difference(kernel, expected) < SINGLE
        assert difference(prefix_ntk(prefix(kind, m=300), x), expected) < SINGLE

    def test_the_widest_dtype_decides(self) -> None:
        narrow = inputs().astype("float32")
        assert prefix_ntk(prefix("tied", dtype="float32"), narrow).dtype == jnp.float32
        assert prefix_ntk(prefix("tied", dtype="float32"), inputs()).dtype == jnp.float64
        assert prefix_ntk(prefix("tied", dtype="bfloat16"), narrow.astype("bfloat16")).dtype == jnp.float32


class TestItIsAKernel:
    @pytest.mark.parametrize(
        ("kind", "drawn", "x64"),
        [("tied", False, True), ("tied", True, False), ("fixed", False, False), ("fixed", True, True)],
        indirect=["x64"],
    )
    def test_symmetric_to_the_last_bit_and_positive(self, kind: str, drawn: bool, x64: bool) -> None:
        """With enough pairs of inputs that compiled loops have vectors and remainders, which may round differently."""
        rows = 60
        kernel = prefix_ntk(prefix(kind, 400) if drawn else model(kind, 400, symmetric=False), inputs(rows))
        np.testing.assert_array_equal(kernel, kernel.transpose(2, 3, 0, 1))
        matrix = kernel.reshape(rows * kernel.shape[1], -1)
        eigenvalues = np.linalg.eigvalsh(np.asarray(matrix, float))
        # a perturbation of entries by eps moves no eigenvalue by more than the perturbation's norm
        assert eigenvalues[0] > -len(matrix) * float(jnp.finfo(kernel.dtype).eps) * eigenvalues[-1]

    @both_models
    def test_one_triangle_is_the_whole(self, kind: str) -> None:
        """x2=None computes pairs i <= j; the same points given twice all pairs."""
        given, x = model(kind, 400), inputs(60)
        assert difference(prefix_ntk(given, x), prefix_ntk(given, x, x)) < EXACT

    def test_the_empirical_ntk_is_m_times_it(self) -> None:
        """Gradient descent sees m H: F moves by -eta m H (F - y)."""
        start, x = model("tied", 1000), inputs()
        y = jnp.ones((N, D))
        rate = 1e-8
        trainer = Trainer(loss=half_squared_error, optimizer=optax.sgd(rate), reduction="sum")
        state, _ = trainer.stepper(start)(trainer.init(start), (x, y))
        moved = (trainer.model(start, state)(x) - start(x)) / rate
        predicted = start.m * jnp.einsum("ikjl,jl->ik", prefix_ntk(start, x), y - start(x))
        # second order in rate * |m H|, and 1e-16 / rate of roundings
        np.testing.assert_allclose(moved, predicted, rtol=1e-4)


class TestHowItIsComputedDoesNotMatter:
    @pytest.mark.parametrize(
        ("kind", "shape"), [("tied", (1,)), ("tied", (2,)), ("tied", (8,)), ("tied", (4, 2)), ("fixed", (8,))], ids=str
    )
    def test_devices(self, kind: str, shape: tuple[int, ...]) -> None:
        x2 = others(kind == "fixed")
        given = model(kind, 101, symmetric=False)  # 101 rows divide by no number of devices
        alone = prefix_ntk(given, inputs(), x2)
        assert difference(prefix_ntk(given, inputs(), x2, mesh=mesh(*shape)), alone) < EXACT

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_devices_of_a_drawn_prefix(self, symmetric: bool) -> None:
        rows = 2 * TILE + 10  # three tiles for eight devices: five have nothing to do
        drawn = prefix("tied", 2 * rows if symmetric else rows, symmetric)
        alone = prefix_ntk(drawn, inputs())
        assert difference(prefix_ntk(drawn, inputs(), mesh=mesh(8)), alone) < EXACT

    @pytest.mark.parametrize(("kind", "symmetric"), [("tied", True), ("fixed", False)])
    def test_streaming_a_prefix_is_materialising_it(self, kind: str, symmetric: bool) -> None:
        m = 2 * TILE + 10
        streamed = prefix_ntk(prefix(kind, m, symmetric), inputs())
        assert difference(streamed, prefix_ntk(model(kind, m, symmetric), inputs())) < EXACT
        # control: two tokens fewer can be told apart
        assert difference(streamed, prefix_ntk(prefix(kind, m - 2, symmetric), inputs())) > 1e3 * EXACT

    @pytest.mark.parametrize(("kind", "symmetric"), [("tied", True), ("fixed", False)])
    def test_under_jit(self, kind: str, symmetric: bool) -> None:
        drawn = prefix(kind, symmetric=symmetric)
        compiled = jax.jit(lambda x: prefix_ntk(drawn, x))
        assert difference(compiled(inputs()), prefix_ntk(drawn, inputs())) < EXACT


class TestExtremeScores:
    @both_models
    def test_given_weights_a_thousand_times_larger(self, kind: str) -> None:
        """exp(score) overflows even float64; the attention of each input is all on one token, T = m.

        What then cancels is m |x|^2 |u|^2, u being what a token carries (its weights, or its signs).
        """
        given, x = model(kind, symmetric=False), inputs()
        given.weights[...] = 1e3 * given.weights[...]
        assert not jnp.isfinite(jnp.exp(x @ given.weights[...].T)).all()
        expected = autodiff(given, x)
        carried = given.weights[...] if kind == "tied" else given.signs[...]
        scale = M * float(jnp.square(x).sum(1).max() * jnp.square(carried).max())
        assert abs(prefix_ntk(given, x) - expected).max() < 10 * np.finfo(float).eps * scale
        # of the kernel itself this is a part in 10^9 where values are learned; through fixed ones nothing is
        assert abs(expected).max() == (pytest.approx(M, rel=0.5) if kind == "tied" else pytest.approx(0, abs=1e-200))

    @pytest.mark.parametrize(
        ("kind", "width", "x64"),
        [
            ("tied", WIDEST_SCORES, False),
            ("tied", 30.0, False),
            ("tied", 1000.0, True),
            ("fixed", WIDEST_SCORES, True),
            ("fixed", 1000.0, False),
        ],
        indirect=["x64"],
    )
    def test_inputs_so_large_that_few_tokens_matter(self, kind: str, width: float, x64: bool) -> None:
        """With sigma |x| this large exp(score - sigma^2 |x|^2 / 2) would be zero for every token of a drawn prefix."""
        x = inputs()
        x = width * x / jnp.linalg.norm(x, axis=1).max()
        kernel = prefix_ntk(prefix(kind), x)
        # scores up to three widths, in the precision of the run
        tolerance = 20 * 3 * width * float(jnp.finfo(x.dtype).eps)
        assert difference(kernel, autodiff(model(kind), x)) < tolerance


@pytest.mark.usefixtures("without_annotations")
class TestWrongUseIsTold:
    def test_of_inputs(self) -> None:
        given = model("tied")
        with pytest.raises(ValueError, match=r"x1: expected finite numbers, got nan at row 2, column 1"):
            prefix_ntk(given, inputs().at[2, 1].set(jnp.nan))
        with pytest.raises(ValueError, match=r"x2: expected finite numbers, got inf"):
            prefix_ntk(given, inputs(), inputs().at[2, 1].set(jnp.inf))
        with pytest.raises(ValueError, match=r"x1: expected a matrix \[n, d\].*got shape \(2,\)"):
            prefix_ntk(given, inputs()[0])
        with pytest.raises(ValueError, match=r"x2: expected d = 2 columns.*got 5"):
            prefix_ntk(prefix("tied"), inputs(), jnp.zeros((3, 5)))
        with pytest.raises(ValueError, match=r"x1: expected floating point numbers, got int64"):
            prefix_ntk(given, jnp.ones((3, D), int))

    def test_of_options(self) -> None:
        with pytest.raises(ValueError, match=r"block: expected a whole number >= 1, got 0"):
            prefix_ntk(model("tied"), inputs(), block=0)
        with pytest.raises(ValueError, match=r'part: expected "full" or "key", got \'value\''):
            prefix_ntk(model("tied"), inputs(), part="value")  # type: ignore[arg-type]

    def test_of_models(self) -> None:
        with pytest.raises(ValueError, match=r"expected a TiedPrefixModel, .* got Linear.*use empirical_ntk"):
            prefix_ntk(nnx.Linear(D, D, rngs=nnx.Rngs(0)), inputs())  # type: ignore[arg-type]


TEN_MILLION = """
import json
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
from ntk_prefix import RandomPrefix
from ntk_prefix.artifacts import peak_resident_memory as peak
from ntk_prefix.kernels import prefix_ntk

def prefix(m):
    return RandomPrefix(key=jax.random.key(0), d=4, m=m)

x = jax.random.normal(jax.random.key(1), (8, 4)) / 2
small = prefix_ntk(prefix(10**4), x).block_until_ready()
before = peak()
alone = prefix_ntk(prefix(10**7), x)
after_one = peak()
shared = prefix_ntk(prefix(10**7), x, mesh=jax.sharding.Mesh(jax.devices(), ("tokens",)))
after_eight = peak()
prefix(10**7).materialise()[0].block_until_ready()
print(json.dumps({
    "difference": float(abs(alone - shared).max() / abs(alone).max()),
    "control": float(abs(alone - small).max() / abs(alone).max()),
    "one": after_one - before,
    "eight": after_eight - before,
    "materialized": peak() - before,
}))
"""


@pytest.mark.slow
def test_ten_million_tokens_on_one_device_and_on_eight() -> None:
    """A prefix of m = 10^7 in float64, in a process of its own: its peak memory is nobody else's."""
    done = subprocess.run([sys.executable, "-c", TEN_MILLION], cwd=ROOT, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    # sums of 5e6 terms in two orders: sqrt(5e6) roundings are 5e-13
    assert measured["difference"] < 1e-10
    assert measured["control"] > 1e-4
    # a tile of 8192 rows is a few MB a device; 10^7 rows of 4 numbers are 320 MB
    assert measured["one"] < 64 * 2**20
    assert measured["eight"] < 160 * 2**20
    assert measured["materialized"] > 320e6


def test_a_kernel_that_overflows_is_refused() -> None:
    model = TiedPrefixModel(2, 4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    with pytest.raises(FloatingPointError, match="the kernel: expected numbers that float32 holds"):
        prefix_ntk(model, jnp.full((2, 2), 3e38, jnp.float32))
