// fastinit._native: validates what Python passes, unwraps it into fills, and runs them without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <cstdlib>
#include <optional>
#include <string>
#include <system_error>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "batch.h"
#include "cpu/fill.h"
#include "cpu/float_environment.h"
#include "cpu/isa.h"
#if defined(FASTINIT_WITH_CUDA)
#include "cuda/fill.h"
#include "cuda/read.h"
#endif
#include "read.h"
#include "recorder/recorder.h"

namespace py = pybind11;

namespace fastinit {
namespace {

using PythonSteps = std::vector<std::tuple<int64_t, double, double>>;

Steps make_steps(const PythonSteps& items) {
    Steps steps{};
    for (const auto& [op, a, b] : items) append_step(steps, make_step(op, a, b));
    return steps;
}

// Python integers have no width: pybind11's own conversion would raise a TypeError that names nothing.
uint64_t unsigned64(const char* argument, const py::int_& value) {
    const uint64_t x = PyLong_AsUnsignedLongLong(value.ptr());
    if (PyErr_Occurred()) {
        PyErr_Clear();
        detail::refuse(argument, py::str(value),
                       "it must be an integer with 0 <= " + std::string(argument) + " < 2**64");
    }
    return x;
}

void* pointer(const char* argument, const py::int_& value) {
    return reinterpret_cast<void*>(static_cast<uintptr_t>(unsigned64(argument, value)));
}

void append(Batch& batch, const py::int_& data_ptr, int64_t dtype, int64_t kind, const std::vector<double>& parameters,
            const py::int_& seed, const py::int_& stream, const PythonSteps& steps, const Box& box) {
    const FloatEnvironment environment;  // parameters are rounded to float32 here
    void* const data = pointer("data_ptr", data_ptr);
    Values values{};
    values.dtype = make_dtype(dtype);
    values.distribution = make_distribution(kind, parameters);
    values.steps = make_steps(steps);
    values.seed = unsigned64("seed", seed);
    batch.append(data, values, unsigned64("stream", stream), box);
}

void add_whole(Batch& batch, const py::int_& data_ptr, int64_t numel, int64_t dtype, int64_t kind,
               const std::vector<double>& parameters, const py::int_& seed, const py::int_& stream,
               const PythonSteps& steps) {
    if (numel < 0) detail::refuse("numel", std::to_string(numel), "it must not be negative");
    append(batch, data_ptr, dtype, kind, parameters, seed, stream, steps, whole_tensor(static_cast<uint64_t>(numel)));
}

void add_region(Batch& batch, const py::int_& data_ptr, int64_t dtype, int64_t kind,
                const std::vector<double>& parameters, const py::int_& seed, const py::int_& stream,
                const PythonSteps& steps, const py::int_& index_offset, const std::vector<int64_t>& sizes,
                const std::vector<int64_t>& index_strides, const std::vector<int64_t>& memory_strides) {
    append(batch, data_ptr, dtype, kind, parameters, seed, stream, steps,
           make_box(unsigned64("index_offset", index_offset), sizes, index_strides, memory_strides));
}

void run_cpu(Batch& batch, int threads, const std::optional<std::string>& isa) {
    if (threads < 1) detail::refuse("threads", std::to_string(threads), "it must be at least 1");
    const Kernel& kernel = isa ? kernel_named(*isa) : default_kernel();
    const Batch::Work work = batch.take();
    const py::gil_scoped_release release;
    fill_cpu(work.fills.data(), work.fills.size(), threads, kernel);
}

[[noreturn, maybe_unused]] void refuse_cuda() {
    throw std::runtime_error(
        "fastinit was built without CUDA: reinstall it where nvcc is found (FASTINIT_CUDA=1 makes its absence an "
        "error)");
}

void run_cuda([[maybe_unused]] Batch& batch, [[maybe_unused]] int device, [[maybe_unused]] const py::int_& stream) {
#if defined(FASTINIT_WITH_CUDA)
    void* const handle = pointer("stream", stream);
    const Batch::Work work = batch.take();
    const py::gil_scoped_release release;
    fill_cuda(work.fills.data(), work.fills.size(), device, handle);
#else
    refuse_cuda();
#endif
}

// A file's error as Python's own, which says which one by its class.
template <typename Read>
uint64_t read_unlocked(const Read& read) {
    try {
        const py::gil_scoped_release release;
        return read();
    } catch (const std::system_error& error) {
        errno = error.code().value();
        PyErr_SetFromErrno(PyExc_OSError);
        throw py::error_already_set();
    }
}

Rows make_rows(const py::int_& offset, const py::int_& nbytes, const py::int_& count, const py::int_& stride) {
    return {unsigned64("offset", offset), unsigned64("nbytes", nbytes), unsigned64("count", count),
            unsigned64("stride", stride)};
}

uint64_t read_to_cpu(int file, const py::int_& offset, const py::int_& nbytes, const py::int_& count,
                     const py::int_& stride, const py::int_& target) {
    const Rows rows = make_rows(offset, nbytes, count, stride);
    void* const to = pointer("target", target);
    return read_unlocked([&] { return read_rows(file, rows, 0, rows.size(), to); });
}

uint64_t read_to_gpu([[maybe_unused]] int file, [[maybe_unused]] const py::int_& offset,
                     [[maybe_unused]] const py::int_& nbytes, [[maybe_unused]] const py::int_& count,
                     [[maybe_unused]] const py::int_& stride, [[maybe_unused]] const py::int_& buffer,
                     [[maybe_unused]] const py::int_& target, [[maybe_unused]] int device,
                     [[maybe_unused]] const py::int_& stream) {
#if defined(FASTINIT_WITH_CUDA)
    const Rows rows = make_rows(offset, nbytes, count, stride);
    void *const from = pointer("buffer", buffer), *const to = pointer("target", target);
    void* const handle = pointer("stream", stream);
    return read_unlocked([&] { return read_cuda(file, rows, from, to, device, handle); });
#else
    refuse_cuda();
#endif
}

double apply_steps_to(double value, const PythonSteps& steps) {
    const FloatEnvironment environment;
    return fastinit::apply_steps(make_steps(steps), static_cast<float>(value));
}

void erfinv_in_place(const py::int_& data_ptr, int64_t numel) {
    if (numel < 0) detail::refuse("numel", std::to_string(numel), "it must not be negative");
    void* const data = pointer("data_ptr", data_ptr);
    check_data(data, Dtype::float32, static_cast<uint64_t>(numel));
    const Kernel& kernel = default_kernel();
    const py::gil_scoped_release release;
    const FloatEnvironment environment;
    kernel.erfinv(data, static_cast<uint64_t>(numel));
}

bool advise_huge_pages([[maybe_unused]] const py::int_& data_ptr, [[maybe_unused]] int64_t nbytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uint64_t huge = uint64_t{2} << 20;
    if (nbytes < 0) detail::refuse("nbytes", std::to_string(nbytes), "it must not be negative");
    const uint64_t start = unsigned64("data_ptr", data_ptr), end = start + static_cast<uint64_t>(nbytes);
    const uint64_t first = (start + huge - 1) / huge * huge, last = end / huge * huge;
    return first < last && madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) == 0;
#else
    return false;
#endif
}

std::vector<std::string> cpu_isas() {
    std::vector<std::string> names;
    for (const Kernel& kernel : available_kernels()) names.push_back(kernel.isa);
    return names;
}

py::dict build_info() {
    py::dict info;
    py::list architectures;
#if defined(FASTINIT_WITH_CUDA)
    info["cuda"] = true;
    info["cuda_version"] = FASTINIT_CUDA_VERSION;
    const std::string archs = FASTINIT_CUDA_ARCHS;
    for (size_t begin = 0, end; begin < archs.size(); begin = end + 1) {
        end = std::min(archs.find(',', begin), archs.size());
        architectures.append(archs.substr(begin, end - begin));
    }
#else
    info["cuda"] = false;
    info["cuda_version"] = py::none();
#endif
    info["cuda_architectures"] = architectures;
    info["compiler"] = FASTINIT_COMPILER;
    return info;
}

}  // namespace
}  // namespace fastinit

PYBIND11_MODULE(_native, m) {
    using namespace fastinit;
    m.doc() = "fastinit's fill kernels: stream v1 into raw memory. Use fastinit.native.";

    py::class_<Batch>(m, "Batch")
        .def(py::init<>())
        .def("add", &add_whole, py::arg("data_ptr"), py::arg("numel"), py::arg("dtype"), py::arg("kind"),
             py::arg("parameters"), py::arg("seed"), py::arg("stream"), py::arg("steps") = PythonSteps{})
        .def("add_region", &add_region, py::arg("data_ptr"), py::arg("dtype"), py::arg("kind"), py::arg("parameters"),
             py::arg("seed"), py::arg("stream"), py::arg("steps"), py::arg("index_offset"), py::arg("sizes"),
             py::arg("index_strides"), py::arg("memory_strides"))
        .def("__len__", &Batch::size)
        .def_property_readonly("elements", &Batch::elements)
        .def("run_cpu", &run_cpu, py::arg("threads"), py::arg("isa") = py::none())
        .def("run_cuda", &run_cuda, py::arg("device"), py::arg("stream"));

    m.def("apply_steps", &apply_steps_to, py::arg("value"), py::arg("steps"));
    m.def("erfinv", &erfinv_in_place, py::arg("data_ptr"), py::arg("numel"));
    m.def("advise_huge_pages", &advise_huge_pages, py::arg("data_ptr"), py::arg("nbytes"));
    m.def("read", &read_to_cpu, py::arg("file"), py::arg("offset"), py::arg("nbytes"), py::arg("count"),
          py::arg("stride"), py::arg("target"));
    m.def("read_cuda", &read_to_gpu, py::arg("file"), py::arg("offset"), py::arg("nbytes"), py::arg("count"),
          py::arg("stride"), py::arg("buffer"), py::arg("target"), py::arg("device"), py::arg("stream"));
    m.def("cpu_isa", [] { return std::string(default_kernel().isa); });
    m.def("cpu_isas", &cpu_isas);
    m.def("build_info", &build_info);
    recorder::add_recorder(m);
}
