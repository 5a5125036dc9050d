# SPDX-License-Identifier: Apache-2.0
"""`attach()` and what it returns. It wires the rooms together for one rank."""
