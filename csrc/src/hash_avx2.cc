#define LAYERWISE_HASH_VARIANT Xxh3Avx2
#include "hash_variant.inc"
