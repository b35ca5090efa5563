// Descriptions of the exported functions and structs, which shoal_abi() prints and kernels/cpu_library.py compares with
// its own declarations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace shoal {

// Type of an argument or a field. Pointers to anything but structs have the empty name.
struct AbiType {
  const char* name;
  bool is_pointer;
};

template <typename T>
constexpr AbiType abi_type() {
  if constexpr (std::is_pointer_v<T>) {
    using Target = std::remove_cv_t<std::remove_pointer_t<T>>;
    if constexpr (std::is_class_v<Target>)
      return {Target::abi_name, true};
    else
      return {"", true};
  } else if constexpr (std::is_class_v<T>) {
    return {T::abi_name, false};
  } else if constexpr (std::is_same_v<T, float>) {
    return {"float32", false};
  } else {
    static_assert(std::is_same_v<T, int64_t>, "scalars of the C interface are int64_t or float");
    return {"int64", false};
  }
}

// An argument (without a name) or a field.
struct AbiItem {
  AbiType type;
  const char* name;
  size_t offset;
};

// An exported function or struct, in a list of all of them that is built when the library is loaded.
struct AbiEntry {
  const char* name;
  const AbiItem* items;
  size_t num_items;
  size_t size;  // bytes of a struct, 0 for a function
  const AbiEntry* next;
  inline static const AbiEntry* first = nullptr;

  AbiEntry(const char* name, const AbiItem* items, size_t num_items, size_t size)
      : name(name), items(items), num_items(num_items), size(size), next(first) {
    first = this;
  }
  AbiEntry(const AbiEntry&) = delete;
  AbiEntry& operator=(const AbiEntry&) = delete;
};

template <typename... Arguments>
struct AbiFunction : AbiEntry {
  static constexpr AbiItem arguments[] = {{abi_type<Arguments>(), "", 0}...};
  AbiFunction(const char* name, void (*)(Arguments...)) : AbiEntry(name, arguments, sizeof...(Arguments), 0) {}
};

}  // namespace shoal

// Describes an exported function; stands below its definition.
#define SHOAL_EXPORT(function) static const shoal::AbiFunction abi_of_##function(#function, function);

// Describes a struct that Python fills: SHOAL_STRUCT(Threads, FIELD(count), FIELD(min_parallel_work)).
#define SHOAL_STRUCT(struct_name, ...)                                                               \
  static const shoal::AbiEntry abi_of_##struct_name = [] {                                           \
    using Struct = shoal::struct_name;                                                               \
    static constexpr shoal::AbiItem fields[] = {__VA_ARGS__};                                        \
    return shoal::AbiEntry(Struct::abi_name, fields, sizeof(fields) / sizeof(*fields), sizeof(Struct)); \
  }();
#define FIELD(field) {shoal::abi_type<decltype(Struct::field)>(), #field, offsetof(Struct, field)}
