// Why a call of llama.cpp failed: it says so in its log only.
#pragma once

#include <string>
#include <vector>

namespace overspill {

// Collects the errors that llama.cpp logs on this thread while it exists, or the lines of every level.
class ErrorCapture {
  public:
    explicit ErrorCapture(bool every_level = false);
    ~ErrorCapture();
    ErrorCapture(const ErrorCapture &) = delete;
    ErrorCapture & operator=(const ErrorCapture &) = delete;

    // The cause in one line, without the name of upstream's function; `otherwise` if nothing was logged.
    std::string reason(const std::string & otherwise) const;
    const std::vector<std::string> & lines() const { return lines_; }

    // For the log itself: hands a line to the innermost capture of this thread, if there is one.
    static void keep(const std::string & line, bool is_error);

  private:
    bool every_level_;
    std::vector<std::string> lines_;
    ErrorCapture * outer_;
};

}  // namespace overspill
