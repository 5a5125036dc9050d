# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in the formats that other tools read: Hugging Face's, torch's DCP, and one file of torch.save."""
