"""Recording: placeholders, what torch's operators do to them, and how they become real tensors.

From the ground up: generator, tensors (records, placeholders, becoming real), block, precision (dtypes of results),
calls (operators left to later), dispatch (any operator), recorded (those that recipes take in), factories, mode,
operators and methods (the fast path), pending (what outlives the block), guest (what is replaced in torch).
"""

from . import methods as methods
