// Which device a token's time goes to: a diagnosis, for which the computation has to wait after each piece of the
// graph.
#pragma once

#include "base/interrupt.h"
#include "model/model.h"

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace overspill {

struct DeviceTime {
    double seconds = 0;    // of computing
    int32_t n_pieces = 0;  // of the graph, between changes of device
};

// Of one token, on average.
struct DeviceTimes {
    std::map<std::string, DeviceTime> devices;
    double moving_s = 0;  // copies between devices, and waiting for them
    double total_s = 0;   // with the start of the graph and the way of the logits
};

// Decodes `tokens`, the last `n` one by one, in a context of its own, for which the one kept for streams is freed.
// Throws std::invalid_argument unless there are two tokens more than `n`, what a context throws, CancelledError.
DeviceTimes time_devices(Model & model, const std::vector<int32_t> & tokens, uint32_t n, const Interrupt::Poll & poll);

}  // namespace overspill
