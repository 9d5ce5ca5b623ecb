// Which device refused memory, told by llama.cpp's log.
#pragma once

#include "base/error_capture.h"

#include <string>

namespace overspill {

// Throws OutOfMemoryError, whose text begins with `what`, if memory was refused.
void throw_if_out_of_memory(const ErrorCapture & errors, const std::string & what);

}  // namespace overspill
