# SPDX-License-Identifier: Apache-2.0
"""Reports each checkpoint of a run to a file, TensorBoard and Prometheus, and reads the file back."""
