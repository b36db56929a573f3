"""The judge: plain arrays in, a verdict out.

Owns the float64 definitions (:mod:`~aprender.judge.witness`), what rounding may leave of them (:mod:`~aprender.judge.rounding`,
:mod:`~aprender.judge.sums`, :mod:`~aprender.judge.noise`), the decision (:mod:`~aprender.judge.rule`, :mod:`~aprender.judge.replay`,
:mod:`~aprender.judge.verdict`) and the catalogue of faults (:mod:`~aprender.judge.faults`).  Refuses to know a side, a file or a device:
captures, weights and hyper-parameters come as data.  Called by ``aprender.bisection`` and by tests; nothing is imported here, so that a
test of one part loads only that part.
"""
