#pragma once

namespace overspill {

// Hands the lines that wait to Python's logging. With the GIL.
void drain_log_to_python();

}  // namespace overspill
