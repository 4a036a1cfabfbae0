"""Claims about methods, measured: `claims` declares, `runner` runs, `results` keeps, `compare` sets side by side.

The claims of a method live in a module of this folder that has the method's name (`del_` for `del`); models, tasks and
what is measured on them, where that is long, in another beside it (`duo_runs`, `think_runs`, `insertion`).
"""

from pertoken.bench.claims import Bench, Measurement, claim

__all__ = ["Bench", "Measurement", "claim"]
