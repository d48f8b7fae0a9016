"""The checker that runs the annotations in tests: beartype, with an int allowed where a float is asked (PEP 484)."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
