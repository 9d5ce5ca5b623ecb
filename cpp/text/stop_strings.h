#pragma once

#include <string>
#include <vector>

namespace overspill {

// Holds text back while it may be the beginning of a stop string.
class StopStrings {
  public:
    // Throws std::invalid_argument for an empty one.
    explicit StopStrings(std::vector<std::string> stops);

    // Takes new text and returns what may go out; true in `found` if a stop string came up,
    // which cuts the text off there.
    std::string push(std::string text, bool & found);
    std::string flush();

  private:
    std::vector<std::string> stops_;
    std::string held_;
};

}  // namespace overspill
