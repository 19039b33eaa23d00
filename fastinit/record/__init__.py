"""Recording: placeholders, what torch's operators do to them, and how they become real tensors.

tensors (records, placeholders, becoming real) < block < dispatch (operators), factories < mode, methods (the fast
path), guest (what torch has replaced) and pending (what outlives the block).
"""

from . import methods as methods
