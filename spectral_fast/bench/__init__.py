"""`spectral-fast bench`: every kernel on a user's GPU, checked, timed, beside its peers and what the card allows.

cards.py      public peaks of known cards    factors.py  adapters in memory
workloads.py  what is run, with its peers    gate.py     what must hold before a time counts
timing.py     device time, from a cold cache run.py      all of it, as one table
"""
