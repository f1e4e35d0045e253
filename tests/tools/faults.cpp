// Loaded before all other libraries: preadv of this process does what a plan says, call by call.
//
//   .  what was asked for     s  a third of it     p  a page of it     z  nothing, as at the end
//   i  EINTR                  e  EIO               v  EINVAL           d  waits half a second
#include <dlfcn.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <string>

namespace {

std::string plan;
bool endless;
std::atomic<long> calls{0}, longest{0}, bad{-1};

ssize_t faulty(int fd, const iovec* parts, int count, off_t offset) {
  using Preadv = ssize_t (*)(int, const iovec*, int, off_t);
  static const auto real = reinterpret_cast<Preadv>(dlsym(RTLD_NEXT, "preadv"));
  const size_t call = size_t(calls++);
  const char action = call < plan.size() || (endless && !plan.empty()) ? plan[call % plan.size()] : '.';
  iovec part = parts[0];
  for (long seen = longest; seen < long(part.iov_len) && !longest.compare_exchange_weak(seen, long(part.iov_len));) {}
  if (action == 'p') part.iov_len = std::min<size_t>(part.iov_len, 4096);
  if (action == 'd') usleep(500000);
  if (action == 'z') return 0;
  errno = action == 'i' ? EINTR : action == 'v' ? EINVAL : EIO;
  if (action == 'i' || action == 'v' || action == 'e') return -1;
  if (bad >= offset && bad < offset + long(part.iov_len)) return -1;
  const ssize_t came = real(fd, &part, count, offset);  // direct reads ask for whole sectors
  return action == 's' ? std::min<ssize_t>(came, ssize_t(part.iov_len / 3 + 1)) : came;
}

}  // namespace

extern "C" {

// From now on; `repeated`: begins again at its end. A call that covers byte `broken` of a file fails with EIO.
void faults_plan(const char* text, int repeated, long broken) {
  plan = text;
  endless = repeated != 0;
  calls = longest = 0;
  bad = broken;
}

// How many calls there were, and for how many bytes the longest asked.
long faults_calls() { return calls; }
long faults_longest() { return longest; }

ssize_t preadv(int fd, const iovec* parts, int count, off_t offset) { return faulty(fd, parts, count, offset); }
ssize_t preadv64(int fd, const iovec* parts, int count, off_t offset) { return faulty(fd, parts, count, offset); }
}
