// What each file of this folder adds to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace overspill {

void bind_errors(pybind11::module_ & m);
void bind_process(pybind11::module_ & m);
void bind_log(pybind11::module_ & m);
void bind_devices(pybind11::module_ & m);
void bind_files(pybind11::module_ & m);
void bind_measurement(pybind11::module_ & m);
void bind_sampler(pybind11::module_ & m);
void bind_chat(pybind11::module_ & m);
void bind_stats(pybind11::module_ & m);
void bind_states(pybind11::module_ & m);
void bind_stream(pybind11::module_ & m);
void bind_memory(pybind11::module_ & m);
void bind_model_options(pybind11::module_ & m);
void bind_model(pybind11::module_ & m);
void bind_evaluation(pybind11::module_ & m);
void bind_experts(pybind11::module_ & m);

}  // namespace overspill
