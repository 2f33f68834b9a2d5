"""The run-time type checker of tests: beartype, with int accepted where float is declared, as type checkers do."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
