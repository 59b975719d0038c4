// Repeats calls of the kernels that tritium.testing.kernel_calls wrote down, and compares every byte they leave.
//
//   replay FILE [--uncompared]
//
// Each region of a call is an allocation of its own size: a sanitizer sees a byte beyond it. Linked with the kernels
// themselves. Prints each call that differs, then the kernels that were called, then how many calls there were.
// --uncompared: what they leave is not looked at, as another level of instructions has other bits.
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <vector>

namespace {

enum Kind : uint64_t { kRaw, kF32, kBF16, kF16 };

struct Region {
  uint64_t kind;
  std::vector<unsigned char> before, after;
  unsigned char* memory;
};

void read(std::FILE* file, void* to, size_t size) {
  if (size != 0 && std::fread(to, 1, size, file) != size) std::fprintf(stderr, "the file ends early\n"), std::exit(2);
}

bool is_nan(const unsigned char* p, uint64_t kind) {
  uint32_t bits = 0;
  std::memcpy(&bits, p, kind == kF32 ? 4 : 2);
  if (kind == kF32) return (bits & 0x7fffffff) > 0x7f800000;
  return (bits & 0x7fff) > (kind == kBF16 ? 0x7f80u : 0x7c00u);
}

// The first byte that differs, -1 for none. Which NaN an operation gives is the processor's own affair.
int64_t difference(const Region& r) {
  const size_t step = r.kind == kF32 ? 4 : r.kind == kRaw ? 1 : 2;
  for (size_t i = 0; i < r.after.size(); i += step) {
    const size_t count = std::min(step, r.after.size() - i);
    if (std::memcmp(r.memory + i, r.after.data() + i, count) == 0) continue;
    if (r.kind != kRaw && count == step && is_nan(r.memory + i, r.kind) && is_nan(r.after.data() + i, r.kind)) continue;
    return static_cast<int64_t>(i);
  }
  return -1;
}

void* symbol(const std::string& name) {
  void* found = dlsym(RTLD_DEFAULT, name.c_str());
  if (found == nullptr) std::fprintf(stderr, "no %s\n", name.c_str()), std::exit(2);
  return found;
}

}  // namespace

int main(int argc, char** argv) {
  const bool is_compared = argc == 2;
  std::FILE* file = is_compared || (argc == 3 && !std::strcmp(argv[2], "--uncompared")) ? std::fopen(argv[1], "rb") : nullptr;
  if (file == nullptr) return std::fprintf(stderr, "usage: replay FILE [--uncompared]\n"), 2;
  int64_t num_calls = 0, num_different = 0;
  std::set<std::string> names;
  uint64_t head[3];  // bytes of the symbol, regions, relocations
  while (std::fread(head, sizeof(head), 1, file) == 1) {
    std::string name(head[0], '\0');
    read(file, &name[0], head[0]);
    std::vector<Region> regions(head[1]);
    for (Region& r : regions) {
      uint64_t sizes[2];
      read(file, sizes, sizeof(sizes));
      r.kind = sizes[1], r.before.resize(sizes[0]), r.after.resize(sizes[0]);
      read(file, r.before.data(), sizes[0]), read(file, r.after.data(), sizes[0]);
      r.memory = static_cast<unsigned char*>(std::malloc(sizes[0]));
      std::copy(r.before.begin(), r.before.end(), r.memory);
    }
    for (uint64_t i = 0; i < head[2]; ++i) {
      uint64_t place[4];
      read(file, place, sizeof(place));
      const unsigned char* to = regions[place[2]].memory + place[3];
      std::memcpy(regions[place[0]].memory + place[1], &to, sizeof(to));
      std::memcpy(regions[place[0]].after.data() + place[1], &to, sizeof(to));
    }
    reinterpret_cast<void (*)(const void*)>(symbol(name))(regions[0].memory);
    for (size_t i = 0; is_compared && i < regions.size(); ++i) {
      const int64_t at = difference(regions[i]);
      if (at < 0) continue;
      ++num_different;
      std::printf("%s, call %lld: region %zu of %zu bytes differs from byte %lld on\n", name.c_str(),
                  static_cast<long long>(num_calls), i, regions[i].after.size(), static_cast<long long>(at));
      break;
    }
    for (Region& r : regions) std::free(r.memory);
    names.insert(name), ++num_calls;
  }
  std::fclose(file);
  for (const std::string& name : names) std::printf("%s ", name.c_str());
  std::printf("\n%lld calls, %lld differ\n", static_cast<long long>(num_calls), static_cast<long long>(num_different));
  return num_different != 0;
}
