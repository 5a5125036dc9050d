# SPDX-License-Identifier: Apache-2.0
"""The package's own benchmarks: what `layerwise bench` runs. Nothing of the library imports this room.

Every figure is a ratio of things measured in turn in the same run, given as a median over rounds with its spread.
"""
