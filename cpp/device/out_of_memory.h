// Which device refused memory, told by llama.cpp's log and its assertions.
#pragma once

#include "base/error.h"
#include "base/error_capture.h"

#include <cstddef>
#include <string>

namespace overspill {

// Of this process's own memory, which a device has no part in; its text begins with `what`.
OutOfMemoryError ram_refused(const std::string & what = "");

// Whether a failed assertion of llama.cpp's, by its message, says that the system has refused memory.
bool is_for_want_of_memory(const std::string & assertion);

// Throws OutOfMemoryError, whose text begins with `what`, if memory was refused.
void throw_if_out_of_memory(const ErrorCapture & errors, const std::string & what);

// Throws OutOfMemoryError, whose text begins with `what`, where a device has less than twice so much memory to give;
// the system would end a process that takes too much RAM.
void check_room(const std::string & device, size_t n_bytes, const std::string & what);

}  // namespace overspill
