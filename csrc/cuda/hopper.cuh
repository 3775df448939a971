// Hopper's instructions for blocks that work together: barriers in shared memory, bulk copies that
// complete on them, messages to another block of the cluster.
#pragma once

#include <cstdint>

namespace memdec::cuda::hopper {

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The address of something in shared memory, kept in a register: the compiler would rather make it
// again wherever it is used.
__device__ inline uint32_t kept_address(const void* p) {
  uint32_t address;
  asm volatile("mov.u32 %0, %1;" : "=r"(address) : "r"(shared_address(p)));
  return address;
}

// An mbarrier, by its address. A phase ends when `count` arrivals and all announced bytes have
// come; phases are told apart by their parity, 0 first.
struct Barrier {
  uint32_t address;

  __device__ void init(int count) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(count));
  }

  __device__ void arrive() const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
  }

  // Arrives and announces bytes that are still to come.
  __device__ void arrive_expect(uint32_t bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
                 : "memory");
  }

  // Returns when the phase of this parity is over. What came before it is visible: the block's
  // own writes or, kCluster, the cluster's.
  template <bool kCluster = false>
  __device__ void wait(uint32_t parity) const {
    uint32_t over = 0;
    while (!over) {
      if constexpr (kCluster) {
        asm volatile(
            "{\n"
            ".reg .pred over;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%1], %2;\n"
            "selp.u32 %0, 1, 0, over;\n"
            "}\n"
            : "=r"(over)
            : "r"(address), "r"(parity)
            : "memory");
      } else {
        asm volatile(
            "{\n"
            ".reg .pred over;\n"
            "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 over, [%1], %2;\n"
            "selp.u32 %0, 1, 0, over;\n"
            "}\n"
            : "=r"(over)
            : "r"(address), "r"(parity)
            : "memory");
      }
    }
  }
};

// Makes initialised barriers visible to bulk copies and, after a cluster barrier, to the cluster.
__device__ inline void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
}

// The cluster's barrier in two halves; all threads of all blocks arrive, whoever wants waits.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Where something that lies at `p` in this block's shared memory lies in that of block `rank`.
template <typename T>
__device__ inline T* in_block(T* p, int rank) {
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(p), "r"(rank));
  return reinterpret_cast<T*>(address);
}

// Reads a uint4 or uint2 from shared memory in one access; a plain load may become several.
template <typename Word>
__device__ inline Word load_shared(uint32_t address);
template <>
__device__ inline uint4 load_shared<uint4>(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address));
  return x;
}
template <>
__device__ inline uint2 load_shared<uint2>(uint32_t address) {
  uint2 x;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address));
  return x;
}

// Copies `bytes` from global to shared memory; both addresses and the size are multiples of 16.
__device__ inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, Barrier done) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(done.address)
      : "memory");
}

// Writes 16 bytes to the same place in the shared memory of block `rank`, and counts them on that
// block's barrier.
__device__ inline void send(uint4 message, void* place, Barrier done, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 place, done;\n"
      "mapa.shared::cluster.u32 place, %0, %6;\n"
      "mapa.shared::cluster.u32 done, %1, %6;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [place], "
      "{%2, %3, %4, %5}, [done];\n"
      "}\n" ::"r"(shared_address(place)),
      "r"(done.address), "r"(message.x), "r"(message.y), "r"(message.z), "r"(message.w), "r"(rank)
      : "memory");
}

}  // namespace memdec::cuda::hopper
