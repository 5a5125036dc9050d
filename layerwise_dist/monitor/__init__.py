# SPDX-License-Identifier: Apache-2.0
"""The writer in a process of its own: what all ranks have staged is committed even if every training process dies."""
