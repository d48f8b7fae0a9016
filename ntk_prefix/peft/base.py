"""What all methods share: parameters that are trained by their type, configurations, and modules that can host adapters.

A method is one file in ``methods``: a configuration, which says in hooks what surgery, files and training have to know of
it, the weights of one place (:class:`Adapter`), and the module that hosts them (:class:`Host`). Nothing else knows it.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx

from ntk_prefix.checks import expected
from ntk_prefix.peft.patterns import matching
from ntk_prefix.precision import accumulation_dtype
from ntk_prefix.typing import Array, Float, Int

__all__ = [
    "LARGEST",
    "Adapter",
    "AdapterConfig",
    "AdapterParam",
    "Calibration",
    "Host",
    "InactiveParam",
    "dotted",
    "gather_rows",
    "module_at",
    "set_active",
    "stacked",
    "targets",
    "widened",
    "without_hosts",
]


LARGEST_NUMBER = 1e15
"""In a configuration: squares of it, and products with weights, are numbers that float32 holds."""

LARGEST = 2**16
"""Of ranks and counts, in a configuration and in a file: more is no adapter, and nothing is made of it to find that out."""


class AdapterParam(nnx.LoRAParam):
    """A weight that is trained; ``wrt=AdapterParam`` is all that an optimizer or a train step has to know.

    A subclass of ``nnx.LoRAParam``, so fine-tuners that select by that type train and save it unchanged. What else there
    is to say of a weight is metadata: ``non_negative=True`` is kept at >= 0 by :func:`ntk_prefix.peft.non_negative`.
    """


class InactiveParam(nnx.Param):
    """A weight of an adapter that is not the active one: kept and saved, not trained."""


class Calibration(nnx.Variable):
    """Numbers measured once on real inputs, such as a whitening matrix: saved with the adapter, never trained."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What every method's configuration has.

    Args:
        target: regular expression that is searched in the dotted paths of modules, such as
            ``layers.0.attention.query``; only modules of the kind the method changes are looked at.
        train_head: also train the classifier's head, if the model has one; each adapter keeps a head of its own.
    """

    method: ClassVar[str]
    peft_type: ClassVar[str | None] = None
    """What Hugging Face calls the method, if its library has it."""
    in_place: ClassVar[bool] = False
    """True if the method changes the model's own weights, so that it cannot be switched off or shared."""
    objects: ClassVar[frozenset[str]] = frozenset()
    """Fields whose value may also be an object of another type, which the method looks at itself."""
    in_int8: ClassVar[bool] = False
    """True if its arrays of three axes may be in int8 in a file, see :func:`ntk_prefix.peft.file_dtypes.packed`."""
    target: str = ""
    train_head: bool = True

    def __post_init__(self) -> None:
        """Refuse values of other types than the fields', numbers that are not finite, a target that is no pattern."""
        kinds = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                if field.name not in self.objects or isinstance(value, str | None):
                    msgspec.convert(value, kinds[field.name])
            except (msgspec.ValidationError, TypeError):
                raise expected(field.name, field.type, repr(value)) from None
            if isinstance(value, int | float) and not abs(value) <= LARGEST_NUMBER:
                raise expected(field.name, f"a number within +-{LARGEST_NUMBER:g}", value)
            if isinstance(value, int) and abs(value) > LARGEST:
                raise expected(field.name, f"a number of at most {LARGEST}", value)
        try:
            re.compile(self.target)
        except (re.error, OverflowError, RecursionError) as error:
            raise expected("target", "a regular expression", f"{self.target!r}: {error}") from error

    @classmethod
    def presets(cls) -> dict[str, tuple[AdapterConfig, ...]]:
        """Return what ``python -m train --method NAME`` uses, by name; alone or with other methods."""
        return {cls.method: (cls(),)}

    def hosts(self, module: nnx.Module) -> bool:
        """Return whether the module is of the kind that the method changes."""
        raise NotImplementedError

    def inject(self, module: nnx.Module, name: str, rngs: nnx.Rngs, measured: Any = None) -> nnx.Module:
        """Return the module that stands in the place of ``module`` and hosts an adapter called ``name``.

        Args:
            module: one that the method hosts.
            name: of the adapter.
            rngs: for a random start.
            measured: what :meth:`measure` returned for this module, None without a calibration batch.
        """
        raise NotImplementedError

    # what most methods leave as it is

    @property
    def needs_calibration(self) -> bool:
        """Whether :func:`ntk_prefix.peft.apply` wants a calibration batch."""
        return False

    @property
    def calibration_tokens(self) -> int:
        """How many tokens a calibration batch has to have for :meth:`measure`."""
        return 1

    def measure(self, seen: Any) -> Any:
        """Return what the method wants to know of an attention layer of the frozen model, a ``LayerRecord``."""
        return None

    @property
    def unmixable(self) -> str | None:
        """What an adapter would have to do for rows of one batch to each have their own; None if they can."""
        return "stand beside frozen weights" if self.in_place else None

    @property
    def position_shift(self) -> int:
        """By how much the tokens' positions move."""
        return 0

    @property
    def pooling(self) -> str | None:
        """Which row a classifier reads by this method; None leaves that to the classifier."""
        return None

    # files

    def stored(self) -> AdapterConfig:
        """Return the configuration that stands in a file: what is multiplied into the saved weights is left out.

        Raises:
            ValueError: nothing that a file can hold means the same.
        """
        return self

    @classmethod
    def to_hugging_face(
        cls, chosen: Sequence[AdapterConfig], model: Any, names: Any, tensors: Mapping[str, Array]
    ) -> tuple[dict[str, Any], dict[str, Array]] | None:
        """Return fields and tensors as Hugging Face's library has them, None if it has no such adapter.

        Args:
            chosen: the adapter's configurations, the first of which is of this class.
            model: what they are on.
            names: its :class:`~ntk_prefix.peft.names.Names`.
            tensors: by canonical key.
        """
        return None

    @classmethod
    def from_hugging_face(
        cls, fields: Any, model: Any, names: Any, tensors: dict[str, np.ndarray]
    ) -> tuple[list[AdapterConfig], dict[str, np.ndarray]]:
        """Return the configurations that a file of :attr:`peft_type` means, and its tensors by canonical key.

        Args:
            fields: the file's :class:`~ntk_prefix.peft.names.Fields`.
            model: what they are to be put on.
            names: its :class:`~ntk_prefix.peft.names.Names`.
            tensors: of the file, by canonical key.
        """
        raise NotImplementedError


class Adapter(nnx.Module):
    """The weights of one adapter in one place.

    Class attributes:
        file_names: attribute -> what it is called in a file, where that is something else.
        transposed: attributes stored [out, in].
        optional: attributes that a file may leave at their start.
        uneven: whether heads may be of different length, so that a file leaves out what fills them up.
    """

    file_names: ClassVar[Mapping[str, str]] = {}
    transposed: ClassVar[frozenset[str]] = frozenset()
    optional: tuple[str, ...] = ()
    uneven: bool = False

    def file_values(self) -> dict[str, Array]:
        """Return the weights by attribute, in the meaning that a file has."""
        return {
            key: value[...] for key, value in vars(self).items() if isinstance(value, (AdapterParam, InactiveParam))
        }

    def settle(self) -> None:
        """Compute once what every call computes of the weights alone; they are not trained any more, nor saved.

        Most methods have nothing of the kind.
        """


class Host(nnx.Module):
    """A module that stands beside frozen weights and hosts adapters by name.

    Exactly one adapter is active, or none (then the module computes what the frozen model does), or ``rows`` names an
    adapter for each row of the batch.

    Attributes:
        adapters: name -> the adapter's weights.
        active: name of the active adapter, or None.
        rows: [B] indices into ``names``, -1 for no adapter; None outside :func:`ntk_prefix.peft.mixed`.
    """

    unmergeable: ClassVar[str | None] = "no matrix of the model computes what it adds"
    """Why :meth:`merge` cannot be; None if it can."""

    def __init__(self) -> None:
        self.adapters: Any = nnx.Dict()
        self.active: str | None = None
        self.rows: Int[Array, "B"] | None = nnx.data(None)
        self.names: tuple[str, ...] = ()

    def bare(self) -> nnx.Module:
        """Return what stood in this place before the first adapter."""
        raise NotImplementedError

    def merge(self) -> nnx.Module:
        """Return what :meth:`bare` does, with the active adapter written into its weights."""
        raise NotImplementedError

    def add(self, name: str, adapter: Adapter) -> Host:
        """Host one more adapter.

        Raises:
            ValueError: there is one of that name.
        """
        if name in self.adapters:
            raise expected("name", "a new adapter name", f"{name!r}, which is there already", "Delete it first")
        self.adapters[name] = adapter
        self.names = (*self.names, name)
        return self

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        del self.adapters[name]
        self.names = tuple(other for other in self.names if other != name)
        self.active = None if self.active == name else self.active

    def rows_of(self, batch: int) -> Int[Array, "B"]:
        """Return the indices of a mixed batch.

        Raises:
            UsageError: the batch has another number of rows.
        """
        self.check_rows(batch)
        assert self.rows is not None
        return self.rows

    def check_rows(self, batch: int) -> None:
        """Refuse a mixed batch that has another number of rows.

        Raises:
            UsageError: naming both numbers.
        """
        if self.rows is not None and self.rows.shape != (batch,):
            raise expected("rows", f"one for each of the {batch} rows of the batch", f"{len(self.rows)}")

    def repeat_rows(self, batch: int) -> None:
        """Let each row of a mixed batch be several that follow one another, so that there are ``batch``."""
        if self.rows is not None:
            self.rows = jnp.repeat(self.rows, batch // len(self.rows))

    def current(self) -> Any:
        """Return the active adapter of this module, None if it has none under the active name."""
        if self.active is None or self.active not in self.adapters:
            return None
        return self.adapters[self.active]


def set_active(adapter: nnx.Module, active: bool) -> None:
    """Give the weights of an adapter the type that says whether they are trained; what else is said of them stays."""
    kind = AdapterParam if active else InactiveParam
    for _, module in nnx.iter_modules(adapter):
        for attribute, variable in list(vars(module).items()):
            if isinstance(variable, (AdapterParam, InactiveParam)) and type(variable) is not kind:
                setattr(module, attribute, kind(variable[...], **variable.get_metadata()))


def widened(weight: Array) -> Array:
    """Return a weight as it is trained: in float32, or float64, whatever it was kept in before.

    A narrow one loses what small steps add to it: in bfloat16 all that is below 1/256 of the weight.
    """
    return weight.astype(accumulation_dtype(weight.dtype))


def gather_rows(arrays: list[Array], rows: Int[Array, "B"]) -> Float[Array, "B ..."]:
    """Return for each row the array of its adapter, zeros where ``rows`` is -1.

    Raises:
        ValueError: the adapters are not of one shape.
    """
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise expected("names", "adapters of one shape in a mixed batch", sorted(shapes), "Train them alike")
    return jnp.stack([*arrays, jnp.zeros_like(arrays[0])])[rows]


def stacked(factors: list[Any], rows: Int[Array, "B"]) -> Any:
    """As :func:`gather_rows`, for arrays and for low-rank pairs."""
    if len({jax.tree.structure(factor) for factor in factors}) > 1:
        raise expected("names", "adapters of one shape in a mixed batch", "full and low rank", "Train them alike")
    return jax.tree.map(lambda *leaves: gather_rows(list(leaves), rows), *factors)


# ------------------------------------------------------------------------------------------- places


def targets(model: Any, config: AdapterConfig) -> list[str]:
    """Return the dotted paths of the modules that a configuration selects on the model as it is.

    Adapters are not looked at. What a host wraps is the host's, except to a method that trains the model's own weights:
    that one finds them there, and its ``target`` is searched in the path they had before.

    Raises:
        ValueError: there is none.
    """
    candidates = []
    hosts: list[str] = []
    for path, module in sorted(nnx.iter_modules(model), key=lambda item: len(item[0])):
        place = dotted(path)
        inside = [host for host in hosts if place.startswith(host + ".")]
        if any(not place.startswith(host + ".base") for host in inside) or (inside and not config.in_place):
            continue
        if isinstance(module, Host):
            hosts.append(place)
        if config.hosts(module):
            candidates.append((place, without_hosts(place, hosts)))
    matched = matching(config.target, [known for _, known in candidates], "target", how="search")
    found = [place for place, known in candidates if known in matched]
    if not found:
        raise expected(
            "target",
            f"an expression that matches modules for {config.method}",
            f"{config.target!r}, which matches none of {[known for _, known in candidates][:8]} ..."
            if candidates
            else f"{config.target!r}, which matches none: {type(model).__name__} has no module that the method changes",
            "ntk_prefix.peft.sites says what is found",
        )
    return found


def without_hosts(place: str, hosts: Sequence[str]) -> str:
    """Return the path that a module had before it was wrapped."""
    for host in sorted(hosts, key=len, reverse=True):
        if place == f"{host}.base" or place.startswith(f"{host}.base."):
            place = host + place.removeprefix(f"{host}.base")
    return place


def module_at(model: Any, path: str) -> Any:
    """Return the module at a dotted path."""
    for key in filter(None, path.split(".")):
        model = model[int(key)] if key.isdigit() else getattr(model, key)
    return model


def dotted(path: Sequence[Any]) -> str:
    """Return a module's path as it is written: ``layers.0.attention``."""
    return ".".join(map(str, path))
