"""The training loops that people already have. Each module is for one of them, and is imported only when asked for."""
