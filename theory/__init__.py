"""Verifies the theory of infinitely long prefixes, claim by claim; ``python -m theory`` runs all of it."""
