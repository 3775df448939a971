#include "common/kernels.h"
#include "cuda/launch.h"

namespace memdec::cuda {

const char* unavailable_reason() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();  // not sticky: later launches report their own errors
    return cudaGetErrorString(error);
  }
  return count > 0 ? nullptr : "no CUDA device";
}

}  // namespace memdec::cuda
