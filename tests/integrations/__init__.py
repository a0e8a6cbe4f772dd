"""What frameworks check of what works with them: ``nox -s integrations``. Not part of the usual tests: they are large."""
