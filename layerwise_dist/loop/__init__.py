# SPDX-License-Identifier: Apache-2.0
"""Where an iteration ends, and what of the training loop belongs to a step: loaders, random numbers, objects."""
