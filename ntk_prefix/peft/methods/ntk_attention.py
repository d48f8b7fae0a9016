r"""NTK-Attention as an adapter: an infinitely long trained prefix, in ``R H + R`` numbers a head.

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
from ntk_prefix.checks import UsageError, expected
from ntk_prefix.feature_maps import FeatureMap, feature_map
from ntk_prefix.models.attention import AttentionCore, AttentionOptions
from ntk_prefix.peft.base import Adapter, AdapterConfig, AdapterParam, Calibration, Host, stacked
from ntk_prefix.peft.methods.lora import LoraConfig
from ntk_prefix.peft.methods.prefix_tuning import host_core
from ntk_prefix.peft.record import LayerRecord
from ntk_prefix.peft.sites import attention_site
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
    """Of one layer: the coordinates to train in and the state to start from; None for what is not asked for."""

    basis: Float[Array, "N R R"] | None
    unit: Float[Array, "N"] | None
    z: Float[Array, "N R H"] | None
    k: Float[Array, "N R"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NTKAttentionConfig(AdapterConfig):
    """``T = (A V + phi(q) Z) / (A 1 + phi(q) k)`` with Z and k trained: ``N (R H + R)`` weights a layer.

    Args:
        target: which attention layers.
        feature_map: name of the map, see :func:`ntk_prefix.feature_map`.
        feature_map_options: its options, as pairs, such as ``(("degree", 2),)``.
        rank: of Z, ``rank (R + H) + R`` weights a head; None is full.
        mass: "absolute", the published form, or "relative", see :func:`ntk_prefix.ntk_attention`.
        whiten: train in coordinates in which features are white and the output's unit is the head's own; needs a
            calibration batch.
        train_k: False leaves the denominator alone, k = 0.
        init: "zero" is the frozen model; "from_prefix" the state fitted to a prefix, the first sequence of the
            calibration batch, on the queries of the others, of all if those are few (mass "absolute" only).

    Source: arXiv 2406.14036 for the published form; the coordinates and the relative mass are ours.
    """

    method: ClassVar[str] = "ntk_attention"
    objects: ClassVar[frozenset[str]] = frozenset({"feature_map"})
    target: str = ""
    feature_map: str = "elu1"
    feature_map_options: tuple[tuple[str, int | float], ...] = ()
    rank: int | None = None
    mass: Literal["absolute", "relative"] = "absolute"
    whiten: bool = False
    train_k: bool = True
    init: Literal["zero", "from_prefix"] = "zero"

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing together."""
        super().__post_init__()
        phi = self.phi
        if self.rank is not None and self.rank < 1:
            raise expected("rank", "at least 1, or None for a full Z", self.rank)
        if self.train_k and not phi.positive:
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
        """The feature map itself."""
        return feature_map(self.feature_map, **dict(self.feature_map_options))

    @property
    def needs_calibration(self) -> bool:
        """Whether :func:`ntk_prefix.peft.apply` wants a calibration batch."""
        return self.whiten or self.init == "from_prefix"

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
        name, options = _named(self.phi) if isinstance(self.feature_map, FeatureMap) else (
            self.feature_map, self.feature_map_options
        )  # fmt: skip
        return dataclasses.replace(self, whiten=False, init="zero", feature_map=name, feature_map_options=options)

    def measure(self, seen: LayerRecord) -> Measured:
        """Return what this method wants to know of a layer of the frozen model."""
        basis, unit = _coordinates(seen, self.phi, self.mass) if self.whiten else (None, None)
        z, k = _state_of_first_sequence(seen, self.phi) if self.init == "from_prefix" else (None, None)
        return Measured(basis, unit, z, k)

    def hosts(self, module: nnx.Module) -> bool:
        """Attention layers."""
        return attention_site(module) is not None

    def inject(self, module: nnx.Module, name: str, rngs: nnx.Rngs, measured: Measured | None = None) -> nnx.Module:
        """Replace the layer's core, or add to the one that is there."""
        site = attention_site(module)
        assert site is not None
        host_core(site, StateCore).add(name, State(site.num_heads, site.head_dim, self, rngs=rngs, measured=measured))
        return module


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuningPlusConfig(NTKAttentionConfig):
    """``o + phi(q) M``: Prefix-Tuning+, ``N R H`` weights a layer; NTK-Attention of relative mass without k.

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


def _named(phi: FeatureMap) -> tuple[str, tuple[tuple[str, float], ...]]:
    """Return the name and the options that make a map equal to this one.

    Raises:
        ValueError: there are none.
    """
    name = getattr(phi, "name", None)
    options = tuple(dataclasses.asdict(phi).items()) if dataclasses.is_dataclass(phi) else ()
    try:
        if isinstance(name, str) and feature_map(name, **dict(options)) == phi:
            return name, options
    except (UsageError, TypeError):
        pass
    raise expected(
        "feature_map",
        "a map that a file can name",
        f"{phi!r}, which another process does not know",
        "The adapter stays on the model: keep its weights in a checkpoint, or build the map "
        "into ntk_prefix.feature_maps",
    )


class State(Adapter):
    """The trained z', k' of one layer and the fixed coordinates they are given in."""

    def __init__(
        self,
        heads: int,
        head_dim: int,
        config: NTKAttentionConfig,
        *,
        rngs: nnx.Rngs,
        measured: Measured | None = None,
    ):
        self.phi, self.mass = config.phi, config.mass
        features = self.phi.affordable_dim(head_dim)
        if config.needs_calibration and measured is None:
            raise expected(
                "calibration",
                "a batch for whiten=True or init='from_prefix'",
                "none",
                "Give apply(..., calibration=...)",
            )
        basis, unit, z, k = measured or Measured(None, None, None, None)
        self.basis: Any = None if basis is None else Calibration(basis)
        self.unit: Any = None if unit is None else Calibration(unit)
        z = jnp.zeros((heads, features, head_dim)) if z is None else z
        k = jnp.zeros((heads, features)) if k is None else k
        self.k = AdapterParam(k, non_negative=True) if config.train_k else None
        if config.rank is None:
            self.z = AdapterParam(z)
        else:
            # one factor random, the other zero: Z starts at 0 and has a gradient
            shape = (heads, features, config.rank)
            left = jax.random.normal(rngs.params(), shape) / np.sqrt(features)
            self.z_left = AdapterParam(left)
            self.z_right = AdapterParam(jnp.zeros((heads, config.rank, head_dim)))

    def file_values(self) -> dict[str, Array]:
        """Return the state in the published coordinates."""
        z, k = self.state()
        effective = {"z_left": z.left, "z_right": z.right} if isinstance(z, LowRank) else {"z": z}
        return effective if self.k is None else {**effective, "k": k}

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
        """Return z [N, R, H] (or a low-rank pair) and k [N, R], as attention takes them."""
        z = LowRank(self.z_left[...], self.z_right[...]) if hasattr(self, "z_left") else self.z[...]
        heads, features = (z.left if isinstance(z, LowRank) else z).shape[:2]
        k = jnp.zeros((heads, features)) if self.k is None else self.k[...]
        if self.basis is None:
            return z, k
        if isinstance(z, LowRank):
            return LowRank(self.basis[...] @ z.left, z.right), k * self.unit[...][:, None]
        return self.basis[...] @ z, k * self.unit[...][:, None]


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
        assert self.rows is not None
        rows = self.rows
        hosted: list[Any] = [self.adapters[name] for name in self.names]
        kinds = {(state.phi, state.mass) for state in hosted}
        if len(kinds) > 1:
            raise expected(
                "names", "adapters of one feature map and one mass in a mixed batch", kinds, "Train them alike"
            )
        z, k = (stacked(list(part), rows) for part in zip(*(state.state() for state in hosted), strict=True))

        # what there is of each row goes with it, the rest is one for all
        whole: dict[str, Any] = dict(options)
        own = {name: whole.pop(name) for name in ("mask", "bias") if whole.get(name) is not None}
        own = {name: jnp.broadcast_to(x, (query.shape[0], *x.shape[1:])) for name, x in own.items()}

        def one(query: Array, key: Array, value: Array, own: dict[str, Array], z: Any, k: Array) -> Array:
            row: dict[str, Any] = {name: x[None] for name, x in own.items()}
            phi, mass = hosted[0].phi, hosted[0].mass
            return ntk_attention(
                query[None], key[None], value[None], z, k, feature_map=phi, mass=mass, **whole, **row
            )[0]  # fmt: skip

        return jax.vmap(one)(query, key, value, own, z, k)


def _coordinates(seen: LayerRecord, phi: FeatureMap, mass: str) -> tuple[Float[Array, "N R R"], Float[Array, "N"]]:
    """Return ``basis = rms(o) E[phi phi^T]^{-1/2}`` and ``unit = 1 / E[phi . 1]``, both times the head's mass.

    The mass of a head is 1 if it is relative, else the median of ``e^{lse}`` over its tokens, or 0 where float32
    could not hold a state of that size: such a head stays as it is.
    """
    scaled = seen.query.astype(jnp.float32) * seen.scale**0.5
    tokens = np.asarray(seen.seen)
    features = np.asarray(phi(scaled), np.float64)[tokens]  # [tokens, N, R]
    moments = np.einsum("qnr,qns->nrs", features, features) / len(features)
    eigenvalues, vectors = np.linalg.eigh(moments)
    inverse_root = 1 / np.sqrt(eigenvalues + RIDGE * eigenvalues[:, -1:])
    size = np.sqrt(np.mean(np.asarray(seen.output, np.float64)[tokens] ** 2, axis=(0, 2)))  # [N]
    log_mass = 0 * size if mass == "relative" else np.median(np.asarray(seen.log_mass())[tokens], axis=0)
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
