"""A convergence certificate that is not vacuous: the theorem and its proof are in theory/certificate.md.

>>> certificate = npx.certificate.find_m(x, y, sigma=1.0, model="fixed")
>>> print(certificate.explain())
"""

from ntk_prefix.certificate.draws import Draws, certify_draws
from ntk_prefix.certificate.margin import MarginCertificate
from ntk_prefix.certificate.theorem import Certificate, certify, find_m

__all__ = ["Certificate", "Draws", "MarginCertificate", "certify", "certify_draws", "find_m"]
