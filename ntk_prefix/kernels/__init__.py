"""Neural tangent kernels of prefix attention: empirical, closed form, and at infinite prefix length.

One layout everywhere: a kernel is ``[n1, d, n2, d]``, so ``kernel.reshape(n1 * d, n2 * d)`` is its Gram matrix.

Classes have a help of their own: ``Prediction``, what :func:`predict` returns, and the warnings ``KernelFallbackWarning``
and ``UntestedJaxWarning``.
"""

from ntk_prefix.kernels import equivalence, neural_tangents
from ntk_prefix.kernels.closed_form import prefix_ntk
from ntk_prefix.kernels.dynamics import Prediction as Prediction
from ntk_prefix.kernels.dynamics import predict
from ntk_prefix.kernels.empirical import KernelFallbackWarning as KernelFallbackWarning
from ntk_prefix.kernels.empirical import empirical_ntk
from ntk_prefix.kernels.limit import limit_ntk, real_layer_limit_ntk
from ntk_prefix.kernels.neural_tangents import UntestedJaxWarning as UntestedJaxWarning
from ntk_prefix.kernels.state import state_ntk

# without classes, as in ntk_prefix/__init__.py
__all__ = [
    "empirical_ntk",
    "equivalence",
    "limit_ntk",
    "neural_tangents",
    "predict",
    "prefix_ntk",
    "real_layer_limit_ntk",
    "state_ntk",
]
