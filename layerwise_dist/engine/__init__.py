"""`attach()` and what it returns. It wires the rooms together for one rank."""
