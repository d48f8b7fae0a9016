r"""Feature maps ``phi`` with ``phi(q) . phi(k)`` in the place of ``exp(q . k)``.

A prefix enters attention only through ``sum_j exp(q . k_j) v_j`` and ``sum_j exp(q . k_j)``. With a feature
map these become ``phi(q) Z`` and ``phi(q) . k``: a state whose size does not depend on the length of the
prefix.

================================  ============  ========  =====================================================
``feature_map(...)``              dimension R   positive  is phi(q) . phi(k) close to exp(q . k)?
================================  ============  ========  =====================================================
``"elu1"``                        H             yes       no: Z and k must be trained or fitted
``"taylor", degree=g``            C(H + g, g)   no        yes, deterministically; use an even degree
``"minimax", degree=g, score=S``  the same     no        yes, up to S, with a far smaller error there
``"positive_random", features``    features     yes       yes, in probability
``"elu"``, ``"gelu"``             H             no        no: the maps of Prefix-Tuning+, without a mass
``"anchors", points``             R             yes       no: Z and k are one's own, as the points are
``"normalized_anchors"``            R             yes       no: the same, as probabilities
``"nearest", centroids``          R             yes       no: one number for each cell
``"projected", inner, ...``       inner's       inner's   no: ``inner`` on some directions of the head
``"concatenated", maps``          their sum     if all    no: the features of several maps, side by side
================================  ============  ========  =====================================================

Every map takes the *scaled* vector: attention calls ``phi(q * sqrt(scale))`` and ``phi(k * sqrt(scale))``, so
that ``phi(q) . phi(k)`` stands for ``exp(scale * q . k)``; with the usual ``scale = 1/sqrt(H)`` that is
``phi(q / H**0.25)``. A new map is one class, here or anywhere: see :class:`FeatureMap`.

Every map is a pytree. Those of the first five rows have no leaves: they are frozen dataclasses, equal settings are equal
maps, and one may be a static argument of ``jax.jit``. The others own arrays, which are their leaves, and may be traced,
trained, stacked and mapped over like those of any other tree; they are arguments and never static.

Classes have a help of their own: :class:`FeatureMap`, and for each row of the table ``Elu1``, ``Taylor``, ``Minimax``,
``PositiveRandom``, ``Elu``, ``Gelu``, ``Anchors``, ``NormalizedAnchors``, ``Nearest``, ``Projected``, ``Concatenated``.
"""

from ntk_prefix.feature_maps.base import LARGEST_DIM, attention_error_bound, feature_map, feature_maps
from ntk_prefix.feature_maps.base import FeatureMap as FeatureMap
from ntk_prefix.feature_maps.fixed import Elu as Elu
from ntk_prefix.feature_maps.fixed import Elu1 as Elu1
from ntk_prefix.feature_maps.fixed import Gelu as Gelu
from ntk_prefix.feature_maps.fixed import PositiveRandom as PositiveRandom
from ntk_prefix.feature_maps.fixed import Taylor as Taylor
from ntk_prefix.feature_maps.minimax import Minimax as Minimax
from ntk_prefix.feature_maps.with_arrays import Anchors as Anchors
from ntk_prefix.feature_maps.with_arrays import Concatenated as Concatenated
from ntk_prefix.feature_maps.with_arrays import Nearest as Nearest
from ntk_prefix.feature_maps.with_arrays import NormalizedAnchors as NormalizedAnchors
from ntk_prefix.feature_maps.with_arrays import Projected as Projected

# without classes, as in ntk_prefix/__init__.py
__all__ = [
    "LARGEST_DIM",
    "attention_error_bound",
    "feature_map",
    "feature_maps",
]
