// Ranges of a file into an arena, verified. What a status means: README.md.
#pragma once

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "../include/tasks.h"
#include "digest.h"

namespace kvpress::KERNEL_ISA {

class RecordReader {
 public:
  explicit RecordReader(const ReadRecords& a) : a_(a) {
    for (int64_t i = 0; i < a.count; i++)
      if (!i || !together(begins_.back(), i)) begins_.push_back(i);
    begins_.push_back(a.count);
  }

  int64_t runs() const { return int64_t(begins_.size()) - 1; }

  // Reads that are neighbours in the file and in the arena, by calls that ask for all that is missing.
  void run(int64_t number) const {
    const int64_t first = begins_[number], end = begins_[number + 1];
    const Read &from = a_.reads[first], &last = a_.reads[end - 1];
    const int64_t size = last.place + last.length - from.place;
    int64_t there = 0;  // bytes that were read or given up
    for (int64_t i = first; i < end; i++) {
      const int64_t begin = a_.reads[i].place - from.place;
      there = std::max(there, begin);
      const int error = fetch(from, begin, begin + a_.reads[i].length, size, there);
      a_.status[i] = error ? error : verified(a_.reads[i]) ? 0 : kWrong;
    }
  }

 private:
  static constexpr int kEnd = -1, kWrong = -2;
  static constexpr int kMostTries = 100;  // without progress
  static constexpr int64_t kTogether = 1 << 20, kCall = 1 << 30, kSector = 4096;

  bool together(int64_t first, int64_t i) const {
    const Read &from = a_.reads[first], &before = a_.reads[i - 1], &read = a_.reads[i];
    return read.offset == before.offset + before.length && read.place == before.place + before.length &&
           read.place + read.length - from.place <= kTogether;
  }

  // Goes on until `end`, if possible until `size`; an error beyond `end` is left to the reads that meet it.
  int fetch(const Read& from, int64_t begin, int64_t end, int64_t size, int64_t& there) const {
    int64_t reached = there;
    bool back = false;
    for (int tries = kMostTries; there < end;) {
      iovec part{a_.arena + from.place + there, size_t(std::min(size - there, kCall))};
      const int64_t offset = from.offset + there, into = std::min(offset % kSector, there - begin);
      const ssize_t came = preadv(a_.fd, &part, 1, offset);
      if (came > 0) {
        there += came;
        if (there <= reached) continue;
        reached = there;
        back = false;
        tries = kMostTries;
      } else if (came == 0) {
        return kEnd;
      } else if (errno == EINTR && tries > 0) {
        tries--;
      } else if (errno == EINVAL && into && !back) {  // direct reads begin with a sector
        there -= into;
        back = true;
      } else if (size > end) {
        size = end;
      } else {
        return back && errno == EINVAL ? kEnd : errno;
      }
    }
    return 0;
  }

  bool verified(const Read& read) const {
    if (!read.checked) return true;
    const XXH128_hash_t found = XXH3_128bits(a_.arena + read.place + read.begin, size_t(read.checked));
    return found.low64 == read.low && found.high64 == read.high;
  }

  const ReadRecords& a_;
  std::vector<int64_t> begins_;  // of the runs, and the end of the last
};

inline void read_records(const ReadRecords& a, const Threads& threads) {
  const RecordReader reader(a);
  share(threads, reader.runs(), true, [&](int64_t number) { reader.run(number); });
}

}  // namespace kvpress::KERNEL_ISA
