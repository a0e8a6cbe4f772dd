"""The soak: thousands of operations, one after the other, at limits and at random moments; nothing may be lost, hang or grow.

It is no test of the suite, as it takes minutes: ``nox -s soak``, or ``python -m tests.soak``.
"""
