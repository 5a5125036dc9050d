"""Which part of which tensor: slices as pure data, the live tensors that hold them, and what memory those take."""
