"""Maps that own arrays, in adapters: measured, trained, mixed, saved; and states made elsewhere, put on a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ntk_prefix import models, peft
from ntk_prefix.attention import LowRank
from ntk_prefix.feature_maps import (
    Anchors,
    Concatenated,
    Elu1,
    Minimax,
    Nearest,
    NormalizedAnchors,
    PositiveRandom,
    Projected,
    Taylor,
)
from ntk_prefix.feature_maps.described import array_names, described, placed, template
from ntk_prefix.prefix_state import PrefixState
from tests.peft.cases import frozen, inputs, step
from tests.peft.tiny import HEAD_DIM, HEADS, KEY_HEADS, LAYERS, tiny

ANCHORS = peft.NTKAttentionConfig(feature_map="anchors", feature_map_options=(("features", 3),))


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def state(phi, heads=KEY_HEADS, seed=1):
    features = phi.dim(HEAD_DIM)
    return PrefixState(drawn(heads, features, HEAD_DIM, seed=seed), jnp.abs(drawn(heads, features, seed=seed)), phi)


def put(model, config, name="default"):
    x, mask = inputs()
    return peft.apply(model, config, name=name, calibration={"x": x, "attention_mask": mask})


def hosted(model, layer, name="default"):
    return model.layers[layer].attention.core.adapters[name]


MAPS = {
    "anchors": Anchors(drawn(KEY_HEADS, 3, HEAD_DIM), logits_soft_cap=4.0),
    "one point for all heads": Anchors(drawn(1, 1, HEAD_DIM)),
    "nearest": Nearest(drawn(KEY_HEADS, 3, HEAD_DIM)),
    "anchors and elu1": Concatenated((NormalizedAnchors(drawn(KEY_HEADS, 2, HEAD_DIM)), Elu1())),
    "anchors and projected taylor": Concatenated(
        (Anchors(drawn(KEY_HEADS, 2, HEAD_DIM)), Projected(Taylor(2), drawn(KEY_HEADS, 2, HEAD_DIM)))
    ),
    "projected anchors": Projected(Anchors(drawn(1, 3, 2)), drawn(KEY_HEADS, 2, HEAD_DIM)),
    "taylor": Taylor(2),
    "random features": PositiveRandom(5, seed=2**63 - 1),
}


class TestApplyStates:
    def test_computes_what_the_states_do_and_a_file_computes_the_same_elsewhere(self, tmp_path):
        """Layers may have different maps, of different sizes, for query heads or for groups of them."""
        states = {0: state(MAPS["anchors"]), "layers.1.attention": state(MAPS["anchors and projected taylor"], HEADS)}
        model = peft.apply_states(tiny(), states)
        for layer, given in enumerate(states.values()):
            adapter = hosted(model, layer)
            assert adapter.phi == given.feature_map
            z, k = adapter.state()
            np.testing.assert_array_equal(z, given.z)
            np.testing.assert_array_equal(k, given.k)
        output = model(*inputs())
        assert np.max(np.abs(output - frozen())) > 1e-3
        peft.save_pretrained(model, tmp_path)
        np.testing.assert_array_equal(peft.load_adapter(tiny(), tmp_path)(*inputs()), output)
        with peft.disable_adapter(model):
            np.testing.assert_array_equal(model(*inputs()), frozen())
        with pytest.raises(ValueError, match="an adapter that is an addition to weights"):
            peft.merge(model)
        peft.delete_adapter(model, "default")
        np.testing.assert_array_equal(model(*inputs()), frozen())

    @pytest.mark.parametrize("phi", MAPS.values(), ids=MAPS)
    def test_every_map_is_saved_and_loaded(self, phi, tmp_path):
        given = state(phi)
        if not phi.positive:  # the sums and the fit of such a map have a k of any sign
            given = dataclasses.replace(given, k=-given.k)
        peft.save_pretrained(peft.apply_states(tiny(head=False), {1: given}), tmp_path)
        loaded = hosted(peft.load_adapter(tiny(head=False), tmp_path), 1)
        assert loaded.phi == phi
        np.testing.assert_array_equal(loaded.k[...], given.k)
        assert described(phi) == described(loaded.phi)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            (
                "z",
                np.full((KEY_HEADS, 4, HEAD_DIM), np.nan),
                "^z of the state of .* expected finite numbers .* got nan",
            ),
            ("k", np.full((KEY_HEADS, 4), 1e60), r"^k of .* expected finite numbers that float32 holds, got 1e\+60"),
            ("k", -np.ones((KEY_HEADS, 4)), "^k of .* expected masses >= 0, which are part of a denominator, got -1"),
            (
                "z",
                np.ones((KEY_HEADS, 4, HEAD_DIM), int),
                "^z of .* expected floating point numbers, got int64. Use z.as",
            ),
            ("z", [[[1.0]]], "^z of .* expected an array, got list"),
            ("scale", "1", "scale: expected a finite number > 0, got 1"),
        ],
    )
    def test_what_a_file_would_not_hold_is_refused(self, name, value, message, without_annotations):
        model = tiny()
        with pytest.raises(ValueError, match=message):
            peft.apply_states(model, {0: dataclasses.replace(state(Elu1()), **{name: value})})
        assert not peft.configs(model)

    def test_settings_may_be_numbers_of_numpys(self, tmp_path, without_annotations):
        for phi in (Taylor(np.int64(2)), PositiveRandom(np.int32(5)), Minimax(2, np.float32(1.5))):
            peft.save_pretrained(peft.apply_states(tiny(), {0: state(phi)}), tmp_path)
            assert hosted(peft.load_adapter(tiny(), tmp_path), 0).phi == phi

    def test_a_name_that_is_none_is_refused(self, without_annotations):
        with pytest.raises(ValueError, match="name: expected an adapter name without dots, got 3"):
            peft.apply_states(tiny(), {0: state(Elu1())}, name=3)

    def test_a_low_rank_state_stays_one(self, tmp_path):
        given = dataclasses.replace(
            state(Elu1(), HEADS), z=LowRank(drawn(HEADS, HEAD_DIM, 2), drawn(HEADS, 2, HEAD_DIM))
        )
        model = peft.apply_states(tiny(), {0: given})
        np.testing.assert_array_equal(hosted(model, 0).state()[0].right, given.z.right)

    @pytest.mark.parametrize(
        ("states", "message"),
        [
            ({}, "states: expected a PrefixState for at least one layer, by path or place, got none"),
            ([state(Elu1())], "states: expected a PrefixState for at least one layer"),
            ({0: Elu1()}, r"state of layers\.0\.attention: expected a PrefixState, got Elu1"),
            (
                {7: state(Elu1())},
                r"states: expected attention layers, each once, among \['layers.0.attention', .* got 7",
            ),
            ({0: state(Elu1()), "layers.0.attention": state(Elu1())}, "each once"),
            (
                {0: state(Elu1(), 3)},
                "state of layers.0.attention: expected z .* of J = 4 query heads or 2 key heads, got",
            ),
            ({0: state(Anchors(drawn(2, 3, 5)))}, r"points: expected \[K, ., 4\]"),
            ({0: dataclasses.replace(state(Elu1()), scale=2.0)}, "expected the layer's scale 0.5, got 2.0"),
            ({0: state(Anchors(drawn(KEY_HEADS, 3, HEAD_DIM).at[0].set(np.inf)))}, "points of the state of .* got inf"),
            ({0: jax.tree.map(lambda x: x[None], state(MAPS["anchors"]))}, r"expected z \[J, 3, 4\] and k .* got z"),
            ({0: state(Projected(Projected(Elu1(), drawn(1, 2, 3)), drawn(1, 3, 4)))}, "a map that a file can name"),
        ],
    )
    def test_what_does_not_fit_is_named_and_the_model_left_alone(self, states, message, without_annotations):
        model = tiny()
        with pytest.raises(ValueError, match=message):
            peft.apply_states(model, states)
        assert not peft.configs(model)

    def test_rows_of_a_batch_each_have_their_own_points(self):
        """And as many as their adapter has."""
        phis = [Anchors(drawn(KEY_HEADS, 2 * seed, HEAD_DIM, seed=seed)) for seed in (1, 2)]
        model = tiny()
        for name, phi in zip("ab", phis, strict=True):
            peft.apply_states(model, {0: state(phi), 1: state(phi, seed=2)}, name=name)
        x, mask = inputs()
        alone = {}
        for name in (*"ab", None):
            peft.activate(model, name)
            alone[name] = model(x, mask)
        rows = jnp.asarray([0, 1, -1, 1, 0, -1, 0, 1])
        with peft.mixed(model, rows, ["a", "b"]):
            output = model(x, mask)
        for b, row in enumerate(rows):
            np.testing.assert_allclose(output[b], alone["ab"[row] if row >= 0 else None][b], atol=2e-6)
        assert np.max(np.abs(output - alone["a"])) > 1e-3

    def test_rows_of_maps_that_have_no_idle_features_are_refused(self):
        model = tiny()
        for name, size in (("a", 2), ("b", 3)):
            phi = NormalizedAnchors(drawn(KEY_HEADS, size, HEAD_DIM))
            peft.apply_states(model, {0: state(phi)}, name=name)
        with (
            peft.mixed(model, jnp.asarray([0, 1, 0, 1, 0, 1, 0, 1]), ["a", "b"]),
            pytest.raises(ValueError, match=r"NormalizedAnchors.*: expected a map that can be given further features"),
        ):
            model(*inputs())


def test_a_decoder_generates_what_its_states_say_window_and_cache_or_not():
    """Three greedy tokens, with a cache, are the first choices of one pass over them all; without the states, others."""
    config = models.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=16, vocab_size=50,
        hidden_act="silu", tie_word_embeddings=False, sliding_window=3,
    )  # fmt: skip
    model, prompt = models.Llama(config, rngs=nnx.Rngs(0)), jnp.arange(10).reshape(2, 5)
    peft.apply_states(model, {0: state(MAPS["anchors and elu1"])})
    new = models.generate(model, prompt, max_new_tokens=3)
    whole = jnp.asarray(np.concatenate([prompt, new[:, :-1]], axis=1))
    np.testing.assert_array_equal(new, np.argmax(model(whole).logits[:, 4:], axis=-1))
    with peft.disable_adapter(model):
        assert np.any(new != np.argmax(model(whole).logits[:, 4:], axis=-1))


class TestMeasuredMaps:
    def test_anchors_are_keys_of_the_calibration_batch_and_start_at_the_frozen_model(self):
        model = put(tiny(), ANCHORS)
        np.testing.assert_array_equal(model(*inputs()), frozen())
        x, mask = inputs()
        seen = peft.record(tiny(), {"x": x, "attention_mask": mask})
        for layer, record in enumerate(seen.values()):
            points = hosted(model, layer).points[...]
            keys = np.asarray(record.key)[np.asarray(record.seen)] * record.scale**0.5
            for head in range(KEY_HEADS):
                nearest = np.min(np.linalg.norm(keys[None, :, head] - points[head][:, None], axis=-1), axis=1)
                np.testing.assert_allclose(nearest, 0, atol=1e-6)
                assert len(np.unique(points[head], axis=0)) == 3
        with pytest.raises(ValueError, match=r"calibration: expected a batch for .* a map with arrays, got none"):
            peft.apply(tiny(), ANCHORS)

    @pytest.mark.parametrize("train_map", [False, True])
    def test_points_are_trained_if_asked_for_saved_either_way_and_counted(self, train_map, tmp_path, capsys):
        config = dataclasses.replace(ANCHORS, train_map=train_map, grouped=True, train_head=False)
        model = put(tiny(), config)
        peft.print_trainable_parameters(model)
        numbers = LAYERS * KEY_HEADS * 3 * (HEAD_DIM + 1 + HEAD_DIM * train_map)
        assert f"trainable params: {numbers}" in capsys.readouterr().out
        before = hosted(model, 0).points[...]
        optimizer = nnx.Optimizer(model, peft.non_negative(optax.adam(3e-2)), wrt=peft.AdapterParam)
        for _ in range(2):  # at z = k = 0 points have no gradient yet
            step(model, optimizer, *inputs())
        assert bool(np.any(hosted(model, 0).points[...] != before)) == train_map
        peft.save_pretrained(model, tmp_path)
        loaded = peft.load_adapter(tiny(), tmp_path)
        np.testing.assert_array_equal(loaded(*inputs()), model(*inputs()))
        assert isinstance(hosted(loaded, 1).points, peft.AdapterParam) == train_map

    @pytest.mark.parametrize("grouped", [False, True])
    def test_white_coordinates_make_features_white(self, grouped):
        name = "normalized_anchors+elu1"
        config = dataclasses.replace(ANCHORS, feature_map=name, whiten=True, mass="relative", grouped=grouped)
        model = put(tiny(), config)
        x, mask = inputs()
        seen = peft.record(tiny(), {"x": x, "attention_mask": mask})["layers.0.attention"]
        adapter = hosted(model, 0)
        features = jnp.swapaxes(adapter.phi(jnp.swapaxes(seen.query * seen.scale**0.5, 1, 2)), 1, 2)[
            np.asarray(seen.seen)
        ]
        heads, groups = (KEY_HEADS, HEADS // KEY_HEADS) if grouped else (HEADS, 1)
        white = jnp.einsum("qngr,nrs->qngs", features.reshape(len(features), heads, groups, -1), adapter.basis[...])
        moments = jnp.einsum("qngs,qngt->nst", white, white) / (len(features) * groups)
        largest = np.linalg.eigvalsh(np.asarray(moments))[:, -1]
        output = np.asarray(seen.output)[np.asarray(seen.seen)].reshape(len(features), heads, -1, HEAD_DIM)
        np.testing.assert_allclose(largest, np.mean(output**2, axis=(0, 2, 3)), rtol=0.01)

    def test_layers_in_one_loop_compute_the_same(self):
        model = put(tiny(), ANCHORS)
        for layer in range(LAYERS):
            adapter = hosted(model, layer)
            adapter.z[...], adapter.k[...] = drawn(*adapter.z.shape), jnp.abs(drawn(*adapter.k.shape))
        output = model(*inputs())
        model.run = dataclasses.replace(model.run, scan_layers=True)
        np.testing.assert_allclose(model(*inputs()), output, atol=2e-6)
        other = peft.apply_states(tiny(), {0: state(MAPS["anchors"]), 1: state(MAPS["nearest"])})
        other.run = dataclasses.replace(other.run, scan_layers=True)
        with pytest.raises(ValueError, match="scan_layers: expected layers that are alike"):
            other(*inputs())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(feature_map_options=()), "'anchors': expected its option features, got none"),
            (dict(rank=2**17), "rank: expected a number of at most 65536, got 131072"),
            (dict(feature_map_options=(("features", 0),)), "features: expected a whole number >= 1"),
            (dict(feature_map_options=(("features", 10**8),)), "at most 1,048,576 features"),
            (dict(feature_map_options=(("points", 3),)), r"options among \['features', 'heads', 'logits_soft_cap'\]"),
            (dict(feature_map="concatenated", feature_map_options=()), 'the maps themselves, such as "anchors\\+elu1"'),
            (
                dict(feature_map_options=(("features", 2000), ("heads", 2000))),
                "at most 1,048,576 features of all heads",
            ),
            (dict(feature_map="anchors+elu2"), "feature_map: expected one of"),
            (dict(feature_map="anchors+elu1", feature_map_options=(("degree", 3),)), "options among"),
            (dict(feature_map="projected:taylor", feature_map_options=(("degree", 3),)), "its option rank"),
            (dict(feature_map="elu1", feature_map_options=(), train_map=True), "train_map: expected False"),
            (dict(feature_map=Anchors(drawn(2, 3, 4)), feature_map_options=()), "peft.apply_states puts states"),
        ],
    )
    def test_settings_that_mean_nothing_are_refused(self, change, message, without_annotations):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(ANCHORS, **change)

    def test_shapes_are_known_without_a_batch_of_numbers(self):
        """As ``train.plan`` asks for them."""
        config = dataclasses.replace(ANCHORS, feature_map_options=(("features", 40),))
        shape = jax.ShapeDtypeStruct(inputs()[0].shape, jnp.float32)
        model = nnx.eval_shape(lambda: peft.apply(tiny(), config, calibration={"x": shape}))
        assert hosted(model, 1).points.shape == (KEY_HEADS, 40, HEAD_DIM)

    def test_fewer_tokens_than_anchors_are_refused_by_layer(self):
        config = dataclasses.replace(ANCHORS, feature_map_options=(("features", 60),))
        with pytest.raises(ValueError, match=r"layers\.0\.attention: anchors: expected at least 60 vectors"):
            put(tiny(), config)


class TestPlaced:
    """On what vectors a map's arrays are chosen."""

    def clusters(self, centers, count=40, spread=0.05):
        draw = np.random.default_rng(0)
        return np.repeat(centers, count, axis=0) + spread * draw.standard_normal(
            (count * len(centers), centers.shape[1])
        )

    def test_anchors_and_centroids_find_every_cluster_of_their_own_heads(self):
        centers = np.stack([5 * np.eye(4), -5 * np.eye(4)])  # [K, clusters, H]
        key = np.stack([self.clusters(own) for own in centers])
        query = np.repeat(key, 2, axis=0)  # two query heads a group
        for name in ("anchors", "nearest"):
            (arrays,) = jax.tree.leaves(placed(template(name, (("features", 4),), 2, 4), query, key))
            for own, found in zip(centers, np.asarray(arrays), strict=True):
                assert set(np.argmin(np.linalg.norm(found[:, None] - own[None], axis=-1), axis=1)) == {0, 1, 2, 3}
                if name == "nearest":
                    assert np.min(np.linalg.norm(found[:, None] - own[None], axis=-1), axis=1).max() < 0.05

    def test_directions_are_the_principal_ones(self):
        draw = np.random.default_rng(0)
        query = draw.standard_normal((4, 200, 3)) * np.array([0.1, 3.0, 1.0])
        phi = template("projected:taylor", (("rank", 2), ("degree", 2)), 2, 3)
        (directions,) = jax.tree.leaves(placed(phi, query, query))
        np.testing.assert_allclose(np.abs(directions), np.tile(np.eye(3)[[1, 2]], (2, 1, 1)), atol=0.15)

    def test_names_and_options_stand_for_maps(self):
        phi = template("anchors+projected:anchors", (("features", 3), ("rank", 2), ("1.inner.features", 5)), 2, 4)
        assert [leaf.shape for leaf in jax.tree.leaves(phi)] == [(2, 3, 4), (2, 5, 2), (2, 2, 4)]
        assert array_names(phi) == ("maps_0_points", "maps_1_inner_points", "maps_1_directions")
        again = template(*described(phi), 1, 4)
        assert jax.tree.structure(again) == jax.tree.structure(phi)
        assert [leaf.shape for leaf in jax.tree.leaves(again)] == [leaf.shape for leaf in jax.tree.leaves(phi)]
