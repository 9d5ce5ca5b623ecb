// What the process is doing, for the message that goes with an abort of llama.cpp.
#pragma once

#include <atomic>

namespace overspill {

// Names what is done while it exists. `activity` must outlive the process.
class Activity {
  public:
    explicit Activity(const char * activity) noexcept : before_(current.exchange(activity)) {}
    ~Activity() { current.store(before_); }
    Activity(const Activity &) = delete;
    Activity & operator=(const Activity &) = delete;

    inline static std::atomic<const char *> current{"idle"};

  private:
    const char * before_;
};

}  // namespace overspill
