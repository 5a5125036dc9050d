// SPDX-License-Identifier: Apache-2.0
#define LAYERWISE_HASH_SUFFIX Avx2
#include "hash_variant.inc"
