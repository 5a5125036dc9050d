# SPDX-License-Identifier: Apache-2.0
"""Where an iteration ends, and what else belongs to a step: loaders, random numbers, objects."""
