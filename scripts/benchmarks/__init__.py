"""Measures AdapterHub from outside, over HTTP, beside its peers and beside what the machine could do at best.

Every figure has its spread. A shared machine can be twice as slow from one run to the next, so only what stands in one
report may be compared, and ratios say more than rates.
"""
