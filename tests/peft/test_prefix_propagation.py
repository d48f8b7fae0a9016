"""Prefix propagation against its definition in numpy, and its two forms of attention against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ntk_prefix import models, peft
from ntk_prefix.attention import softmax_attention
from ntk_prefix.peft.methods.prefix_propagation import kernel_attention
from ntk_prefix.training import Trainer
from tests.models import formulas

CONFIG = formulas.CONFIGS["bert"]
IDS = np.random.default_rng(3).integers(0, 31, (3, 9))
MASK = np.arange(9) < np.array([9, 4, 6])[:, None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return formulas.write(tmp_path_factory.mktemp("bert"), CONFIG, formulas.draw(CONFIG))


def classifier(folder, **fields):
    model = models.from_pretrained(folder, "sequence-classification", num_labels=3, rngs=nnx.Rngs(1))
    config = peft.PrefixPropagationConfig(**{"num_prefix_tokens": 4, "init_scale": 0.3, **fields})
    return peft.apply(model, config, rngs=nnx.Rngs(2))


def rows_of(model) -> np.ndarray:
    return np.asarray(model.backbone.leading.adapters["default"].rows[...], np.float64)


def heads(seed=0, tokens=7, prefix=3):
    """Return query, key, value [2, T, N, H] (keys of half as many heads) and a prefix's key and value, in float64."""
    with jax.enable_x64(True):
        draw = np.random.default_rng(seed).normal
        return [
            jnp.asarray(draw(size=(2, count, n, 4)))
            for count, n in ((tokens, 4), (tokens, 2), (tokens, 2), (prefix, 2), (prefix, 2))
        ]


class TestDefinition:
    def test_the_rows_are_added_before_each_layer_and_read_with_the_text(self, folder):
        """Against BERT's formula layer by layer: tests.models.formulas with rows of its own in front."""
        model = classifier(folder)
        expected = formulas.bert(CONFIG, formulas.draw(CONFIG), IDS, MASK, 0 * IDS, prefix=rows_of(model))
        output = model(jnp.asarray(IDS), attention_mask=jnp.asarray(MASK))
        np.testing.assert_allclose(output.leading_states, expected[:, :4], atol=2e-5)
        found = np.where(MASK[..., None], output.last_hidden_state, 0)
        np.testing.assert_allclose(found, np.where(MASK[..., None], expected[:, 4:], 0), atol=2e-5)

    @pytest.mark.parametrize("pool", ["prefix", "cls", "model"])
    def test_the_classifier_reads_what_it_is_told(self, folder, pool):
        model = classifier(folder, pool=pool)
        output = model(jnp.asarray(IDS), attention_mask=jnp.asarray(MASK))
        text = np.asarray(output.last_hidden_state)
        mean = (text * MASK[..., None]).sum(1) / MASK.sum(1, keepdims=True)
        read = {"prefix": np.asarray(output.leading_states)[:, 0], "cls": text[:, 0], "model": mean}[pool]
        expected = read @ np.asarray(model.head.adapters["default"].kernel[...])
        np.testing.assert_allclose(output.logits, expected, atol=1e-4)

    @pytest.mark.parametrize("tokens", [1, 8, 32])
    def test_half_the_weights_of_prefix_tuning_exactly(self, folder, tokens):
        layers, features = CONFIG["num_hidden_layers"], CONFIG["hidden_size"]
        counts = []
        for config in (
            peft.PrefixPropagationConfig(num_prefix_tokens=tokens, train_head=False),
            peft.PrefixTuningConfig(num_tokens=tokens, train_head=False),
        ):
            counts.append(peft.trainable_parameters(peft.apply(models.from_pretrained(folder), config))[0])
        assert counts == [tokens * layers * features, 2 * tokens * layers * features]

    def test_a_window_leaves_the_rows_global(self, folder):
        model = classifier(folder)
        whole = model(jnp.asarray(IDS), attention_mask=jnp.asarray(MASK))
        model.window = 8
        same = model(jnp.asarray(IDS), attention_mask=jnp.asarray(MASK))
        np.testing.assert_allclose(same.logits, whole.logits, rtol=1e-5)
        model.window = 1
        before = model(jnp.asarray(IDS)).leading_states
        after = model(jnp.asarray(IDS).at[:, 8].set(1)).leading_states
        assert np.abs(before - after).max() > 1e-3


class TestKernelForm:
    """The identity of the two forms, and the kernels by their formulas; 1e-12 is a few hundred roundings of float64."""

    def test_one_softmax_over_both_is_the_kernel_form_with_the_prefixs_share(self):
        query, key, value, prefix_key, prefix_value = heads()
        with jax.enable_x64(True):
            both = softmax_attention(
                query, jnp.concatenate([prefix_key, key], 1), jnp.concatenate([prefix_value, value], 1)
            )

            def mass(keys):
                scores = jnp.einsum("btnh,bsnh->btns", query, jnp.repeat(keys, 2, axis=2)) / 2
                return jnp.exp(scores).sum(axis=-1)

            alpha = mass(prefix_key) / mass(key)  # s / (1 - s)
            found = kernel_attention(query, key, value, prefix_key, prefix_value, alpha) / (1 + alpha)[..., None]
            np.testing.assert_allclose(found, both, rtol=1e-12, atol=1e-12)
            # and not with one number for all queries: the share differs from query to query
            one = jnp.full(4, jnp.mean(alpha))
            other = kernel_attention(query, key, value, prefix_key, prefix_value, one) / (1 + jnp.mean(alpha))
            assert np.abs(other - both).max() > 1e-2

    @pytest.mark.parametrize("kernel", ["exp", "rbf", "poly"])
    def test_kernels_are_normalized_over_the_prefix(self, kernel):
        query, key, value, prefix_key, prefix_value = heads()
        with jax.enable_x64(True):
            alpha = jnp.array([0.0, 1.0, -0.5, 2.0])
            found = kernel_attention(query, key, value, prefix_key, prefix_value, alpha, kernel=kernel, lengthscale=1.7)
            plain = np.asarray(softmax_attention(query, key, value))
        q, k, v = (np.asarray(x) for x in (query, np.repeat(prefix_key, 2, axis=2), np.repeat(prefix_value, 2, axis=2)))
        scores = np.einsum("btnh,bmnh->btnm", q, k)
        squares = ((q[:, :, None] - k[:, None]) ** 2).sum(-1).transpose(0, 1, 3, 2)
        weights = {"exp": np.exp(scores / 2), "rbf": np.exp(-squares / (2 * 1.7**2)), "poly": (1 + scores / 2) ** 2}
        shares = weights[kernel] / weights[kernel].sum(-1, keepdims=True)
        expected = plain + np.asarray(alpha)[:, None] * np.einsum("btnm,bmnh->btnh", shares, v)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)

    def test_masked_text_is_not_seen_and_the_prefix_is(self):
        query, key, value, *prefix = heads()
        with jax.enable_x64(True):
            mask = jnp.arange(7)[None, None, None] < 4
            found = kernel_attention(query, key, value, *prefix, jnp.ones(4), mask=mask)
            expected = kernel_attention(query, key[:, :4], value[:, :4], *prefix, jnp.ones(4))
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)

    def test_a_kernel_of_weight_zero_is_the_text_alone(self, folder):
        model = classifier(folder, kernel="rbf", alpha=0.0, pool="model")
        with_rows = model(jnp.asarray(IDS), attention_mask=jnp.asarray(MASK)).last_hidden_state
        peft.activate(model, None)
        without = model(jnp.asarray(IDS), attention_mask=jnp.asarray(MASK)).last_hidden_state
        np.testing.assert_allclose(with_rows, without, atol=1e-5)

    def test_a_causal_one_is_refused(self, folder):
        core = classifier(folder, kernel="exp").backbone.layers[0].attention.core
        query, key, value, *_ = heads()
        with pytest.raises(ValueError, match="is_causal: expected False beside prefix propagation"):
            core(query, key, value, is_causal=True)

    def test_alpha_is_trained_one_a_head(self, folder):
        model = classifier(folder, kernel="exp")
        alphas = [layer.attention.core.adapters["default"].alpha for layer in model.backbone.layers]
        assert {type(alpha) for alpha in alphas} == {peft.AdapterParam}
        assert {alpha.shape for alpha in alphas} == {(CONFIG["num_attention_heads"],)}


BATCH = {"ids": np.tile(IDS[:2], (4, 1)), "mask": np.tile(MASK[:2], (4, 1)), "labels": np.arange(8) % 3}


class TestTraining:
    def trainer(self, **options):
        def loss(model, batch):
            logits = model(batch["ids"], attention_mask=batch["mask"]).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).sum()

        return Trainer(loss=loss, optimizer=optax.adam(1e-2), wrt=peft.AdapterParam, **options)

    def losses(self, model, steps=4, skip=0, **options):
        trainer = self.trainer(**options)
        state, step = trainer.init(model), trainer.stepper(model)
        state = state._replace(step=state.step + skip)
        found = []
        for _ in range(steps):
            state, metrics = step(state, trainer.place(BATCH))
            found.append(float(metrics["loss"]))
        return found

    def test_dropout_is_drawn_anew_each_step_the_same_everywhere_and_not_at_all_in_evaluation(self, folder):
        model = classifier(folder, dropout=0.5)
        before = np.asarray(model(jnp.asarray(IDS)).logits)
        single = self.losses(model)
        np.testing.assert_allclose(self.losses(model, parallel="pmap"), single, rtol=1e-5)
        np.testing.assert_array_equal(model(jnp.asarray(IDS)).logits, before)
        # the first step's draw of a run that goes on is that of its number
        assert self.losses(model, steps=1, skip=3)[0] != single[0]
        assert self.losses(classifier(folder, dropout=0.0), steps=1)[0] != single[0]

    def test_files_and_switching(self, folder, tmp_path):
        model = train_rows(classifier(folder, kernel="poly", dropout=0.2))
        expected = np.asarray(model(jnp.asarray(IDS)).logits)
        peft.save_pretrained(model, tmp_path)
        again = models.from_pretrained(folder, "sequence-classification", num_labels=3, rngs=nnx.Rngs(5))
        peft.load_adapter(again, tmp_path)
        np.testing.assert_allclose(again(jnp.asarray(IDS)).logits, expected, rtol=1e-6)
        with peft.disable_adapter(again):
            assert again(jnp.asarray(IDS)).leading_states is None
        peft.delete_adapter(again, "default")
        assert type(again.backbone.leading) is models.LeadingRows


def train_rows(model):
    """Move every trained weight, so that a file that lost one would show."""
    trained = nnx.state(model, peft.AdapterParam)
    nnx.update(
        model, jax.tree.map(lambda leaf: leaf + 0.05 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), trained)
    )
    return model


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "layers.0"}, "target: expected none"),
        ({"num_prefix_tokens": 0}, "num_prefix_tokens: expected at least 1"),
        ({"num_prefix_tokens": 3, "combine": True}, "an even num_prefix_tokens, got 3"),
        ({"combine": True, "kernel": "exp"}, "expected kernel=None, got both"),
        ({"kernel": "cosine"}, "kernel: expected None"),
        ({"dropout": 1.0}, r"a fraction in \[0, 1\), got 1.0"),
        ({"pool": "mean"}, 'pool: expected "prefix"'),
        ({"lengthscale": 0.0}, "lengthscale: expected a number from 1e-14"),
    ],
)
def test_errors_say_what_was_expected(fields, message):
    with pytest.raises(ValueError, match=message):
        peft.PrefixPropagationConfig(**fields)


def test_decoders_and_mixed_rows_are_refused(folder):
    llama = formulas.CONFIGS["llama"]
    decoder = models.Llama(models.LlamaConfig.from_hugging_face(llama), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="matches none"):
        peft.apply(decoder, peft.PrefixPropagationConfig())
    mixed = peft.mixed(classifier(folder), jnp.zeros(3, int), ["default"])
    with pytest.raises(ValueError, match="in a mixed batch, got prefix propagation"):
        mixed.__enter__()
