// Huge pages for memory that a kernel is about to fill.
#pragma once

#include <cstdint>

namespace memdec::cpu {

// Asks for huge pages in [data, data + bytes): a new matrix of 39 MB is 19 page faults instead of
// 9,500, which take as long as computing it. Without effect where the system has none.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace memdec::cpu
