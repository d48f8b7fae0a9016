"""Neural tangent kernels of prefix attention: empirical, closed form, and at infinite prefix length.

One layout everywhere: a kernel is ``[n1, d, n2, d]``, so ``kernel.reshape(n1 * d, n2 * d)`` is its Gram matrix.
"""

from ntk_prefix.kernels import equivalence, neural_tangents
from ntk_prefix.kernels.closed_form import prefix_ntk
from ntk_prefix.kernels.dynamics import Prediction, predict
from ntk_prefix.kernels.empirical import KernelFallbackWarning, empirical_ntk
from ntk_prefix.kernels.limit import limit_ntk, real_layer_limit_ntk
from ntk_prefix.kernels.neural_tangents import UntestedJaxWarning
from ntk_prefix.kernels.state import state_ntk

__all__ = [
    "KernelFallbackWarning",
    "Prediction",
    "UntestedJaxWarning",
    "empirical_ntk",
    "equivalence",
    "limit_ntk",
    "neural_tangents",
    "predict",
    "prefix_ntk",
    "real_layer_limit_ntk",
    "state_ntk",
]
