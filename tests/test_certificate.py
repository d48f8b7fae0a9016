"""The certificate: what it certifies happens, what it computes bounds what it says, and it refuses what it must."""

import dataclasses
from collections.abc import Callable, Iterator
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ntk_prefix import FixedValuePrefixModel, RandomPrefix, TiedPrefixModel
from ntk_prefix.certificate import certify, certify_draws, curve, find_m, theorem
from ntk_prefix.certificate.curve import Forecast
from ntk_prefix.certificate.prior import Prior
from ntk_prefix.certificate.reference import Reference
from ntk_prefix.certificate.rounding import Enclosure, eigen_enclosure, gamma
from ntk_prefix.certificate.tokens import Ball, Claimed, Tokens
from ntk_prefix.kernels import prefix_ntk
from ntk_prefix.one_layer import fixed_jacobian, tied_jacobian
from theory.claims.certificate import _advance

N, D = 3, 2


def data(seed: int = 0, n: int = N, d: int = D) -> tuple[jax.Array, jax.Array]:
    """Points in a ball, far enough apart for a kernel that is positive, and small targets."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    return jnp.asarray(x / np.linalg.norm(x, axis=1).max()), jnp.asarray(rng.uniform(-1, 1, (n, d)) / np.sqrt(d))


def drawn(name: str, m: int, seed: int = 0, sigma: float = 1.0, symmetric: bool = True):
    rngs = nnx.Rngs(seed)
    if name == "tied":
        model = TiedPrefixModel(D, m, symmetric=symmetric, rngs=rngs)
    else:
        model = FixedValuePrefixModel(D, m, symmetric=symmetric, rngs=rngs)
    model.weights[...] = sigma * model.weights[...]  # a width of its own would be a program of its own
    return model


def jacobian(model, x, weights=None) -> np.ndarray:
    """[n o, m d]."""
    derivative = tied_jacobian if isinstance(model, TiedPrefixModel) else fixed_jacobian
    weights = model.weights[...] if weights is None else weights
    found = derivative(jnp.asarray(weights), model.signs[...], x)
    return np.asarray(found).reshape(found.shape[0] * found.shape[1], -1)


class TestRounding:
    def test_gamma_bounds_a_sum(self) -> None:
        terms = np.random.default_rng(0).uniform(size=1000)
        exact = sum(map(Fraction, terms))
        naive = 0.0
        for term in terms:
            naive += term
        assert abs(Fraction(naive) - exact) <= Fraction(gamma(999)) * exact

    @pytest.mark.parametrize("size", [1, 5, 40])
    def test_the_enclosure_holds_the_spectrum_of_an_exact_matrix(self, size: int) -> None:
        # a reflection of a diagonal of integers: both exact in the limit, the product nearly so
        rng = np.random.default_rng(size)
        exact = np.sort(rng.integers(1, 1000, size)).astype(float)
        basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
        matrix = (basis * exact) @ basis.T
        matrix = (matrix + matrix.T) / 2
        found = eigen_enclosure(matrix)
        assert np.abs(found.values - exact).max() <= found.radius + 1e-10
        assert found.radius < 1e-7

    def test_a_wrong_decomposition_widens_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        matrix = np.diag([1.0, 2.0, 3.0])
        values, basis = np.linalg.eigh(matrix)
        monkeypatch.setattr(np.linalg, "eigh", lambda a: (values + 0.125, basis))
        assert eigen_enclosure(matrix).radius >= 0.125


class TestReference:
    def reference(self, relative: float = 0.0) -> Reference:
        rng = np.random.default_rng(1)
        basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
        values = np.array([0.02, 0.05, 0.3, 1.0, 2.0, 7.0])
        kernel = Enclosure(values, basis, np.array(0.0), np.array(1e-14))
        return Reference(kernel, 0.0, rng.normal(size=6), 0.0, 0.1, relative)

    def test_sums_are_from_above_and_near(self) -> None:
        reference = self.reference()
        values, basis = reference.kernel.values, reference.kernel.basis
        times = np.arange(20_000)[:, None]
        powers = (1 - 0.1 * values[None]) ** times
        run = powers * (basis.T @ reference.error)[None]
        for bound, exact in (
            (reference.outputs, np.linalg.norm(run, axis=1)),
            (reference.weights, np.linalg.norm(np.sqrt(values)[None] * run, axis=1)),
            (reference.half, (np.sqrt(values)[None] * powers).max(1)),
            (reference.whole, (values[None] * powers).max(1)),
        ):
            total = 0.1 * exact.sum()
            assert total <= bound <= 1.05 * total

    def test_the_polygon_is_as_near_as_it_says(self) -> None:
        reference = self.reference()
        points, between = reference.polygon()
        values, basis = reference.kernel.values, reference.kernel.basis
        coefficients = basis.T @ reference.error
        rng = np.random.default_rng(0)
        for t in range(0, 5000, 7):
            q = basis @ (coefficients / values * (1 - (1 - 0.1 * values) ** t))
            for direction in rng.normal(size=(4, 6)):
                assert direction @ q <= (points @ direction).max() + between * np.linalg.norm(direction)
        assert between < 0.05 * np.linalg.norm(points, axis=1).max()

    @pytest.mark.parametrize("relative", [0.0, 0.02])
    def test_paths_bound_every_perturbed_run(self, relative: float, monkeypatch: pytest.MonkeyPatch) -> None:
        """Jacobians anywhere within the drift, adversarial in time: the sums stay under P, G and V, the error near."""
        monkeypatch.setattr(curve, "SINGLE", 16)
        reference = self.reference(relative)
        values, basis = reference.kernel.values, reference.kernel.basis
        rng = np.random.default_rng(2)
        root = (basis * np.sqrt(values)) @ basis.T
        for drift in (1e-3, 5e-3):
            assert all(step.holds for step in reference.steps(drift))
            paths = reference.paths(drift)
            near = Forecast(reference, drift, theorem.descent(reference, drift)[1]).curve(np.arange(3000)).deviation
            for _ in range(4):
                wobble = rng.normal(size=(6, 6))
                wobble = relative * (wobble + wobble.T) / 2 / np.linalg.norm((wobble + wobble.T) / 2, 2)
                # H(W(0)) = J J^T with some square root J, turned at random
                kernel = root @ (np.eye(6) + wobble) @ root
                jac = np.linalg.cholesky(kernel) @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
                bad = rng.normal(size=(2, 6, 6))
                error = reference.error.copy()
                straight, moved, lin_moved = reference.error.copy(), np.zeros(6), np.zeros(6)
                outputs = weights = deviation = 0.0
                for t in range(3000):
                    assert np.linalg.norm(error - straight) <= near[t]
                    if t % 40 == 0:
                        bad = rng.normal(size=(2, 6, 6))
                        bad = drift * bad / np.linalg.norm(bad, 2, axis=(1, 2))[:, None, None]
                    step = (jac + bad[0]).T @ error
                    outputs += 0.1 * np.linalg.norm(error)
                    weights += 0.1 * np.linalg.norm(step)
                    moved, lin_moved = moved - 0.1 * step, lin_moved - 0.1 * jac.T @ straight
                    error = error - 0.1 * (jac + bad[1]) @ step
                    straight = straight - 0.1 * root @ root @ straight
                    deviation = max(deviation, float(np.linalg.norm(moved - lin_moved)))
                assert outputs <= paths.outputs
                assert weights <= paths.weights
                assert deviation <= paths.deviation


def closed(tokens: Tokens, total: float, movement: np.ndarray, factor: float) -> tuple[Claimed, Ball]:
    """Claim ``factor`` times what the last pass computed of h and s, until a pass computes no more than was claimed."""
    spread = tokens.second_moments()[0]
    claimed = Claimed(total, np.zeros(N), np.zeros(N))
    for _ in range(8):
        ball = tokens.ball(claimed, movement, spread)
        if (ball.normalizer <= claimed.normalizer).all() and (ball.center <= claimed.center).all():
            return claimed, ball
        claimed = Claimed(total, factor * ball.normalizer, factor * ball.center)
    raise AssertionError("no claim implies itself")


class TestTokens:
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("name", ["fixed", "tied"])
    def test_the_drift_in_the_ball_is_bounded(self, name: str, symmetric: bool) -> None:
        """Displacements of every kind in the ball: no Jacobian leaves it, no mean value, no normalizer."""
        x, _ = data()
        m = 64
        model = drawn(name, m, symmetric=symmetric)
        tokens = Tokens(model, x)
        rng = np.random.default_rng(0)
        start = jacobian(model, x)
        center = np.asarray(model(x)) / m
        for scale in (1e-3, 3e-2):
            rho = scale * rng.uniform(0.1, 1, m)
            movement = np.zeros((1, 8192))
            movement[0, :m] = rho
            total = 2 * scale
            claimed, ball = closed(tokens, total, movement, 1.1)
            worst = 0.0
            weights = np.asarray(model.weights[...])
            # along one input the attention of every token grows or shrinks together
            inputs = np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True)
            signs = np.asarray(model.signs[...])[:, :1]
            for trial in range(60):
                if trial % 3 == 0:
                    direction = rng.normal(size=weights.shape)
                elif trial % 3 == 1:
                    direction = inputs[rng.integers(N)][None] * signs
                else:
                    direction = inputs[rng.integers(N)][None] * np.sign(rng.normal(size=(m, 1)))
                u = rho[:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)
                deviation = rng.normal(size=weights.shape) * (rng.uniform(size=(m, 1)) < rng.choice([0.02, 0.3, 1]))
                deviation *= total / max(np.linalg.norm(deviation), 1e-12)
                moved = weights + u + deviation
                drift = np.linalg.norm(jacobian(model, x, moved) - start, 2) / np.sqrt(m)
                worst = max(worst, drift)
                assert drift <= ball.drift
                values = np.asarray(model.signs[...]) * (moved if name == "tied" else 1)
                attention = np.asarray(jax.nn.softmax(x @ moved.T, axis=1))
                assert (np.linalg.norm(attention @ values - center, axis=1) <= claimed.center).all()
                before = np.asarray(jax.nn.softmax(x @ weights.T, axis=1))
                shift = np.log((before * np.exp(np.asarray(x) @ (moved - weights).T)).sum(1))
                assert (np.abs(shift) <= claimed.normalizer).all()
            assert worst > ball.drift / 30, "a bound so far off tests nothing"

    @pytest.mark.parametrize("name", ["fixed", "tied"])
    def test_two_thirds_of_each_bound_are_exceeded(self, name: str) -> None:
        """Where one token weighs much more than the rest, and yet little of all, and the ball is of one kind."""
        x, m, size = np.array([[1.0, 0.0], [0.0, 0.01], [0.01, 0.01]]), 8192, 1e-3
        tied = name == "tied"
        model = drawn(name, m, symmetric=False)
        signs = np.where(np.arange(m) % 2, -1.0, 1.0)[:, None]
        weights = np.zeros((m, D))
        weights[0, 0] = np.log(128)
        model.weights[...], model.signs[...] = jnp.asarray(weights), jnp.broadcast_to(signs, model.signs.shape)
        tokens = Tokens(model, jnp.asarray(x))

        def at(moved: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            """J, c and log sum_r e^{x_i . w_r}."""
            mass = np.exp(x @ moved.T)
            total = mass.sum(1, keepdims=True)
            mass *= m / total
            values = signs * (moved if tied else np.ones((1, D)))
            center = mass @ values / m
            block = np.einsum("ir,irk,ic->ikrc", mass, values[None] - center[:, None], x)
            if tied:
                block += np.einsum("ir,r,kc->ikrc", mass, signs[:, 0], np.eye(D))
            return block.reshape(N * D, -1), center, np.log(total)

        start = at(weights)
        share = np.exp(weights[:, :1]) / np.linalg.norm(np.exp(weights[:, 0]))
        alone = (np.arange(m) == 0)[:, None].astype(float)
        for total, moves in ((size, [alone, share, share * signs]), (0.0, [alone, np.ones((m, 1)), signs])):
            found: dict[str, float] = {}
            for move in moves:
                movement = np.zeros((1, m)) if total else size * np.abs(move.T)
                ball = closed(tokens, total, movement, 1.02)[1]
                moved = at(weights + size * move * [[1.0, 0.0]])
                change = moved[0] - start[0]
                ratios = {
                    "drift": np.sqrt(np.linalg.eigvalsh(change @ change.T)[-1] / m) / ball.drift,
                    "center": float(np.linalg.norm(moved[1] - start[1], axis=1)[0] / ball.center[0]),
                    "normalizer": float(np.abs(moved[2] - start[2])[0, 0] / ball.normalizer[0]),
                }
                found = {what: max(ratio, found.get(what, 0.0)) for what, ratio in ratios.items()}
            assert all(ratio <= 1 for ratio in found.values())
            assert all(ratio > 1 / 1.5 for ratio in found.values()), found

    @pytest.mark.parametrize("name", ["fixed", "tied"])
    def test_the_linearized_movement(self, name: str) -> None:
        x, _ = data()
        m = 64
        model = drawn(name, m, symmetric=False)
        path = np.random.default_rng(0).normal(size=(5, N, D))
        moved = jacobian(model, x).T @ path.reshape(5, -1).T / m
        lengths = np.linalg.norm(moved.reshape(m, D, 5), axis=1).max(1)
        found = Tokens(model, x).movement(path, 0.0).ravel()[:m]
        assert (lengths <= found).all()
        assert (found <= lengths * (1 + 1e-9) + 1e-12).all()
        wider = Tokens(model, x).movement(path, 0.5).ravel()[:m]
        rows = np.linalg.norm(jacobian(model, x).reshape(-1, m, D), axis=(0, 2))
        assert (wider >= lengths + 0.5 * rows / m).all()

    @pytest.mark.parametrize("name", ["fixed", "tied"])
    def test_the_kernel_rounding_covers_the_difference_of_two_ways_to_compute_it(self, name: str) -> None:
        x, _ = data()
        model = drawn(name, 64, symmetric=False)
        jac = jacobian(model, x)
        kernel = np.asarray(prefix_ntk(model, x)).reshape(N * D, -1)
        error = Tokens(model, x).second_moments()[1]
        assert np.linalg.norm(kernel - jac @ jac.T / 64) <= error < 1e-8

    @pytest.mark.parametrize("name", ["fixed", "tied"])
    def test_the_rounding_of_the_outputs_is_bounded_and_hardly_grows_with_the_prefix(self, name: str) -> None:
        x, _ = data()
        bounds = []
        for m in (2**12, 2**16):
            prefix = RandomPrefix(key=jax.random.key(3), d=D, m=m, model=name, symmetric=False)
            tokens = Tokens(prefix, x)
            found, bound = tokens.outputs_now()
            weights, signs = (np.asarray(part, np.longdouble) for part in prefix.materialise())
            mass = np.exp(np.asarray(x, np.longdouble) @ weights.T)
            exact = m * (mass @ (signs * weights if name == "tied" else signs)) / mass.sum(1, keepdims=True)
            assert np.linalg.norm(found - exact) <= bound
            bounds.append(bound / m)
        assert bounds[1] < 3 * bounds[0]

    @pytest.mark.parametrize("name", ["fixed", "tied"])
    def test_half_of_the_pairs_says_the_same_as_all_tokens(self, name: str) -> None:
        x, y = data()
        prefix = RandomPrefix(key=jax.random.key(3), d=D, m=4096, model=name)
        model = drawn(name, 4096)
        model.weights[...], model.signs[...] = prefix.materialise()
        short, full = (certify(x, y, model=start) for start in (prefix, model))
        assert short.drift == pytest.approx(full.drift, rel=1e-3)
        assert np.allclose(short.radii, full.radii, rtol=1e-3)
        assert short.holds == full.holds


def hostile_inputs(rng: np.random.Generator) -> np.ndarray:
    """Points anywhere, on a line, or two of them next to one another; of norms from 0.1 to 2."""
    x = rng.normal(size=(N, D))
    kind = rng.integers(4)
    if kind == 0:
        x = rng.uniform(0.5, 2, (N, 1)) * np.arange(1, N + 1)[:, None] * x[:1] + 10.0 ** -rng.uniform(1, 6) * x
    if kind == 1:
        x[1] = x[0] + 10.0 ** -rng.uniform(1, 4) * x[1]
    return 10 ** rng.uniform(-1, 0.3) * x / np.linalg.norm(x, axis=1).max()


def hostile_weights(rng: np.random.Generator, x: np.ndarray, m: int) -> np.ndarray:
    """Tokens as drawn, with heavy tails, a few far out along an input, all on a line, on a grid, or float32's."""
    w = rng.choice([0.1, 0.5, 1.0, 1.5]) * rng.normal(size=(m, D))
    kind = rng.integers(6)
    if kind == 0:
        w = w / np.maximum(np.abs(rng.normal(size=(m, 1))), 0.1)
    if kind == 1:
        w[:2] = rng.uniform(1, 6) * x[0] / np.linalg.norm(x[0]) ** 2
    if kind == 2:
        w = rng.normal(size=(m, 1)) * w[:1]
    if kind == 3:
        w = np.round(4 * w) / 4
    if kind == 4:
        w = w.astype(np.float32).astype(float)
    return w


def hostile_targets(rng: np.random.Generator, outputs: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """F(0) + y with y along the slowest direction, the fastest, or anywhere, of length 1."""
    basis = np.linalg.eigh(kernel)[1]
    y = (basis[:, 0], basis[:, -1], rng.normal(size=N * D), kernel @ rng.normal(size=N * D))[rng.integers(4)]
    return y.reshape(N, D) / np.linalg.norm(y)


def run_and_compare(count: int, seed: int) -> tuple[int, int, int]:
    """Problems made to break it: how many were certified, left what was certified, and rose though they must not."""
    rng = np.random.default_rng(seed)
    certified = broken = left = 0
    for trial in range(count):
        name = ("fixed", "tied")[trial % 2]
        m = (64, 4096, 4096)[trial // 2 % 3]
        points = hostile_inputs(rng)
        x = jnp.asarray(points)
        model = drawn(name, m, int(rng.integers(2**31)), symmetric=trial % 5 > 0)
        half = hostile_weights(rng, points, m // 2)
        # pairs stand beside one another
        model.weights[...] = jnp.asarray(np.repeat(half, 2, axis=0) if trial % 5 else hostile_weights(rng, points, m))
        kernel = np.asarray(prefix_ntk(model, x)).reshape(N * D, -1)
        now = np.asarray(model(x))
        y = hostile_targets(rng, now, kernel)
        step_size = rng.choice([0.05, 0.2, 0.5, 0.9, 3.0]) / (m * np.linalg.eigvalsh(kernel)[-1])
        # the longest targets that are certified, or nearly
        for shorter in 4.0 ** np.arange(8):
            data = (x, jnp.asarray(now + y / shorter))
            certificate = certify(*data, model=model, step_size=step_size)
            if certificate.holds or certificate.steps[-1].what.startswith("the step is stable"):
                break
        # a refused certificate gives no rate: then its envelope is that the loss does not rise
        start, radii = model.weights[...], jnp.asarray(certificate.radii if certificate.holds else np.ones(m))
        _, (error, reach) = _advance(start, model.signs[...], start, radii, data, jnp.asarray(step_size), name, 300)
        error = np.nan_to_num(np.asarray(error), nan=1e200).clip(max=1e200)
        # F = m c is rounded by m units of the largest value, times what scores are rounded by: below that the loss is rounding
        longest = max(1.0, float(np.abs(model.weights[...]).max()))
        size = m * 2.0**-52 * longest * (4 + longest * float(np.abs(points).max()))
        slack = 1e-12 + 2 * size / np.sqrt(np.maximum(error, 1e-300))
        seen = slack < 1e-2
        rises = bool((error[1:] > (1 - certificate.rate) * error[:-1] * (1 + slack[:-1]))[seen[:-1]].any())
        left += rises
        certified += certificate.holds
        if certificate.holds:
            over = (error > certificate.envelope(len(error) - 1) * (1 + slack))[seen].any()
            sides = certificate.curve(len(error) - 1)
            outside = ((error / 2 < sides.lower * (1 - slack)) | (error / 2 > sides.upper * (1 + slack)))[seen].any()
            broken += rises or bool(over) or bool(outside) or float(reach.max()) > 1
    return certified, broken, left


@pytest.fixture(scope="class")
def optimized() -> Iterator[None]:
    """Runs here are long: what the suite saves in compilation they would lose. Windows of several steps are fewer."""
    jax.config.update("jax_disable_most_optimizations", False)
    single, curve.SINGLE = curve.SINGLE, 8
    yield
    curve.SINGLE = single
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.usefixtures("optimized")
class TestPromise:
    @pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
    def test_no_certified_run_leaves_its_envelope(self, count: int) -> None:
        certified, broken, left = run_and_compare(count, seed=0)
        assert broken == 0
        assert certified >= 0.4 * count, "hardly anything was certified: hardly anything was tested"
        assert left >= 0.1 * count, "hardly a run left its envelope: the certificates were not put to the test"

    def test_a_sabotaged_rate_is_noticed(self) -> None:
        """The comparison above can fail: the same run against an envelope that falls too fast."""
        x, y = data()
        model = drawn("fixed", 4096)
        certificate = certify(x, y, model=model)
        assert certificate.holds
        faster = dataclasses.replace(certificate, rate=20 * certificate.rate)
        start = model.weights[...]
        _, (error, _) = _advance(
            start,
            model.signs[...],
            start,
            start[:, 0] ** 2 + 1,
            (x, y),
            jnp.asarray(certificate.step_size),
            "fixed",
            300,
        )
        assert (np.asarray(error) <= certificate.envelope(299)).all()
        assert not (np.asarray(error) <= faster.envelope(299)).all()


class TestCertificate:
    def test_a_short_prefix_is_refused_with_the_step_that_fails(self) -> None:
        x, y = data()
        refused = certify(x, y, model=drawn("fixed", 32))
        assert not refused.holds
        assert refused.margin < 1
        assert "The step that fails: the drift is small" in refused.explain()
        with pytest.raises(ValueError, match="does not hold"):
            refused.steps_to(0.1)

    def test_equal_inputs_are_refused_at_the_kernel(self) -> None:
        x, y = data()
        refused = certify(x.at[1].set(x[0]), y, model=drawn("fixed", 512))
        assert "The step that fails: the kernel is positive" in refused.explain()

    def test_too_large_a_step_is_refused(self) -> None:
        x, y = data()
        held = certify(x, y, model=drawn("fixed", 4096))
        assert held.holds
        refused = certify(x, y, model=drawn("fixed", 4096), step_size=4.5 * held.step_size)
        assert "the step is stable" in refused.explain().splitlines()[1]

    def test_find_m_brackets_the_smallest(self) -> None:
        x, y = data()
        tried: list[tuple[int, bool]] = []
        found = find_m(x, y, start=64, resolution=0.3, progress=lambda *told: tried.append(told))
        assert tried[:2] == [(64, False), (128, False)]
        assert found.m == min(m for m, holds in tried if holds)
        assert found.holds
        assert not certify(x, y, m=found.m // 4 * 2).holds
        assert found.steps_to(0.01) > 1
        assert "certified" in found.explain()

    def test_a_trained_prefix_is_certified_at_lengths_where_a_fresh_one_is_not(self) -> None:
        x, y = data()
        model = drawn("fixed", 512)
        fresh = certify(x, y, model=model)
        assert not fresh.holds
        start = model.weights[...]
        weights, _ = _advance(
            start, model.signs[...], start, jnp.ones(512), (x, y), jnp.asarray(fresh.step_size), "fixed", 3000
        )
        model.weights[...] = weights
        assert certify(x, y, model=model).holds

    @pytest.mark.parametrize("name", ["fixed", "tied"])
    def test_tokens_drift_no_further_without_pairs_once_the_offset_is_removed(self, name: str) -> None:
        """Of the same tokens: two draws differ in their heaviest token, and so by more than pairs do."""
        x, y = data()
        paired, plain = drawn(name, 4096), drawn(name, 4096, seed=1, symmetric=False)
        plain.weights[...] = paired.weights[...]
        with_pairs = certify(x, y, model=paired)
        removed = certify(x, y, model=plain, remove_offset=True)
        moved = certify(x, y + Tokens(plain, x).outputs_now()[0], model=plain)
        assert with_pairs.holds
        assert removed.holds
        assert removed.drift == pytest.approx(with_pairs.drift, rel=0.1)
        assert moved.drift == pytest.approx(removed.drift, rel=1e-5)
        assert not certify(x, y, model=plain).holds

    def test_a_given_step_is_kept_by_the_search(self) -> None:
        x, y = data()
        own = find_m(x, y, resolution=1.0)
        slower = certify(x, y, step_size=own.step_size / 2)
        assert slower.holds
        assert slower.step_size == pytest.approx(own.step_size / 2, rel=1e-12)
        assert slower.rate == pytest.approx(slower.m * slower.step_size * slower.smallest, rel=1.0)

    def test_a_refusal_says_what_would_mend_it(self) -> None:
        x, y = data()
        refused = certify(x, y, m=32)
        assert 'certificate.find_m(x, y, model="fixed") finds the shortest' in refused.explain()
        with pytest.raises(ValueError, match="envelope: this certificate does not hold"):
            refused.envelope(3)

    def test_the_search_gives_up_at_once_where_no_length_has_a_certificate(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x, y = data()
        tried = []
        monkeypatch.setattr(theorem, "certify", lambda *args, **options: tried.append(1) or certify(*args, **options))
        refused = find_m(x.at[1].set(x[0]), y)
        assert "No length mends it where inputs are equal" in refused.explain()
        assert len(tried) == 1

    @pytest.mark.parametrize("name", ["fixed", "tied"])
    def test_a_priori(self, name: str) -> None:
        x, y = data()
        prior = certify(x, y, model=name, delta=0.1)
        assert prior.holds
        assert prior.failure == 0.1
        assert "with probability at least 0.9" in prior.explain()
        # it speaks of every draw, so it asks for more than any
        assert prior.m > certify(x, y, model=name, delta=0.5).m > 4096
        assert not certify(x, y, model=name, delta=0.1, m=prior.m // 8 * 2).holds

    def test_a_priori_nothing_to_learn_is_learnt_and_no_kernel_is_refused(self) -> None:
        x, y = data()
        assert certify(x, 0 * y, delta=0.1).holds
        assert "the limit kernel is positive" in certify(1e-170 * x, y, delta=0.1).explain().splitlines()[1]

    def test_draws_bound_how_likely_a_prefix_is_certified(self) -> None:
        x, y = data()
        all_of_them = certify_draws(x, y, m=4096, draws=4, delta=0.1)
        assert all_of_them.certified == 4
        assert all_of_them.probability == pytest.approx(0.1 ** (1 / 4))
        assert all_of_them.rate > 0
        some = certify_draws(x, y, m=1024, draws=8, key=jax.random.key(2))
        keys = [jax.random.fold_in(jax.random.key(2), draw) for draw in range(8)]
        assert 0 < some.certified == sum(certify(x, y, m=1024, key=key).holds for key in keys) < 8
        assert 0 < some.probability < some.certified / 8
        assert certify_draws(x, y, m=16, draws=2).probability == 0
        with pytest.raises(ValueError, match="delta: expected a probability"):
            certify_draws(x, y, m=16, delta=1.0)

    @pytest.mark.parametrize("name", ["fixed", "tied"])
    def test_the_moments_bound_what_is_drawn(self, name: str) -> None:
        """The mean square of the whitened kernel's error is at most the moment over the tokens."""
        x, y = data()
        prior = Prior(inputs=np.asarray(x), targets=np.asarray(y), sigma=0.5, model=name, failure=0.1)
        root = np.linalg.inv(np.linalg.cholesky((prior.kernel.basis * prior.kernel.values) @ prior.kernel.basis.T))
        rows = 256
        squares = []
        for seed in range(200):
            model = drawn(name, rows, seed, 0.5, symmetric=False)
            w, a = np.asarray(model.weights[...]), np.asarray(model.signs[...])
            tilt = np.exp(np.asarray(x) @ w.T - 0.125 * np.square(x).sum(1)[:, None])
            block = np.einsum("ir,rk,ic->ikrc", tilt, a * w if name == "tied" else a, x)
            if name == "tied":
                block += np.einsum("ir,r,kc->ikrc", tilt, a[:, 0], np.eye(D))
            jac = root @ block.reshape(N * D, -1)
            squares.append(np.square(jac @ jac.T / rows - np.eye(N * D)).sum())
        assert np.mean(squares) <= prior.moments.kernel / rows
        if name == "fixed":  # what is subtracted, the squared mean, is small beside it
            assert np.mean(squares) >= prior.moments.kernel / rows / 3

    @pytest.mark.parametrize("name", ["fixed", "tied"])
    def test_what_is_not_known_of_the_limit_is_in_the_moments(self, name: str) -> None:
        """A kernel that is a millionth too large makes tokens look smaller: by less than its radius allows for."""
        x, y = data()
        prior = Prior(inputs=np.asarray(x), targets=np.asarray(y), sigma=0.5, model=name, failure=0.1)
        exact, (values, basis, _, tilt) = prior.moments.kernel, prior.kernel
        limit = (basis * values) @ basis.T
        moments = {}
        for radius in (0.0, 1e-6 * np.linalg.norm(values)):
            object.__setattr__(prior, "kernel", Enclosure((1 + 1e-6) * values, basis, np.array(radius), tilt))
            moments[radius] = prior._moments(limit).kernel
        blind, seeing = moments.values()
        assert blind < exact <= seeing < 1.1 * exact

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda x, y: certify(x, y[:, :1], model="tied", m=64), "y: expected one row of 2 targets"),
            (lambda x, y: certify(x, y, delta=1.5), "delta: expected a probability"),
            (lambda x, y: certify(x, y, delta=0.1, symmetric=False), "pairs of tokens"),
            (lambda x, y: certify(x.astype(jnp.float32), y, m=64), "x: expected float64"),
            (lambda x, y: certify(x, y.astype(int), m=64), "y: expected float64, got int64"),
            (lambda x, y: find_m(x, jnp.arange(len(x))), r"y: expected targets \[n, outputs\].*jax.nn.one_hot"),
            (lambda x, y: certify(x, y.at[0, 0].set(jnp.nan), m=64), "y: expected finite numbers"),
            (lambda x, y: certify(x, 1e-170 * y, m=4096), r"expected \|F\(0\) - Y\|"),
            (lambda x, y: certify(1e200 * x, y, m=64), "x: expected entries up to 1e.100"),
            (lambda x, y: certify(x, 1e200 * y, m=64), "y: expected entries up to 1e.100"),
            (lambda x, y: certify(x, 1e-170 * y, delta=0.1), r"expected \|F\(0\) - Y\|"),
            (lambda x, y: certify(x, y, delta=0.1, step_size=1e-310), "m eta lambda_min"),
            (lambda x, y: certify(x, y, delta=0.1, sigma=1e200), r"x: expected sigma\^2 \|x_i\|\^2 <= 100, got inf"),
            (lambda x, y: certify(x, y, delta=0.1, m=10**400), "m: expected at most 1e.300 prefix tokens"),
            (lambda x, y: eigen_enclosure(np.diag([1.0, np.inf])), "entries up to 1e.140, got inf"),
            (lambda x, y: certify(30 * x, y, delta=0.1), r"x: expected sigma\^2 \|x_i\|\^2 <= 100"),
            (lambda x, y: certify(x, y, m=64, step_size=-1.0), "step_size: expected a finite number > 0"),
            (lambda x, y: certify(x, y, delta=0.1, step_size=0.0), "step_size: expected a finite number > 0"),
            (lambda x, y: certify(x, y, m=64, step_size=1e-310), "m eta lambda_min"),
            (lambda x, y: certify(x, y, m=10**9 + 1, delta=0.1), "m: expected an even number"),
            (lambda x, y: certify(x, y, m=0, delta=0.1), "m: expected a whole number >= 2"),
            (lambda x, y: certify(x, y, m=3), "m: expected an even number"),
            (lambda x, y: certify(x, y, model="tide", m=64), 'model: expected "tied" or "fixed"'),
            (lambda x, y: certify(x, y, model=drawn("fixed", 64), delta=0.1), "delta: expected None beside a model"),
            (lambda x, y: certify(x, y, model=drawn("fixed", 64), m=64), "m: expected None beside a model"),
            (
                lambda x, y: certify(x, y, model=spoiled("fixed", "weights", jnp.nan)),
                "the model's weights: expected fin",
            ),
            (lambda x, y: certify(x, y, model=spoiled("tied", "signs", 3.0)), "signs: expected -1 or .1 .* got 3"),
            (lambda x, y: find_m(x, y, model=drawn("fixed", 64)), r"certify\(x, y, model=model\)"),
            (lambda x, y: find_m(x, y, start=65), "start: expected an even number"),
            (lambda x, y: find_m(x, y, resolution=0.0), "resolution: expected a finite number > 0"),
            (lambda x, y: certify(x, y, model=drawn("fixed", 4096)).envelope(-1), "steps: expected a whole number"),
            (
                lambda x, y: certify(x, y, model=drawn("fixed", 4096)).curve(np.array([0.5])),
                "steps: expected a whole nu",
            ),
            (lambda x, y: certify(x, y, model=drawn("fixed", 32)).curve(3), "curve: this certificate does not hold"),
        ],
    )
    def test_errors_say_what_to_do(self, call: Callable, message: str, without_annotations: None) -> None:
        with pytest.raises(ValueError, match=message):
            call(*data())

    def test_without_64_bit_numbers_it_says_so(self, without_annotations: None) -> None:
        x, y = data()
        with jax.enable_x64(False), pytest.raises(ValueError, match="enable_x64"):
            certify(x, y, m=64)

    def test_the_lines_of_the_readme_run(self) -> None:
        """In a program of 32-bit numbers, with a 32-bit model, inside of `with jax.enable_x64(True)`."""
        with jax.enable_x64(False):
            model = FixedValuePrefixModel(d=2, m=4096, rngs=nnx.Rngs(0))
            x = jnp.asarray(data()[0], jnp.float32)
            labels = jnp.arange(len(x)) % 2
            with jax.enable_x64(True):
                y = jax.nn.one_hot(labels, 2, dtype=float)
                certificate = certify(x.astype(float), 0.1 * y, model=model)
            assert certificate.holds


def spoiled(name: str, attribute: str, value: float) -> FixedValuePrefixModel | TiedPrefixModel:
    """A model with one number replaced."""
    model = drawn(name, 64)
    variable = getattr(model, attribute)
    variable[...] = variable[...].at[0, 0].set(value)
    return model


def test_a_failure_whose_parts_vanish_is_refused() -> None:
    with (
        jax.enable_x64(True),
        pytest.raises(ValueError, match="delta: expected a probability from 1e-300 to 1, got 5e-324"),
    ):
        certify(jnp.ones((1, 2)), jnp.ones((1, 2)), m=64, delta=5e-324)


def test_scores_that_are_lost_to_rounding_are_refused() -> None:
    with (
        jax.enable_x64(True),
        pytest.raises(ValueError, match=r"x and the prefix: expected scores .* whose rounding is small"),
    ):
        certify(jnp.ones((1, 2)), jnp.ones((1, 2)), m=64, sigma=1e300)
