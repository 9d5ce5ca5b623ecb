// The pages of files in the system's memory.
#pragma once

#include <functional>
#include <string>
#include <vector>

namespace overspill {

// Reads files into the page cache, so that mapping them finds them there. `report` is given the share that is read, 0
// to 1, some times a second; false ends it. A file that cannot be read is left to whoever needs it. Does nothing where
// the system is not Linux.
void read_into_page_cache(const std::vector<std::string> & files, const std::function<bool(float)> & report);

}  // namespace overspill
