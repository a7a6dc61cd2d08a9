#include "../include/decode_linear_sum.cuh"

template struct hf_fuse::DecodeLinearOf<__half>;
