"""What a person or a script sees of a verdict.  Reads a finished :class:`~aprender.bisection.Report`; computes nothing."""
