#define LAYERWISE_HASH_VARIANT Xxh3Baseline
#define LAYERWISE_HASH_RUNS Xxh3RunsBaseline
#include "hash_variant.inc"
