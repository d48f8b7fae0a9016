"""LoRA: a low-rank addition to frozen linear maps."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from msgspec import Meta

from ntk_prefix.checks import expected
from ntk_prefix.peft.base import LARGEST, Adapter, AdapterConfig, AdapterParam, Host, gather_rows, module_at, targets
from ntk_prefix.peft.fused import joined, parted
from ntk_prefix.peft.head import HeadConfig
from ntk_prefix.peft.names import Fields, Names, exactly
from ntk_prefix.peft.patterns import matching
from ntk_prefix.typing import Array, Float

__all__ = ["LoraConfig", "LoraLinear"]

Rank = Annotated[int, Meta(ge=1, le=LARGEST)]
Number = Annotated[float, Meta(ge=-1e30, le=1e30)]

HARMLESS_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""``init_lora_weights`` that leave the model's own weights as they were."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Fields:
    """What Hugging Face's fields say of LoRA that changes what it computes."""

    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    r: Rank = 8
    lora_alpha: Number = 8
    use_rslora: bool = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Number] | None = None
    init_lora_weights: bool | str | None = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterConfig):
    """``x W + (alpha / r) x A B`` in place of ``x W``: ``r (in + out)`` weights a matrix.

    Args:
        target: which linear maps; query and value by default, as in the LoRA paper and in peft.
        r: rank.
        alpha: numerator of the scale; ``r`` if None, a scale of 1.
        use_rslora: scale by ``alpha / sqrt(r)`` instead.

    Source: Hu et al., arXiv 2106.09685; A uniform in ``+-1/sqrt(in)``, B zero, as peft starts them.
    """

    method: ClassVar[str] = "lora"
    peft_type: ClassVar[str | None] = "LORA"
    target: str = r"(^|\.)(query|value)$"
    r: int = 8
    alpha: float | None = None
    use_rslora: bool = False

    def __post_init__(self) -> None:
        """Refuse an empty rank."""
        super().__post_init__()
        if self.r < 1:
            raise expected("r", "a rank of at least 1", self.r)

    @property
    def numerator(self) -> float:
        """``alpha``, or what stands for it."""
        return self.r if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """What ``A B`` is multiplied by."""
        return self.numerator / (math.sqrt(self.r) if self.use_rslora else self.r)

    @classmethod
    def to_hugging_face(
        cls, chosen: Sequence[AdapterConfig], model: Any, names: Names, tensors: Mapping[str, Array]
    ) -> tuple[dict[str, Any], dict[str, Array]] | None:
        """Return Hugging Face's fields: the first configuration's rank and alpha, the others' as patterns."""
        ours = [each for each in chosen if isinstance(each, LoraConfig)]
        whole = [each for each in chosen if isinstance(each, HeadConfig)]
        if len(ours) + len(whole) < len(chosen) or len({each.use_rslora for each in ours}) > 1:
            return None
        first, paths = ours[0], [_linears(model, each) for each in ours]
        placed = [(each, path) for each, group in zip(ours, paths, strict=True) for path in group]
        tensors, forms = joined(tensors, names.fused, {names.module(path): each.scale for each, path in placed})
        ranks = {names.saved(path): each.r for each, path in placed} | {name: r for name, (r, _) in forms.items()}
        alphas = {names.saved(path): each.numerator for each, path in placed}
        alphas |= {name: scale * (math.sqrt(r) if first.use_rslora else r) for name, (r, scale) in forms.items()}
        fields = {
            "peft_type": cls.peft_type,
            "r": first.r,
            "lora_alpha": first.numerator,
            "use_rslora": first.use_rslora,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": target_modules({path for group in paths for path in group}, model, names),
            "rank_pattern": {module: r for module, r in ranks.items() if r != first.r},
            "alpha_pattern": {module: alpha for module, alpha in alphas.items() if alpha != first.numerator},
        }
        saved = [names.saved(path) for each in whole for path in targets(model, each)]
        named = {names.key(names.built(key)): value for key, value in tensors.items()}
        return fields | ({"modules_to_save": saved} if saved else {}), named

    @classmethod
    def from_hugging_face(
        cls, fields: Fields, model: Any, names: Names, tensors: dict[str, np.ndarray]
    ) -> tuple[list[AdapterConfig], dict[str, np.ndarray]]:
        """Return one configuration for each rank and alpha that a file asks for."""
        given = fields.read(_Fields)
        if given.init_lora_weights not in HARMLESS_STARTS:
            raise expected(
                fields.file, "init_lora_weights that leaves the model's weights alone", repr(given.init_lora_weights),
                "Convert the adapter to a plain one with peft (path_initial_model_for_weight_conversion)",
            )  # fmt: skip
        every = {path: names.every_name(path) for path in targets(model, cls(target=""))}
        wanted = _wanted(given, every, fields.file)
        if "head.lora_A.weight" not in tensors:
            # trained whole, or not asked for
            wanted -= {f"{names.wrapper}head", "head"}
        tensors, parts = parted(tensors, names.fused)
        wanted -= {path for path in every if parts.get(names.module(path), (1, 1))[0] == 0}
        ranks = _patterned(given.rank_pattern, every, f"{fields.file}: rank_pattern")
        alphas = _patterned(given.alpha_pattern, every, f"{fields.file}: alpha_pattern")
        groups: dict[tuple[int, float], list[str]] = {}
        for path in (path for path in every if path in wanted):
            r, alpha = ranks.get(path, given.r), alphas.get(path, given.lora_alpha)
            kept, whole = parts.get(names.module(path), (r, r))
            if whole == r != kept:  # another number than theirs is one of another rank, which is refused below
                r, alpha = kept, alpha * (math.sqrt(kept / whole) if given.use_rslora else kept / whole)
            form = r, alpha
            groups.setdefault(form, []).append(path.removeprefix(names.wrapper))
        if not groups:
            raise expected(
                fields.file, "target_modules that select linear maps of this model",
                f"{given.target_modules!r}, which selects none",
            )  # fmt: skip
        return [
            cls(target=exactly(paths), r=r, alpha=alpha, use_rslora=given.use_rslora)
            for (r, alpha), paths in groups.items()
        ], tensors

    def hosts(self, module: nnx.Module) -> bool:
        """Linear maps, also those that host other LoRA adapters; those of ``nnx.MultiHeadAttention`` are of many axes."""
        if isinstance(module, nnx.LinearGeneral):
            axes = tuple(range(-len(module.in_features), 0))
            return not module.batch_axis and tuple(module.axis) == axes
        return isinstance(module, (nnx.Linear, LoraLinear))

    def inject(self, module: nnx.Module, name: str, rngs: nnx.Rngs, measured: Any = None) -> nnx.Module:
        """Wrap the linear map, or add to the wrapper that is there."""
        assert isinstance(module, (nnx.Linear, nnx.LinearGeneral, LoraLinear))
        host = module if isinstance(module, LoraLinear) else LoraLinear(module)
        return host.add(name, _Factors(*host.features, self, rngs))


class _Factors(Adapter):
    file_names: ClassVar = {"a": "lora_A.weight", "b": "lora_B.weight"}
    transposed: ClassVar = frozenset({"a", "b"})

    def __init__(self, features_in: int, features_out: int, config: LoraConfig, rngs: nnx.Rngs):
        bound = 1 / math.sqrt(features_in)
        self.a = AdapterParam(
            jax.random.uniform(rngs.params(), (features_in, config.r), jnp.float32, minval=-bound, maxval=bound)
        )
        self.b = AdapterParam(jnp.zeros((config.r, features_out)))
        self.scale = config.scale


class LoraLinear(Host):
    """A frozen linear map and its low-rank additions; several axes of features count as one."""

    unmergeable: ClassVar[str | None] = None

    def __init__(self, base: nnx.Linear | nnx.LinearGeneral):
        super().__init__()
        self.base = base

    @property
    def features(self) -> tuple[int, int]:
        """How many go in and come out."""
        if isinstance(self.base, nnx.Linear):
            return self.base.in_features, self.base.out_features
        return math.prod(self.base.in_features), math.prod(self.base.out_features)

    def bare(self) -> nnx.Linear | nnx.LinearGeneral:
        """Return the frozen map."""
        return self.base

    def __call__(self, x: Float[Array, "B ..."], **options: Any) -> Float[Array, "B ..."]:
        """Return ``base(x)`` plus the addition of the active adapter, or of each row's own; options are the base's."""
        output = self.base(x, **options)
        if isinstance(self.base, nnx.LinearGeneral):
            x = x.reshape(*x.shape[: x.ndim - len(self.base.in_features)], -1)
        if self.rows is not None:
            rows = self.rows_of(len(x))
            hosted = [self.adapters[name] for name in self.names]
            a = gather_rows([factors.a[...] for factors in hosted], rows)
            b = gather_rows([factors.scale * factors.b[...] for factors in hosted], rows)
            addition = jnp.einsum("b...d,bdr->b...r", x, a.astype(x.dtype))
            addition = jnp.einsum("b...r,bre->b...e", addition, b.astype(x.dtype))
            return output + addition.astype(output.dtype).reshape(output.shape)
        factors = self.current()
        if factors is None:
            return output
        addition = (x @ factors.a[...].astype(x.dtype)) @ (factors.scale * factors.b[...]).astype(x.dtype)
        return output + addition.astype(output.dtype).reshape(output.shape)

    def merge(self) -> nnx.Linear | nnx.LinearGeneral:
        """Return one linear map that computes what this one does now: ``W + scale A B``, summed in float32.

        It is rounded to what W is kept in.
        """
        factors = self.current()
        if factors is not None:
            kernel = self.base.kernel[...]
            addition = factors.scale * (factors.a[...] @ factors.b[...]).reshape(kernel.shape)
            self.base.kernel[...] = (kernel + addition).astype(self.base.kernel.dtype)
        return self.base


# ------------------------------------------------------------------------------ Hugging Face's fields


def _linears(model: Any, config: LoraConfig) -> list[str]:
    """Return the places of the adapter: the linear maps that the configuration selects, but for a head trained whole."""
    return [path for path in targets(model, config) if isinstance(module_at(model, path), LoraLinear)]


def target_modules(chosen: set[str], model: Any, names: Names) -> list[str]:
    """Return endings of module names that select these modules and no other linear map; whole names if none do."""
    every = {path: names.saved(path) for path in targets(model, LoraConfig(target=""))}
    # a part stands for the map that it is a part of
    chosen = {path for path, name in every.items() if name in {every[each] for each in chosen}}
    endings = sorted({re.split(r"\.\d+\.", every[path])[-1] for path in chosen})
    if {path for path, theirs in every.items() if _ends(theirs, endings)} == chosen:
        return endings
    return sorted({every[path] for path in chosen})


def _ends(name: str, endings: Iterable[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _selected(modules: str | list[str] | None, every: Mapping[str, Sequence[str]], where: str) -> set[str]:
    """Return what peft's ``target_modules`` means: a regular expression, or endings of names."""
    if isinstance(modules, str):
        found = matching(modules, (name for names in every.values() for name in names), where)
        return {path for path, names in every.items() if found.intersection(names)}
    return {path for path, names in every.items() if any(_ends(name, modules or ()) for name in names)}


def _wanted(given: _Fields, every: Mapping[str, Sequence[str]], file: str) -> set[str]:
    """Return the paths of the modules that peft would put LoRA on."""
    if given.target_modules == "all-linear":
        chosen = {path for path in every if path != "lm_head"}
    else:
        chosen = _selected(given.target_modules, every, f"{file}: target_modules")
    if given.exclude_modules:
        chosen -= _selected(given.exclude_modules, every, f"{file}: exclude_modules")
    layers = given.layers_to_transform
    if layers is not None and layers != []:
        kept = {layers} if isinstance(layers, int) else set(layers)
        numbers = {path: re.search(r"\.(\d+)\.", every[path][-1]) for path in chosen}
        chosen = {path for path, number in numbers.items() if number is not None and int(number[1]) in kept}
    return chosen


def _patterned(patterns: Mapping[str, Any] | None, every: Mapping[str, Sequence[str]], where: str) -> dict[str, Any]:
    """Return the value of the first pattern that is the end of a module's name, for modules that have one."""
    found: dict[str, Any] = {}
    # an ending begins with the name or after a dot in it
    endings = {
        path: {name[start:] for name in names for start in (0, *(i + 1 for i, c in enumerate(name) if c == "."))}
        for path, names in every.items()
    }
    for pattern, value in (patterns or {}).items():
        matched = matching(pattern, (ending for each in endings.values() for ending in each), where)
        for path in every:
            if matched & endings[path]:
                found.setdefault(path, value)
    return found
