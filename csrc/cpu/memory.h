#pragma once
#include <cstdint>

namespace atlas::cpu {

// Asks for huge pages under memory that was just allocated: a result of many megabytes otherwise costs more in page
// faults than in arithmetic. Where the system has none, nothing happens.
void advise_huge_pages(uintptr_t address, int64_t bytes);

// Memory that belongs to the calling thread until it asks again, aligned to 64 bytes.
void* scratch(int64_t bytes);

}  // namespace atlas::cpu
