"""A local stand-in for the platform, for trying the package, developing and testing.

An island: nothing here imports the rest of the package, so that a test against the sandbox cannot agree with itself by
accident. Run it with `python -m xpander_celery.sandbox` or `xpander-celery sandbox`.
"""
