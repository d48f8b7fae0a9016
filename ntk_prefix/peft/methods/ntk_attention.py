r"""NTK-Attention as an adapter: an infinitely long trained prefix, in ``R H + R`` numbers per head.

The state that a layer attends with is ``z = basis @ z'`` and ``k = unit k'``, where z' and k' are trained, from zero,
and basis and unit are measured once and then fixed. They cost nothing and vanish in the saved file, which holds z and
k; they are there because the published coordinates (both 1) are badly scaled for training in two ways that the
empirical neural tangent kernel shows:

1. features of ``elu1`` are nearly constant over the queries of a real model (their second moments have a condition
    number above 1e3), so almost all of the gradient points one way;
2. with ``mass="absolute"`` the prefix enters with the factor ``e^{-lse}``, many orders apart between heads.

``whiten`` takes ``basis = rms(o) E[phi phi^T]^{-1/2}``: in it features have second moment 1 and a unit step of z'
changes the head's output by its own size. ``mass="relative"`` weighs the prefix against each query's own mass.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ntk_prefix.attention import LowRank, ntk_attention, softmax_attention
from ntk_prefix.checks import expected
from ntk_prefix.feature_maps import FeatureMap, feature_map
from ntk_prefix.feature_maps.described import array_names, described, placed, template
from ntk_prefix.models.attention import AttentionCore, AttentionOptions
from ntk_prefix.peft.base import Adapter, AdapterConfig, AdapterParam, Calibration, Host, stacked
from ntk_prefix.peft.methods.lora import LoraConfig
from ntk_prefix.peft.methods.prefix_tuning import host_core
from ntk_prefix.peft.record import LayerRecord
from ntk_prefix.peft.sites import AttentionSite, attention_site
from ntk_prefix.prefix_state import PrefixState
from ntk_prefix.typing import Array, Float

__all__ = ["NTKAttentionConfig", "PrefixTuningPlusConfig", "StateCore"]

RIDGE = 1e-3
"""Added to the features' second moments, relative to their largest eigenvalue: what lies below is not amplified."""

LARGEST_LOG_MASS = float(np.log(np.finfo(np.float32).max)) - 20
"""Up to this (68.7) z and k of the size of a head's own mass fit into float32, with room for sums. One head of the ViT
has 215: no float32 state of absolute mass can move what most of its tokens see.
"""


class Measured(NamedTuple):
    """Of one layer: the map, the coordinates to train in and the state to start from; None for what is not asked for."""

    basis: Float[Array, "J R R"] | None = None
    unit: Float[Array, "J"] | None = None
    z: Float[Array, "J R H"] | None = None
    k: Float[Array, "J R"] | None = None
    phi: FeatureMap | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NTKAttentionConfig(AdapterConfig):
    """``T = (A V + phi(q) Z) / (A 1 + phi(q) k)`` with Z and k trained: ``N (R H + R)`` weights per layer.

    Args:
        target: which attention layers.
        feature_map: name of the map, see :func:`ntk_prefix.feature_map`; also of one with arrays, such as "anchors", and of
            several, "anchors+elu1", see :mod:`ntk_prefix.feature_maps.described`. Arrays are chosen on the calibration
            batch, for each layer its own: anchors are some of its keys.
        feature_map_options: its options, as pairs, such as ``(("degree", 2),)`` or ``(("features", 32),)``.
        train_map: train the map's arrays too.
        grouped: one state for all query heads of a group, ``K (R H + R)`` weights per layer.
        rank: of Z, ``rank (R + H) + R`` weights per head; None is full.
        mass: "absolute", the published form, or "relative", see :func:`ntk_prefix.ntk_attention`.
        whiten: train in coordinates in which features are white and the output's unit is the head's own; needs a
            calibration batch.
        train_k: False leaves the denominator alone, k = 0.
        init: "zero" is the frozen model; "from_prefix" the state fitted to a prefix, the first sequence of the
            calibration batch, on the queries of the others, of all if those are few (mass "absolute" only).
        given: the numbers come from a file, or from :func:`ntk_prefix.peft.apply_states`: nothing is measured, and k is
            taken as it is, beside a map with negative features too.

    Source: arXiv 2406.14036 for the published form; the coordinates and the relative mass are ours.
    """

    method: ClassVar[str] = "ntk_attention"
    in_int8: ClassVar[bool] = True
    objects: ClassVar[frozenset[str]] = frozenset({"feature_map"})
    target: str = ""
    feature_map: str = "elu1"
    feature_map_options: tuple[tuple[str, int | float], ...] = ()
    rank: int | None = None
    mass: Literal["absolute", "relative"] = "absolute"
    whiten: bool = False
    train_k: bool = True
    init: Literal["zero", "from_prefix"] = "zero"
    train_map: bool = False
    grouped: bool = False
    given: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing together."""
        super().__post_init__()
        phi = self.phi
        if jax.tree.leaves(phi) and isinstance(self.feature_map, FeatureMap):
            raise expected(
                "feature_map",
                "the name of a map whose arrays are measured, or a map without arrays",
                phi,
                "peft.apply_states puts states with such a map on a model",
            )
        if self.train_map and not jax.tree.leaves(phi):
            raise expected("train_map", "False for a map without arrays", f"True beside {phi}")
        if self.given and (self.whiten or self.init != "zero"):
            raise expected("given", 'False with whiten=True or init="from_prefix", which measure', True)
        if self.grouped and self.init == "from_prefix":
            raise expected(
                "grouped", 'False with init="from_prefix"', True, "PrefixState.fit and peft.apply_states do it"
            )
        if self.rank is not None and self.rank < 1:
            raise expected("rank", "at least 1, or None for a full Z", self.rank)
        if self.train_k and not phi.positive and not self.given:
            raise expected("feature_map", "a positive map with train_k=True", phi, "Set train_k=False")
        if self.init == "from_prefix" and (self.mass != "absolute" or self.whiten or self.rank is not None):
            raise expected(
                "init",
                'mass="absolute", whiten=False and rank=None with "from_prefix"',
                f"mass={self.mass!r}, whiten={self.whiten}, rank={self.rank}",
                "A prefix of real tokens has an absolute mass and a full Z",
            )

    @property
    def phi(self) -> FeatureMap:
        """The feature map itself; of arrays it has, only the number of features is that of a layer's map."""
        return self.map_of(1, 1)

    def map_of(self, heads: int, head_dim: int) -> FeatureMap:
        """Return the feature map of a layer of K such heads, its arrays yet to be measured or loaded."""
        if isinstance(self.feature_map, FeatureMap):
            return feature_map(self.feature_map, **dict(self.feature_map_options))
        return template(self.feature_map, self.feature_map_options, heads, head_dim)

    @property
    def needs_calibration(self) -> bool:
        """Whether :func:`ntk_prefix.peft.apply` wants a calibration batch."""
        return self.whiten or self.init == "from_prefix" or (not self.given and bool(jax.tree.leaves(self.phi)))

    @property
    def calibration_tokens(self) -> int:
        """As many as the map has arrays' features to choose."""
        phi = self.phi
        return phi.dim(1) if jax.tree.leaves(phi) else 1

    @classmethod
    def presets(cls) -> dict[str, tuple[AdapterConfig, ...]]:
        """Return the coordinates that train well, the published ones, and the former beside LoRA."""
        ours = cls(mass="relative", whiten=True)
        return {"ntk_attention": (ours,), "ntk_attention_published": (cls(),), "lora_ntk": (LoraConfig(), ours)}

    def stored(self) -> AdapterConfig:
        """Return it without coordinates and start, which are multiplied in; a map of one's own cannot be named.

        Raises:
            ValueError: the feature map is an object that no name and no options stand for.
        """
        is_map = isinstance(self.feature_map, FeatureMap)
        name, options = described(self.phi) if is_map else (self.feature_map, self.feature_map_options)
        given = self.given or bool(jax.tree.leaves(self.phi))
        return dataclasses.replace(
            self, whiten=False, init="zero", feature_map=name, feature_map_options=options, given=given
        )

    def measure(self, seen: LayerRecord) -> Measured:
        """Return what this method wants to know of a layer of the frozen model."""
        phi = self.map_of(seen.key.shape[2], seen.key.shape[3])
        if jax.tree.leaves(phi):
            phi = _placed(phi, seen)
        basis, unit = _coordinates(seen, phi, self.mass, self.grouped) if self.whiten else (None, None)
        z, k = _state_of_first_sequence(seen, phi) if self.init == "from_prefix" else (None, None)
        return Measured(basis, unit, z, k, phi)

    def hosts(self, module: nnx.Module) -> bool:
        """Attention layers."""
        return attention_site(module) is not None

    def inject(self, module: nnx.Module, name: str, rngs: nnx.Rngs, measured: Measured | None = None) -> nnx.Module:
        """Replace the layer's core, or add to the one that is there."""
        site = attention_site(module)
        assert site is not None
        host_core(site, StateCore).add(name, State(site, self, rngs=rngs, measured=measured))
        return module


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuningPlusConfig(NTKAttentionConfig):
    """``o + phi(q) M``: Prefix-Tuning+, ``N R H`` weights per layer; NTK-Attention of relative mass without k.

    Source: arXiv 2506.13674 (code).
    """

    method: ClassVar[str] = "prefix_tuning_plus"
    feature_map: str = "elu"
    mass: Literal["absolute", "relative"] = "relative"
    train_k: bool = False

    @classmethod
    def presets(cls) -> dict[str, tuple[AdapterConfig, ...]]:
        """Return itself alone."""
        return {cls.method: (cls(),)}


class State(Adapter):
    """The trained z', k' of one layer and the fixed coordinates they are given in."""

    def __init__(
        self,
        site: AttentionSite,
        config: NTKAttentionConfig,
        *,
        rngs: nnx.Rngs,
        measured: Measured | None = None,
    ):
        if config.needs_calibration and measured is None:
            raise expected(
                "calibration",
                "a batch for whiten=True, init='from_prefix' or a map with arrays",
                "none",
                "Give apply(..., calibration=...)",
            )
        basis, unit, z, k, phi = measured or Measured()
        phi = config.map_of(site.num_key_heads, site.head_dim) if phi is None else phi
        phi.check(site.num_heads, site.head_dim)
        self.mass = config.mass
        self._set_map(phi, AdapterParam if config.train_map else Calibration)
        heads = site.num_key_heads if config.grouped else site.num_heads
        features, head_dim = phi.affordable_dim(site.head_dim), site.head_dim
        self.basis: Any = None if basis is None else Calibration(basis)
        self.unit: Any = None if unit is None else Calibration(unit)
        # zeros are made on the host: each size would be a program
        z = jnp.asarray(np.zeros((heads, features, head_dim))) if z is None else z
        k = jnp.asarray(np.zeros((heads, features))) if k is None else k
        self.k = AdapterParam(k, non_negative=phi.positive) if config.train_k else None
        if config.rank is None:
            self.z = AdapterParam(z)
        else:
            # one factor random, the other zero: Z starts at 0 and has a gradient
            shape = (heads, features, config.rank)
            left = jax.random.normal(rngs.params(), shape) / np.sqrt(features)
            self.z_left = AdapterParam(left)
            self.z_right = AdapterParam(jnp.zeros((heads, config.rank, head_dim)))

    def _set_map(self, phi: FeatureMap, kind: type[nnx.Variable]) -> None:
        """Keep a map: its arrays as variables, by their place in it, and its settings."""
        leaves, self._settings = jax.tree.flatten(phi)
        self._arrays = array_names(phi)
        self.uneven = bool(self._arrays)
        for name, leaf in zip(self._arrays, leaves, strict=True):
            setattr(self, name, kind(leaf))

    @property
    def phi(self) -> FeatureMap:
        """The feature map, with the arrays as they are now."""
        return jax.tree.unflatten(self._settings, [vars(self)[name][...] for name in self._arrays])

    def take(self, state: PrefixState) -> None:
        """Become this state, of the shapes that there are."""
        of_map = dict(zip(self._arrays, jax.tree.leaves(state.feature_map), strict=True))
        z = {"z_left": state.z.left, "z_right": state.z.right} if isinstance(state.z, LowRank) else {"z": state.z}
        for name, value in ({"k": state.k} | z | of_map).items():
            variable = vars(self)[name]
            variable[...] = jnp.asarray(value, variable.dtype)

    def file_values(self) -> dict[str, Array]:
        """Return the state in the published coordinates."""
        z, k = self.state()
        effective = {"z_left": z.left, "z_right": z.right} if isinstance(z, LowRank) else {"z": z}
        arrays = {name: vars(self)[name][...] for name in self._arrays}
        return effective | arrays if self.k is None else {**effective, "k": k, **arrays}

    def settle(self) -> None:
        """Multiply the coordinates in."""
        z, k = self.state()
        if isinstance(z, LowRank):
            self.z_left, self.z_right = AdapterParam(z.left), AdapterParam(z.right)
        else:
            self.z = AdapterParam(z)
        if self.k is not None:
            self.k = AdapterParam(k)
        self.basis = self.unit = None

    def state(self) -> tuple[Array | LowRank, Array]:
        """Return z [J, R, H] (or a low-rank pair) and k [J, R], as attention takes them."""
        z = LowRank(self.z_left[...], self.z_right[...]) if hasattr(self, "z_left") else self.z[...]
        heads, features = (z.left if isinstance(z, LowRank) else z).shape[:2]
        k = jnp.zeros((heads, features)) if self.k is None else self.k[...]
        if self.basis is None:
            return z, k
        if isinstance(z, LowRank):
            return LowRank(self.basis[...] @ z.left, z.right), k * self.unit[...][:, None]
        return self.basis[...] @ z, k * self.unit[...][:, None]

    def padded(self, features: int) -> tuple[Array | LowRank, Array, FeatureMap]:
        """Return z, k and the map, with features of no account up to so many: rows of a batch have as many."""
        state = PrefixState(*self.state(), self.phi).padded(features)
        return state.z, state.k, state.feature_map


class StateCore(Host, AttentionCore):
    """NTK-Attention with the active adapter's state; also Prefix-Tuning+."""

    unmergeable: ClassVar[str | None] = (
        "phi(q) Z / (A 1 + phi(q) k) is a nonlinear function of the query with a denominator shared with attention"
    )

    def bare(self) -> AttentionCore:
        """Return a plain core."""
        return AttentionCore()

    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        **options: Unpack[AttentionOptions],
    ) -> Float[Array, "B T N H"]:
        """Return :func:`~ntk_prefix.attention.ntk_attention`."""
        if self.rows is not None:
            return self._mixed(query, key, value, options)
        state = self.current()
        if state is None:
            return softmax_attention(query, key, value, **options)
        z, k = state.state()
        return ntk_attention(query, key, value, z, k, feature_map=state.phi, mass=state.mass, **options)

    def _mixed(self, query: Array, key: Array, value: Array, options: AttentionOptions) -> Array:
        """Return a state for each row; a row of -1 has the zero state, which is no prefix."""
        rows = self.rows_of(len(query))
        hosted: list[Any] = [self.adapters[name] for name in self.names]
        kinds = {(state._settings, state.mass): f"{state.phi}, {state.mass}" for state in hosted}
        if len(kinds) > 1:
            raise expected(
                "names",
                "adapters of one feature map and one mass in a mixed batch",
                sorted(kinds.values()),
                "Train them alike",
            )
        most = max(state.phi.dim(query.shape[-1]) for state in hosted)
        z, k, phis = (stacked(list(part), rows) for part in zip(*(state.padded(most) for state in hosted), strict=True))

        # what there is of each row goes with it, the rest is one for all
        whole: dict[str, Any] = dict(options)
        own = {name: whole.pop(name) for name in ("mask", "bias") if whole.get(name) is not None}
        own = {name: jnp.broadcast_to(x, (query.shape[0], *x.shape[1:])) for name, x in own.items()}

        def one(query: Array, key: Array, value: Array, own: dict[str, Array], z: Any, k: Array, phi: Any) -> Array:
            row: dict[str, Any] = {name: x[None] for name, x in own.items()}
            return ntk_attention(
                query[None], key[None], value[None], z, k, feature_map=phi, mass=hosted[0].mass, **whole, **row
            )[0]  # fmt: skip

        return jax.vmap(one)(query, key, value, own, z, k, phis)


def _placed(phi: FeatureMap, seen: LayerRecord) -> FeatureMap:
    """Return the map with arrays chosen for what a layer sees on the calibration batch."""
    tokens, root = np.asarray(seen.seen), seen.scale**0.5
    query, key = (np.asarray(x, np.float64)[tokens].swapaxes(0, 1) * root for x in (seen.query, seen.key))
    return placed(phi, query, key)


def _coordinates(
    seen: LayerRecord, phi: FeatureMap, mass: str, grouped: bool
) -> tuple[Float[Array, "J R R"], Float[Array, "J"]]:
    """Return ``basis = rms(o) E[phi phi^T]^{-1/2}`` and ``unit = 1 / E[phi . 1]``, both times the head's mass.

    The mass of a head is 1 if it is relative, else the median of ``e^{lse}`` over its tokens, or 0 where float32
    could not hold a state of that size: such a head stays as it is. Heads of a group that share a state are one head
    that sees the queries of all.
    """
    tokens, heads = np.asarray(seen.seen), seen.key.shape[2] if grouped else seen.query.shape[2]

    def by_head(x: Array) -> np.ndarray:  # [B, T, N, ...] -> [tokens of all heads of a state, J, ...]
        rows = np.asarray(x, np.float64)[tokens]
        rows = rows.reshape(len(rows), heads, -1, *rows.shape[2:])
        return np.moveaxis(rows, 2, 1).reshape(-1, heads, *rows.shape[3:])

    scaled = jnp.swapaxes(seen.query.astype(jnp.float32) * seen.scale**0.5, 1, 2)
    features = by_head(jnp.swapaxes(phi(scaled), 1, 2))
    if not np.isfinite(features).all():
        raise expected("whiten", "features that float32 holds", f"{phi.name} beyond it", "Take normalized_anchors")
    moments = np.einsum("qnr,qns->nrs", features, features) / len(features)
    eigenvalues, vectors = np.linalg.eigh(moments)
    inverse_root = 1 / np.sqrt(eigenvalues + RIDGE * eigenvalues[:, -1:])
    size = np.sqrt(np.mean(by_head(seen.output) ** 2, axis=(0, 2)))  # [J]
    log_mass = 0 * size if mass == "relative" else np.median(by_head(seen.log_mass()), axis=0)
    own = np.exp(np.where(log_mass < LARGEST_LOG_MASS, log_mass, -np.inf))
    basis = (size * own)[:, None, None] * np.einsum("nrs,ns,nts->nrt", vectors, inverse_root, vectors)
    unit = own / np.abs(features.sum(axis=2)).mean(axis=0)
    return jnp.asarray(basis, jnp.float32), jnp.asarray(unit, jnp.float32)


def _state_of_first_sequence(seen: LayerRecord, phi: FeatureMap) -> tuple[Array, Array]:
    """Return the state fitted to the batch's first sequence as a prefix, on the others' queries and keys.

    Where the others have fewer than two queries per feature, the first sequence's own are taken too: it is a text as good
    as any to stand behind that prefix.
    """
    if unknown := set(seen.scores) - {"scale", "logits_soft_cap"}:
        raise expected(
            "init",
            '"zero" where scores have a bias: no state is fitted to them',
            f"from_prefix beside {sorted(unknown)}",
        )
    real = np.asarray(seen.seen[0])
    enough = seen.seen[1:].sum() >= 2 * phi.dim(seen.query.shape[-1])
    others = [x[1 if enough else 0 :] for x in (seen.query, seen.key, seen.value, seen.mask)]
    state = PrefixState.fit(
        others[0], seen.key[0][real], seen.value[0][real], *others[1:3], feature_map=phi, mask=others[3], **seen.scores
    )
    assert not isinstance(state.z, LowRank)
    return state.z, jnp.maximum(state.k, 0)
