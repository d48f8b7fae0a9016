"""The fixed transformer whose prompt is a table, part by part and as a whole, and what prompts can memorize."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntk_prefix as npx
from ntk_prefix import prompting
from ntk_prefix.prompting import Construction, Function, apply
from theory.claims import memorisation, universality
from theory.lipschitz import functions, largest_error, tents
from theory.problem import Problem, load

SMALL = [(1, 1, 5), (2, 1, 3), (1, 2, 4), (3, 1, 3), (1, 3, 3), (2, 2, 2)]
"""d, L, grid."""


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def problem() -> Problem:
    return load("digits", inputs=5, width=3, sigma=1.0, seed=0, profile="quick")


def stream(built: Construction, inputs: np.ndarray) -> np.ndarray:
    """Rows [B, L, D] before attention."""
    weights = built.transformer
    rows = inputs @ weights.embed + weights.position
    return rows + np.maximum(rows @ weights.hidden + weights.bias, 0) @ weights.out


class TestParts:
    def test_the_envelope_is_the_largest_score(self, random: np.random.Generator) -> None:
        built = Construction(d=2, length=1, grid=7)
        x = random.uniform(size=(500, 1, 2))
        envelope = stream(built, x)[..., built.columns["envelope"]][..., 0]
        expected = (2 * x[..., None] * built.centers - built.centers**2).max(-1).sum(-1)
        np.testing.assert_allclose(envelope, expected, atol=1e-14)

    def test_tokens_are_moved_to_their_places(self, random: np.random.Generator) -> None:
        built = Construction(d=2, length=3, grid=2)
        x = random.uniform(size=(50, 3, 2))
        context = stream(built, x)[..., built.columns["context"]].reshape(50, 3, 3, 2)
        np.testing.assert_allclose(context, np.einsum("ij,bik->bijk", np.eye(3), x), atol=1e-15)

    def test_an_answer_goes_to_its_slot_and_to_no_other(self, random: np.random.Generator) -> None:
        built = Construction(d=2, length=2, grid=3, size=1.5)
        slot, answer = random.integers(0, built.slots, 40), random.uniform(-1.5, 1.5, (40, 2))
        prompt = built.lines(random.integers(0, 2, 40), random.uniform(size=(40, 2)), slot, answer)
        weights = built.transformer
        told = np.maximum(prompt @ weights.hidden + weights.bias, 0) @ weights.out
        slots = told[:, built.columns["slots"]].reshape(40, built.slots, 2)
        np.testing.assert_allclose(slots, np.eye(built.slots)[slot][..., None] * (answer + 1.5)[:, None], atol=1e-12)

    def test_inputs_are_lines_of_no_slot(self, random: np.random.Generator) -> None:
        built = Construction(d=1, length=2, grid=4)
        assert np.abs(stream(built, random.uniform(size=(9, 2, 1)))[..., built.columns["slots"]]).max() < 1e-12

    @pytest.mark.parametrize("count", range(2, 8))
    def test_the_tree_takes_the_maximum(self, count: int, random: np.random.Generator) -> None:
        values, left = random.normal(size=(20, count, 3)), count
        state = values.reshape(20, -1)
        while left > 1:
            split, merge = prompting._maxima(left, 3)
            state, left = np.maximum(state @ split, 0) @ merge, (left + 1) // 2
        np.testing.assert_allclose(state, values.max(1), atol=1e-14)

    @pytest.mark.parametrize(("d", "length", "grid"), SMALL[-2:])
    def test_attention_is_the_library_s_and_its_shares_are_as_stated(
        self, d: int, length: int, grid: int, random: np.random.Generator
    ) -> None:
        built = Construction(d=d, length=length, grid=grid, input_share=1e-3)
        weights, x = built.transformer, random.uniform(size=(64, length, d))
        prompt = built.prompt(functions(random, d, length)["waves"])
        told = prompt + np.maximum(prompt @ weights.hidden + weights.bias, 0) @ weights.out
        rows = stream(built, x)

        def heads(array: np.ndarray) -> jax.Array:
            # the library has one width for keys and values
            return jnp.pad(jnp.asarray(array), [(0, 0)] * (array.ndim - 1) + [(0, 2 * built.width - array.shape[-1])])[
                ..., None, :
            ]

        attended = npx.prefix_attention(
            *(heads(rows @ part) for part in (weights.query, weights.key, weights.value)),
            *(heads(told @ part) for part in (weights.key, weights.value)),
            scale=1.0,
            implementation="reference",
        )[:, :, 0, : weights.value.shape[1]]
        share = np.asarray(attended)[..., -1]
        assert built.smallest_input_share <= share.min()
        assert share.max() <= built.input_share
        state = np.concatenate([rows, attended], -1)
        for weight, bias in weights.layers[:-1]:
            state = np.maximum(state @ weight + bias, 0)
        weight, bias = weights.layers[-1]
        np.testing.assert_allclose(state @ weight + bias, apply(weights, prompt, x), atol=1e-8)

    def test_tail_and_mass_bound_the_softmax(self) -> None:
        """Against one coordinate of an endless grid, summed outright."""
        x, steps = np.linspace(-0.5, 0.5, 1001)[:, None], np.arange(-50, 51)
        for tau in (0.25, 1.0, 4.0, 64.0):
            built = Construction(d=1, length=1, grid=4, sharpness=tau)
            weight = np.exp(-tau * ((x - steps) ** 2 - x**2))
            excess = (weight * np.maximum(np.abs(x - steps) - 0.5, 0)).sum(1) / weight.sum(1)
            assert weight.sum(1).max() <= built.mass * (1 + 1e-12)
            assert excess.max() <= built.tail
            assert built.tail <= 40 * excess.max()

    def test_pieces_do_not_matter(self, monkeypatch: pytest.MonkeyPatch, random: np.random.Generator) -> None:
        built = Construction(d=1, length=2, grid=4)
        prompt, x = built.prompt(functions(random, 1, 2)["cones"]), random.uniform(size=(37, 2, 1))
        whole = apply(built.transformer, prompt, x)
        monkeypatch.setattr(prompting, "SCORES", 100)
        np.testing.assert_allclose(apply(built.transformer, prompt, x), whole, atol=1e-12)


class TestTheorem:
    @pytest.mark.parametrize("sharpness", [1.0, 64.0])
    @pytest.mark.parametrize(("d", "length", "grid"), SMALL)
    def test_one_set_of_weights_serves_all_functions(
        self, d: int, length: int, grid: int, sharpness: float, random: np.random.Generator
    ) -> None:
        built = Construction(d=d, length=length, grid=grid, sharpness=sharpness)
        for function in (*functions(random, d, length).values(), tents(random, d, length, grid)):
            prompt = random.permutation(built.prompt(function))
            assert prompt.shape == (built.tokens, built.width)
            assert np.count_nonzero(prompt, axis=1).max() <= built.numbers
            assert largest_error(built, function, prompt, random, points=256) <= built.bound

    @pytest.mark.parametrize(("d", "length", "grid"), SMALL)
    def test_the_bound_is_reached_by_what_the_table_cannot_know(
        self, d: int, length: int, grid: int, random: np.random.Generator
    ) -> None:
        built = Construction(d=d, length=length, grid=grid)
        function = universality._border(built)
        prompt = built.prompt(function)
        assert np.abs(prompt[:, built.columns["answer"]]).max() < 1e-15
        assert largest_error(built, function, prompt, random, points=256) >= 0.9 * built.bound

    def test_larger_functions_with_their_constants(self, random: np.random.Generator) -> None:
        built = Construction(d=1, length=2, grid=6, lipschitz=5.0, size=5.0)
        known = functions(random, 1, 2)["cones"]
        error = largest_error(built, lambda x: 5 * known(x), built.prompt(lambda x: 5 * known(x)), random, points=256)
        assert 0.5 * built.bound <= error <= built.bound

    def test_a_bound_of_other_weights_is_broken(self, random: np.random.Generator) -> None:
        """A dull softmax does not keep the promise of a sharp one, nor do weights that charge nothing for distance."""
        built = Construction(d=1, length=2, grid=8)
        known = functions(random, 1, 2)
        for name, changed in (("cones", {"sharpness": 0.3}), ("shift", {"lipschitz": 0.0})):
            wrong, function = dataclasses.replace(built, **changed), known[name]
            assert largest_error(wrong, function, built.prompt(function), random, points=256) > built.bound

    def test_without_context_the_other_token_is_a_guess(self, random: np.random.Generator) -> None:
        """A function of the own token alone is at least 1/2 away from the other one."""
        blind = Construction(d=1, length=2, grid=8, contexts=False)
        function = functions(random, 1, 2)["shift"]
        assert largest_error(blind, function, blind.prompt(function), random, points=256) >= 0.49


class TestFunctions:
    @pytest.mark.parametrize(("d", "length"), [(1, 1), (2, 1), (1, 3), (2, 2)])
    def test_their_constant_is_one(self, d: int, length: int, random: np.random.Generator) -> None:
        x = random.uniform(size=(4000, length, d))
        moved = np.clip(x + 1e-3 * random.choice((-1.0, 1.0), x.shape), 0, 1)
        far = random.uniform(size=x.shape)
        centers = Construction(d=d, length=length, grid=3)
        known: dict[str, Function] = {
            **functions(random, d, length),
            "tents": tents(random, d, length, 3),
            "border": universality._border(centers),
        }
        for name, function in known.items():
            near, apart = (
                np.abs(function(x) - function(y)).max((1, 2)) / np.abs(x - y).max((1, 2)) for y in (moved, far)
            )
            assert max(near.max(), apart.max()) <= 1 + 1e-9, name
            assert near.max() >= 0.7, name
            assert np.abs(function(x)).max() <= 1, name


class TestUniversality:
    def test_it_holds_and_both_controls_fail(self, monkeypatch: pytest.MonkeyPatch, problem: Problem) -> None:
        monkeypatch.setattr(universality, "QUICK", {(1, 1): (2, 4, 8), (1, 2): (2, 3, 4)})
        monkeypatch.setattr(universality, "SWEPT", (1, 1, 4))
        evidence = universality._measure(problem)
        assert evidence.holds, [check for check in evidence.checks if not check.holds]
        control = universality._control(problem)
        assert not any(check.holds for check in control.checks)
        universality._figure(evidence, control)


class TestMemorisation:
    def test_absent_tokens_are_not_there(self, problem: Problem) -> None:
        task = memorisation.draw(problem, 4, 0, 3, 0, 5)
        shorter = task._replace(absent=jnp.zeros(3))
        np.testing.assert_allclose(
            memorisation.answer(task, task.prompt), memorisation.answer(shorter, task.prompt[:3]), atol=1e-6
        )

    def test_tasks_differ_in_what_they_should(self, problem: Problem) -> None:
        first, longer, start, seed = (
            memorisation.draw(problem, 4, *labels, 5) for labels in ((0, 3, 0), (0, 4, 0), (0, 3, 1), (1, 3, 0))
        )
        for name in ("stream", "answers", "query_key", "value"):
            np.testing.assert_array_equal(getattr(first, name), getattr(longer, name))
            np.testing.assert_array_equal(getattr(first, name), getattr(start, name))
            assert (np.asarray(getattr(first, name)) != np.asarray(getattr(seed, name))).all()
        np.testing.assert_array_equal(first.prompt, longer.prompt)
        assert (np.asarray(first.prompt) != np.asarray(start.prompt)).all()

    def test_training_moves_the_prompt_to_the_answers(self, problem: Problem) -> None:
        tasks = jax.tree.map(
            lambda *rows: jnp.stack(rows), *(memorisation.draw(problem, 3, 0, m, 0, 6) for m in (1, 6))
        )
        before = [float(jnp.abs(memorisation.answer(task, task.prompt) - task.answers).max()) for task in
                  (jax.tree.map(lambda rows, i=i: rows[i], tasks) for i in range(2))]  # fmt: skip
        one, many = np.asarray(memorisation.train(tasks, 500))
        assert many < 1e-3 < one < before[0]
        assert before[1] > 0.1

    def test_the_shortest_of_each_seed(self) -> None:
        errors = np.array([[0.5, 0.01, 0.2], [0.05, 0.5, 0.2], [0.01, 0.01, 0.2]])
        np.testing.assert_array_equal(memorisation.shortest([1, 2, 4], errors, 0.1), [2, 1, np.inf])

    def test_counting(self) -> None:
        """At the counted length the union bound is one in a million, whatever the sizes."""
        for sequences, error in ((8, 0.01), (100, 0.3)):
            tokens = memorisation.counted(sequences, error)
            exponent = 32 * memorisation.D * tokens + sequences * memorisation.LENGTH * math.log2(error)
            assert exponent == pytest.approx(-20)

    def test_lines_of_sequences_are_read_back(self, problem: Problem) -> None:
        for error in (1e-2, 1e-6):
            tokens, found, bound = memorisation.constructed(problem, 6, error)
            assert tokens == 6 * memorisation.LENGTH
            assert found <= bound <= error
            assert memorisation.constructed(problem, 6, error, shuffled=True)[1] > 0.5

    @pytest.mark.parametrize(("d", "length", "grid"), SMALL)
    def test_no_table_is_shorter_than_the_fewest_lines(self, d: int, length: int, grid: int) -> None:
        built = Construction(d=d, length=length, grid=grid)
        fewest = memorisation.fewest(d, length, np.array(built.bound))
        assert fewest <= built.tokens <= fewest * (1 + 2.1 * d * built.tail) ** (d * length)

    def test_the_shortest_table_is_the_theorem_s(self, problem: Problem) -> None:
        error, tokens = memorisation._worst_case(problem, 1, 1, 9)
        assert tokens == 9
        assert error == Construction(d=1, length=1, grid=9).bound

    def test_half_a_table_is_not_enough(self, problem: Problem) -> None:
        assert memorisation._half_table(problem) > 1.5
