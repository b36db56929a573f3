"""The judge: plain arrays in, a verdict out.

Owns the definitions (``witness``), what rounding may leave of them (``rounding``, ``sums``, ``prediction``, ``noise``), the test of one
stage (``rule``, ``measure``), its inputs (``replay``), the judgement of one side (``local``), the figures of a free comparison
(``metrics``), the ``verdict`` and the catalogue of ``faults``; in this order to read.  Refuses to know a side, a file or a device:
captures, weights and hyper-parameters come as data.  Called by ``aprender.judgement`` and by tests; nothing is imported here, so that a
test of one part loads only that part.
"""
