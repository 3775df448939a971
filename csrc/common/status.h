// The outcome of a launcher: kernels never throw and never exit, the bindings raise.
#pragma once

namespace memdec {

struct Status {
  const char* error = nullptr;  // a string with static lifetime, or null for success

  bool ok() const { return error == nullptr; }
};

}  // namespace memdec
