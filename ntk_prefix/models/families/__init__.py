"""Families that are a Llama or a BERT but for some fields, and encoders of their own: a file each.

Not imported from here: :data:`ntk_prefix.models.loading.MODELS` is the list.
"""
