#define LAYERWISE_HASH_SUFFIX Avx2
#include "hash_variant.inc"
