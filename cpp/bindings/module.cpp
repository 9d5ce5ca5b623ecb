// What Python sees of the core, one file per class or concept. Only this folder knows Python.
#include "bindings/bindings.h"

#include "base/log.h"
#include "base/process.h"
#include "bindings/gil.h"
#include "device/compute_hooks.h"

#include <llama.h>

PYBIND11_MODULE(_core, m) {
    m.doc() = "The native core of overspill. Use the package's own names instead.";
    m.attr("LLAMA_CPP_COMMIT") = OVERSPILL_LLAMA_CPP_COMMIT;
    overspill::reserve_main_stack();
    overspill::watch_forks({&overspill::hooking_mutex(), &overspill::log_mutex()});
    overspill::hear_signals();
    overspill::bind_errors(m);
    overspill::bind_process(m);
    overspill::bind_log(m);  // before anything of llama.cpp's runs
    llama_backend_init();
    overspill::bind_devices(m);
    overspill::bind_files(m);
    overspill::bind_measurement(m);
    overspill::bind_sampler(m);
    overspill::bind_memory(m);
    overspill::bind_model_options(m);
    overspill::bind_model(m);
    overspill::bind_chat(m);
    overspill::bind_stats(m);
    overspill::bind_experts(m);
    overspill::bind_states(m);
    overspill::bind_stream(m);
    overspill::bind_evaluation(m);
}
