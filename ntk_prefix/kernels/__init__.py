"""Neural tangent kernels of prefix attention: empirical, closed form, and at infinite prefix length."""
