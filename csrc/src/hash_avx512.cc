#define LAYERWISE_HASH_VARIANT Xxh3Avx512
#include "hash_variant.inc"
