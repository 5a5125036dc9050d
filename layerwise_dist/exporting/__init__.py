# SPDX-License-Identifier: Apache-2.0
"""Writes checkpoints in other tools' formats: Hugging Face's, torch's DCP, and one torch.save file."""
