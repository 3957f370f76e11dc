"""The checker behind every signature of the package while tests run (conftest.py installs it)."""

from beartype import BeartypeConf, beartype

# As static checkers do, an int passes where float is asked for.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
