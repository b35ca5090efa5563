// Prints the C interface, one line for each function or struct:
//   shoal_swiglu(int64, *, int64, *, int64, int64, int64)
//   Threads{count int64 @0, min_parallel_work int64 @8} 16 bytes
#include "abi.h"

#include <string>

#include "paged.h"

SHOAL_STRUCT(KVCacheArgs, FIELD(data), FIELD(stride), FIELD(num_slots), FIELD(fp8))
SHOAL_STRUCT(IndexKeys, FIELD(pages), FIELD(num_blocks), FIELD(block_size), FIELD(data_bytes), FIELD(scale_bytes))
SHOAL_STRUCT(LayoutArgs, FIELD(block_tables), FIELD(max_blocks), FIELD(block_size), FIELD(cu_seqlens_q),
             FIELD(num_sequences), FIELD(positions))
SHOAL_STRUCT(PagedArgs, FIELD(kv_cache), FIELD(layout))

namespace shoal {
namespace {

std::string describe(const AbiEntry& entry) {
  const bool is_struct = entry.size > 0;
  std::string text = std::string(entry.name) + (is_struct ? "{" : "(");
  for (size_t i = 0; i < entry.num_items; ++i) {
    const AbiItem& item = entry.items[i];
    if (i > 0) text += ", ";
    if (is_struct) text += std::string(item.name) + " ";
    text += std::string(item.type.name) + (item.type.is_pointer ? "*" : "");
    if (is_struct) text += " @" + std::to_string(item.offset);
  }
  return text + (is_struct ? "} " + std::to_string(entry.size) + " bytes\n" : ")\n");
}

}  // namespace
}  // namespace shoal

// The text lives as long as the library.
extern "C" const char* shoal_abi() {
  static const std::string text = [] {
    std::string lines;
    for (const auto* entry = shoal::AbiEntry::first; entry != nullptr; entry = entry->next)
      lines += shoal::describe(*entry);
    return lines;
  }();
  return text.c_str();
}
