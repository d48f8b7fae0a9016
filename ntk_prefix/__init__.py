"""The neural tangent kernel of infinitely long prefixes in attention, and NTK-Attention itself."""
