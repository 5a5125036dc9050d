# SPDX-License-Identifier: Apache-2.0
"""What tests share: runners of jobs, models, and the kits of the larger themes."""
