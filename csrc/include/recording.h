// Calls of a step's ops on a CPU, recorded to be run again by one call from Python: what a CUDA
// graph is on a GPU. Recorded are the checked arguments, with the tensors' addresses, which the
// caller keeps valid.
#pragma once
#include <functional>

namespace hf_fuse {

bool is_recording();  // this thread
void record(std::function<void()> call);

}  // namespace hf_fuse
