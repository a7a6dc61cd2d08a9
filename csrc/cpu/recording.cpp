// Recordings (recording.h), which Python knows by number.
#include "recording.h"

#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "checks.h"

namespace hf_fuse {
namespace {

using Calls = std::vector<std::function<void()>>;

thread_local std::unique_ptr<Calls> recorded;  // by this thread, so far

struct Recordings {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<const Calls>> by_number;
  int64_t last = 0;
};
Recordings& recordings() {
  static Recordings all;
  return all;
}

void begin_recording() {
  if (recorded) fail("begin_recording: this thread is recording already");
  recorded = std::make_unique<Calls>();
}

int64_t end_recording() {
  if (!recorded) fail("end_recording: this thread is not recording");
  Recordings& all = recordings();
  const std::lock_guard lock(all.mutex);
  all.by_number[++all.last] = std::move(recorded);
  return all.last;
}

void run_recording(int64_t number) {
  std::shared_ptr<const Calls> calls;
  {
    Recordings& all = recordings();
    const std::lock_guard lock(all.mutex);
    const auto found = all.by_number.find(number);
    if (found == all.by_number.end()) fail("run_recording: there is no recording ", number);
    calls = found->second;
  }
  for (const auto& call : *calls) call();
}

void drop_recording(int64_t number) {
  Recordings& all = recordings();
  const std::lock_guard lock(all.mutex);
  all.by_number.erase(number);
}

}  // namespace

bool is_recording() { return recorded != nullptr; }
void record(std::function<void()> call) { recorded->push_back(std::move(call)); }

}  // namespace hf_fuse

STABLE_TORCH_LIBRARY_FRAGMENT(hf_fuse, m) {
  m.def("begin_recording() -> ()");
  m.def("end_recording() -> int");
  m.def("run_recording(int number) -> ()");
  m.def("drop_recording(int number) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(hf_fuse, CompositeExplicitAutograd, m) {
  m.impl("begin_recording", TORCH_BOX(&hf_fuse::begin_recording));
  m.impl("end_recording", TORCH_BOX(&hf_fuse::end_recording));
  m.impl("run_recording", TORCH_BOX(&hf_fuse::run_recording));
  m.impl("drop_recording", TORCH_BOX(&hf_fuse::drop_recording));
}
