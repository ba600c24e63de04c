/*
 * How compiled models call libbitkernels_cpu: no Python, no dispatcher.
 *
 * bitcore/kernels/inductor.py hands this text to inductor, which puts it into the C++ of every graph and calls
 * aoti_torch_cpu_<op> for torch.ops.bitlab.<op>. It stands within extern "C"; BITLAB_LIBRARY is the library's path.
 * The library itself needs no torch to be built, so what speaks torch's stable C interface is compiled here.
 */
extern "C++" {
#include <dlfcn.h>
#include <omp.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
}

/* The fields of bk_linear_args (bitkernels.h) in their order: eight bytes each. */
enum {
    BITLAB_QWEIGHT,
    BITLAB_WEIGHT_SCALE,
    BITLAB_SCALE_ROWS,
    BITLAB_SCALE_COLUMNS,
    BITLAB_MULTIPLIER,
    BITLAB_BIAS,
    BITLAB_BIAS_TYPE,
    BITLAB_N,
    BITLAB_K,
    BITLAB_PER_TENSOR,
    BITLAB_X,
    BITLAB_X_TYPE,
    BITLAB_X_STRIDE,
    BITLAB_Y,
    BITLAB_Y_TYPE,
    BITLAB_M,
    BITLAB_WORKSPACE,
    BITLAB_NUM_THREADS,
    BITLAB_FIELDS
};
typedef int32_t (*bitlab_linear)(const int64_t *record);
typedef int64_t (*bitlab_workspace)(int64_t M, int64_t K, int64_t scale_columns, int32_t planes, int32_t num_threads);

enum { BITLAB_MOST_AXES = 8, BITLAB_ALIGNMENT = 64, BITLAB_MOST_THREADS = 1024, BITLAB_FLOAT_PLANES = 4 };

/* The process has the library open already: the same copy is found. */
static void *bitlab_symbol(const char *name) {
    static void *library = dlopen(BITLAB_LIBRARY, RTLD_NOW | RTLD_LOCAL);
    return library ? dlsym(library, name) : nullptr;
}

/* A thread's scratch memory, which grows and is kept. */
struct BitlabScratch {
    void *memory = nullptr;
    int64_t size = 0;
    ~BitlabScratch() { free(memory); }
    void *hold(int64_t bytes) {
        if (bytes > size) {
            free(memory);
            size = (bytes + BITLAB_ALIGNMENT - 1) / BITLAB_ALIGNMENT * BITLAB_ALIGNMENT;
            memory = aligned_alloc(BITLAB_ALIGNMENT, size);
            if (!memory) size = 0;
        }
        return memory;
    }
};

static int64_t bitlab_address(AtenTensorHandle tensor) {
    void *data = nullptr;
    aoti_torch_get_data_ptr(tensor, &data);
    return (int64_t)data;
}

static int64_t bitlab_size(AtenTensorHandle tensor, int64_t axis) {
    int64_t *sizes = nullptr;
    aoti_torch_get_sizes(tensor, &sizes);
    return sizes[axis];
}

/* bk_type of torch's dtype. */
static int64_t bitlab_type(int32_t dtype) {
    if (dtype == aoti_torch_dtype_float32()) return 0;
    return dtype == aoti_torch_dtype_bfloat16() ? 1 : 2;
}

static int64_t bitlab_type_of(AtenTensorHandle tensor) {
    int32_t dtype = 0;
    aoti_torch_get_dtype(tensor, &dtype);
    return bitlab_type(dtype);
}

/* Makes a contiguous tensor with the axes of x, but the last of the given length. */
static AOTITorchError bitlab_empty_like(AtenTensorHandle x, int64_t last, int32_t dtype, AtenTensorHandle *made) {
    int64_t axes = 0, *sizes = nullptr, shape[BITLAB_MOST_AXES], strides[BITLAB_MOST_AXES], stride = 1;
    aoti_torch_get_dim(x, &axes);
    aoti_torch_get_sizes(x, &sizes);
    if (axes > BITLAB_MOST_AXES) return AOTI_TORCH_FAILURE;
    for (int64_t axis = axes - 1; axis >= 0; --axis) {
        shape[axis] = axis == axes - 1 ? last : sizes[axis];
        strides[axis] = stride;
        stride *= shape[axis];
    }
    return aoti_torch_empty_strided(axes, shape, strides, dtype, aoti_torch_device_type_cpu(), 0, made);
}

static AOTITorchError bitlab_run(bitlab_linear run, int64_t *record, int32_t planes, AtenTensorHandle x,
                                 AtenTensorHandle *bias, int32_t out_dtype, AtenTensorHandle *y);

/* The same of a contiguous copy of x. */
static AOTITorchError bitlab_run_copied(bitlab_linear run, int64_t *record, int32_t planes, AtenTensorHandle x,
                                        AtenTensorHandle *bias, int32_t out_dtype, AtenTensorHandle *y) {
    int32_t dtype = 0;
    AtenTensorHandle copy = nullptr;
    aoti_torch_get_dtype(x, &dtype);
    AOTITorchError error = bitlab_empty_like(x, record[BITLAB_K], dtype, &copy);
    if (error) return error;
    error = aoti_torch_copy_(copy, x, 0);
    if (!error) error = bitlab_run(run, record, planes, copy, bias, out_dtype, y);
    aoti_torch_delete_tensor_object(copy);
    return error;
}

/* Completes a record that holds the weights, which are contiguous, with x and a new y, and runs it. */
static AOTITorchError bitlab_run(bitlab_linear run, int64_t *record, int32_t planes, AtenTensorHandle x,
                                 AtenTensorHandle *bias, int32_t out_dtype, AtenTensorHandle *y) {
    static const auto workspace_of = (bitlab_workspace)bitlab_symbol("bk_cpu_linear_workspace");
    static thread_local BitlabScratch scratch;
    bool contiguous = false;
    int64_t elements = 0;
    aoti_torch_is_contiguous(x, &contiguous);
    aoti_torch_get_numel(x, &elements);
    if (!run || !workspace_of) return AOTI_TORCH_FAILURE;
    if (!contiguous) return bitlab_run_copied(run, record, planes, x, bias, out_dtype, y);
    const AOTITorchError error = bitlab_empty_like(x, record[BITLAB_N], out_dtype, y);
    if (error) return error;
    if (bias) {
        record[BITLAB_BIAS] = bitlab_address(*bias);
        record[BITLAB_BIAS_TYPE] = bitlab_type_of(*bias);
    }
    const int64_t in_features = record[BITLAB_K], tokens = elements / in_features;
    const int threads = omp_get_max_threads() < BITLAB_MOST_THREADS ? omp_get_max_threads() : BITLAB_MOST_THREADS;
    record[BITLAB_X] = bitlab_address(x);
    record[BITLAB_X_TYPE] = bitlab_type_of(x);
    record[BITLAB_X_STRIDE] = in_features;
    record[BITLAB_Y] = bitlab_address(*y);
    record[BITLAB_Y_TYPE] = bitlab_type(out_dtype);
    record[BITLAB_M] = tokens;
    record[BITLAB_NUM_THREADS] = threads;
    void *memory =
        scratch.hold(workspace_of(tokens, in_features, record[BITLAB_SCALE_COLUMNS], planes, (int32_t)threads));
    if (!memory) return AOTI_TORCH_FAILURE;
    record[BITLAB_WORKSPACE] = (int64_t)memory;
    return run(record) ? AOTI_TORCH_FAILURE : AOTI_TORCH_SUCCESS;
}

/* torch.ops.bitlab.linear */
AOTITorchError aoti_torch_cpu_linear(AtenTensorHandle x, AtenTensorHandle qweight, AtenTensorHandle weight_scale,
                                     AtenTensorHandle *bias, int64_t out_features, const char *activation,
                                     int32_t out_dtype, AtenTensorHandle *multiplier, AtenTensorHandle *y) {
    static const auto of_codes = (bitlab_linear)bitlab_symbol("bk_cpu_linear_i8_t2");
    static const auto of_floats = (bitlab_linear)bitlab_symbol("bk_cpu_linear_f32_t2");
    int64_t record[BITLAB_FIELDS] = {}, axes = 0;
    record[BITLAB_QWEIGHT] = bitlab_address(qweight);
    record[BITLAB_WEIGHT_SCALE] = bitlab_address(weight_scale);
    record[BITLAB_SCALE_ROWS] = bitlab_size(weight_scale, 0);
    record[BITLAB_N] = out_features;
    record[BITLAB_K] = bitlab_size(qweight, 1);
    record[BITLAB_PER_TENSOR] = strcmp(activation, "int8_per_tensor") == 0;
    aoti_torch_get_dim(weight_scale, &axes);
    if (axes == 2) record[BITLAB_SCALE_COLUMNS] = bitlab_size(weight_scale, 1);
    if (multiplier) {
        record[BITLAB_MULTIPLIER] = bitlab_address(*multiplier);
        record[BITLAB_SCALE_COLUMNS] = bitlab_size(*multiplier, 1);
    }
    if (strcmp(activation, "float") == 0)
        return bitlab_run(of_floats, record, BITLAB_FLOAT_PLANES, x, bias, out_dtype, y);
    return bitlab_run(of_codes, record, 1, x, bias, out_dtype, y);
}

/* torch.ops.bitlab.linear_int8 */
AOTITorchError aoti_torch_cpu_linear_int8(AtenTensorHandle x, AtenTensorHandle qweight, AtenTensorHandle weight_scale,
                                          AtenTensorHandle *bias, int32_t out_dtype, AtenTensorHandle *y) {
    static const auto of_codes = (bitlab_linear)bitlab_symbol("bk_cpu_linear_i8_i8");
    int64_t record[BITLAB_FIELDS] = {};
    record[BITLAB_QWEIGHT] = bitlab_address(qweight);
    record[BITLAB_WEIGHT_SCALE] = bitlab_address(weight_scale);
    record[BITLAB_SCALE_ROWS] = record[BITLAB_N] = bitlab_size(qweight, 0);
    record[BITLAB_K] = bitlab_size(qweight, 1);
    return bitlab_run(of_codes, record, 1, x, bias, out_dtype, y);
}

/* torch.ops.bitlab.sum_last: torch's own sum, found as the eager one is. */
AOTITorchError aoti_torch_cpu_sum_last(AtenTensorHandle x, AtenTensorHandle *y) {
    AtenTensorHandle held = nullptr;
    const AOTITorchError error = aoti_torch_new_tensor_handle(x, &held);
    if (error) return error;
    const int64_t last[] = {-1};
    const torch::stable::Tensor sum = torch::stable::sum(torch::stable::Tensor(held), {{last, 1}}, true);
    return aoti_torch_new_tensor_handle(sum.get(), y);
}
