# SPDX-License-Identifier: Apache-2.0
"""Storage: names on disk, the shard file, typed JSON, and the adapter that writes several checkpoints at once."""
