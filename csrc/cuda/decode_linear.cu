// decode_linear by dtype.
#include "../include/decode_rows.cuh"

namespace hf_fuse {

// The normed rows of x.
int64_t decode_linear_workspace_size(const DecodeLinear& p) {
  int64_t bytes = 0;
  dispatch_dtype(kDecodeLinear, p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) == 2) {
      if (p.norm_weight && DecodeMatmulOf<T>::can_run(p)) bytes = p.batch * p.size * sizeof(T);
    }
  });
  return bytes;
}

void decode_linear(const DecodeLinear& p, void* stream) {
  constexpr int64_t kMaxUnits = 1 << 30;  // so that int counts rows and adds them up
  int64_t units = p.weights[0].rows;
  if (p.epilogue != Epilogue::kGated) units += p.weights[1].rows + p.weights[2].rows;
  if (units >= kMaxUnits) {
    throw std::runtime_error("hf_fuse.decode_linear: too many rows: " + std::to_string(units));
  }
  dispatch_dtype(kDecodeLinear, p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) == 2) {
      if (DecodeMatmulOf<T>::can_run(p) && (p.workspace || !p.norm_weight))
        return DecodeMatmulOf<T>::run(p, units, stream);
    }
    DecodeLinearOf<T>::run(p, units, stream);
  });
}

void decode_linear_two(const DecodeLinear& a, const DecodeLinear& b, void* stream) {
  bool done = false;
  dispatch_dtype(kDecodeLinear, a.dtype, [&](auto tag) {
    done = DecodeLinearOf<typename decltype(tag)::type>::run_two(a, b, stream);
  });
  if (!done) decode_linear(a, stream), decode_linear(b, stream);
}

void decode_linear_sum(const DecodeLinear& a, const DecodeLinear& b, void* stream) {
  bool done = false;
  dispatch_dtype(kDecodeLinear, a.dtype, [&](auto tag) {
    done = DecodeLinearOf<typename decltype(tag)::type>::run_sum(a, b, stream);
  });
  if (!done) decode_linear(a, stream), decode_linear(b, stream);
}

}  // namespace hf_fuse
