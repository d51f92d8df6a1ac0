"""Recording in what Inductor compiles, which takes minutes: ``nox -s compiled``."""
