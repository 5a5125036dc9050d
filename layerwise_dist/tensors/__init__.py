# SPDX-License-Identifier: Apache-2.0
"""Parts of tensors: slices as pure data, the live tensors that hold them, and what memory those take."""
