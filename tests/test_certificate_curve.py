"""What is certified of every single step: the loss from both sides, and the outputs at other inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntk_prefix import RandomPrefix
from ntk_prefix.certificate import certify, curve
from ntk_prefix.certificate.curve import Forecast
from ntk_prefix.certificate.elsewhere import Elsewhere
from ntk_prefix.certificate.reference import Reference
from ntk_prefix.certificate.rounding import Enclosure
from ntk_prefix.one_layer import fixed_outputs, tied_outputs
from tests.test_certificate import D, data
from theory.claims.certificate import _advance
from theory.problem import load


class TestForecast:
    """The curve, where one direction alone makes the worst case known: every constant of it is needed."""

    LEAST, STEPS = 0.5, 200

    @classmethod
    def forecast(cls, drift: float = 0.0, error: float = 0.0, relative: float = 0.0) -> Forecast:
        kernel = Enclosure(np.array([cls.LEAST]), np.eye(1), np.array(0.0), np.array(0.0))
        return Forecast(Reference(kernel, error, np.array([2.0]), 0.0, 0.1, relative), drift, 0.0)

    def run(self, sign: int, drift: float = 0.0, error: float = 0.0, relative: float = 0.0) -> np.ndarray:
        """The loss with everything as far off as it may, and all to one side."""
        jacobian = np.sqrt(self.LEAST * (1 + sign * relative) + sign * error) + sign * drift
        return 2.0 * (1 - 0.1 * jacobian**2) ** (2 * np.arange(self.STEPS))

    @pytest.mark.parametrize("constant", ["drift", "error", "relative"])
    def test_the_worst_runs_are_inside_and_half_worse_ones_are_not(self, constant: str) -> None:
        found = self.forecast(**{constant: 1e-3}).curve(np.arange(self.STEPS))
        for sign in (-1, 1):
            worst, beyond = (self.run(sign, **{constant: size}) for size in (1e-3, 1.5e-3))
            assert ((found.lower <= worst) & (worst <= found.upper)).all()
            assert ((beyond < found.lower) | (found.upper < beyond)).any()

    def test_windows_take_the_deviation_from_above_and_hardly_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        times = np.unique(np.geomspace(1, 400, 40).astype(int))
        rng = np.random.default_rng(3)
        values = np.array([1e-3, 0.02, 0.3, 1.0, 7.0])
        kernel = Enclosure(values, np.eye(5), np.array(0.0), np.array(0.0))
        reference = Reference(kernel, 1e-6, rng.normal(size=5), 0.0, 0.1, 1e-3)
        single = Forecast(reference, 1e-4, 1e-5).curve(times).deviation
        monkeypatch.setattr(curve, "SINGLE", 16)
        several = Forecast(reference, 1e-4, 1e-5)
        assert (single <= several.curve(times).deviation * (1 + 1e-9)).all()
        assert (several.curve(times).deviation <= 1.5 * single).all()
        assert several.reaches(0.5, 10**6) == several.reaches(0.5, 10**6) < 10**6

    def test_the_first_step_below_a_loss(self) -> None:
        forecast = self.forecast(drift=1e-3)
        upper = forecast.curve(np.arange(self.STEPS)).upper
        for error in (1.9, 1.0, 0.1):
            first = forecast.reaches(error, 10**4)
            assert upper[first] <= error**2 / 2 < upper[first - 1]
        assert forecast.reaches(1e-9, 17) == 17


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n", "m", "certified", "own"), [("fixed", 16, 2**14, 82, 75), ("tied", 8, 2**17, 208, 204)]
)
def test_on_digits_it_says_what_certificate_md_says(name: str, n: int, m: int, certified: int, own: int) -> None:
    problem = load("digits", inputs=n, width=8, sigma=1.0, seed=0, profile="quick")
    prefix = RandomPrefix(key=problem.key("certificate", name), d=8, m=m, model=name)
    found = certify(problem.inputs, problem.targets, model=prefix)
    assert found.steps_to(0.01) == certified <= 1.2 * own
    sides = found.curve(own)
    assert sides.kernel[-1] <= 0.01 * sides.kernel[0] < sides.kernel[-2]
    assert found.curve(200).deviation.max() <= 0.01 * np.sqrt(2 * sides.kernel[0])
    weights, signs = prefix.materialise()
    data = (problem.inputs, problem.targets)
    radii = jnp.asarray(found.radii)
    _, (error, _) = _advance(weights, signs, weights, radii, data, jnp.asarray(found.step_size), name, own + 1)
    loss = np.asarray(error) / 2
    assert ((sides.lower <= loss * (1 + 1e-9)) & (loss <= sides.upper)).all()
    assert not ((sides.lower <= 1.1 * loss) & (1.1 * loss <= sides.upper)).all()


class TestElsewhere:
    """Other inputs: each constant of the band is needed, where the worst case is known, and real runs are inside."""

    STEPS = np.arange(200)

    def change(self, kernel: float, error: float, along: float) -> np.ndarray:
        """The output at the other input if the training error falls with ``kernel`` and moves it by ``along``."""
        left = error * (1 - 0.1 * kernel) ** self.STEPS
        return -0.1 * along * (np.cumsum(left) - left)

    @pytest.mark.parametrize("constant", ["drift of the training", "drift there", "kernel"])
    def test_the_worst_runs_are_inside_and_half_worse_ones_are_not(self, constant: str) -> None:
        size, root = 1e-3, np.sqrt(TestForecast.LEAST)
        training, there, error = (
            size * (constant == what) for what in ("drift of the training", "drift there", "kernel")
        )
        found = Elsewhere(
            forecast=TestForecast.forecast(drift=training, error=error),
            start=np.zeros((1, 1)),
            start_error=0.0,
            kernel=np.array([[root * (constant == "kernel")]]),
            kernel_error=0.0,
            steepest=float(constant != "drift there"),
            drift=there,
        ).predict(self.STEPS.astype(float))
        for size, inside in ((1e-3, True), (1.5e-3, False)):
            run = {
                # the training moves what it did not move, and the other input with it
                "drift of the training": self.change(root**2 + size**2, 2.0, size),
                "drift there": self.change(root**2, 2.0, size * root),
                "kernel": self.change(root**2 - size, 2.0, root),
            }[constant]
            assert (np.abs(run - found.outputs[:, 0, 0]) <= found.deviation).all() == inside

    @pytest.mark.parametrize("name", ["fixed", "tied"])
    def test_a_real_run_is_inside_and_one_of_another_start_is_not(self, name: str) -> None:
        x, y = data()
        prefix = RandomPrefix(key=jax.random.key(1), d=D, m=2**14, model=name)
        x_test = jnp.roll(x, 1, axis=0) / 2
        certificate = certify(x, y, model=prefix, x_test=x_test)
        weights, signs = prefix.materialise()
        outputs = tied_outputs if name == "tied" else fixed_outputs
        found = certificate.predict(np.array([50]))
        wrong = certify(x, 1.3 * y, model=prefix, x_test=x_test).predict(np.array([50]))
        free = jnp.ones(prefix.m)
        moved, _ = _advance(weights, signs, weights, free, (x, y), jnp.asarray(certificate.step_size), name, 50)
        run = np.asarray(outputs(moved, signs, x_test))
        assert np.linalg.norm(run - found.outputs[0]) <= found.deviation[0] < 0.1 * np.linalg.norm(run)
        assert np.linalg.norm(run - wrong.outputs[0]) > wrong.deviation[0]

    def test_without_other_inputs_it_says_so(self) -> None:
        x, y = data()
        with pytest.raises(ValueError, match=r"predict: expected inputs.*certify\(..., x_test=...\)"):
            certify(x, y, m=4096).predict(3)
        with pytest.raises(ValueError, match="x_test: expected None beside delta"):
            certify(x, y, delta=0.1, x_test=x)
