#include "run.cuh"

namespace bitlab {

const char *run_int8_int8(const Plan &plan, const MatmulParams &params, void *stream) {
    using Math = Int8Int8;
    const char *error = !plan.few         ? run_many<Math, 8, false>(plan, params, stream)
                        : plan.tiles == 1 ? run_few<Math, 1, false>(plan, params, stream)
                                          : run_few<Math, 2, false>(plan, params, stream);
    return run_split<Math>(plan, params, error, stream);
}

}  // namespace bitlab
