// The pages of weights that are mapped from files.
#pragma once

#include "device/pinned_weights.h"

#include <functional>
#include <vector>

namespace overspill {

// Reads the weights, in pieces, so that nobody waits for the disk later. `report` is given the share that is read, 0 to
// 1; false ends it. Does nothing where the system is not Linux, or older than 5.14.
void read_mapped(std::vector<MappedTensor> tensors, const std::function<bool(float)> & report);

}  // namespace overspill
