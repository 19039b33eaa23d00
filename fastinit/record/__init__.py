"""Recording: placeholders, what torch's operators do to them, and how they become real tensors.

From the ground up: generator, records (what storages are to contain), storageless (tensors without storage), tensors
(placeholders, becoming real), block, precision (dtypes of results), calls (operators left to later), dispatch (any
operator), recorded (those that recipes take in), computed (factories that no recipe takes in), factories, mode,
operators and methods (the fast path), unwritten and reading (what outlives the block, and what operators do to it),
pending (how a block leaves it), history (what has written what, for the report), guest (what is replaced in torch).

Private: it may change with any version.
"""

from . import methods as methods
