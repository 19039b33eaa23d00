// A device that is none of torch's own: its memory cannot be read or written by the host, but by this file's copies.
//
// Operators that are not here run on the CPU, on copies, by torch's own fallback.
#include <ATen/EmptyTensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/TensorFactories.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/extension.h>

#include <mutex>
#include <unordered_map>

namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;

std::mutex mutex;
std::unordered_map<void*, size_t> blocks;

void release(void* data) {
    const std::lock_guard<std::mutex> guard(mutex);
    munmap(data, blocks.at(data));
    blocks.erase(data);
}

class DeviceMemory final : public c10::Allocator {
public:
    c10::DataPtr allocate(size_t nbytes) override {
        const c10::Device device(kDevice, 0);
        if (nbytes == 0) return {nullptr, nullptr, &release, device};
        const size_t size = (nbytes + 4095) / 4096 * 4096;
        void* const data = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        TORCH_CHECK(data != MAP_FAILED, "no memory");
        const std::lock_guard<std::mutex> guard(mutex);
        blocks[data] = size;
        return {data, data, &release, device};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void*, const void*, std::size_t) const override { TORCH_CHECK(false, "storages are not copied"); }
};

DeviceMemory memory;
REGISTER_ALLOCATOR(kDevice, &memory);

// The one device, and its only stream.
struct Guard final : c10::impl::DeviceGuardImplInterface {
    static constexpr c10::DeviceType static_type = kDevice;
    c10::DeviceType type() const override { return kDevice; }
    c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
    c10::Device getDevice() const override { return {kDevice, 0}; }
    void setDevice(c10::Device) const override {}
    void uncheckedSetDevice(c10::Device) const noexcept override {}
    c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
    c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
    c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// While it lives, the host may touch what a tensor of the device has.
class Opened {
public:
    explicit Opened(const at::Tensor& tensor) {
        if (tensor.device().type() != kDevice) return;
        data_ = const_cast<void*>(tensor.storage().data());
        if (data_) set(PROT_READ | PROT_WRITE);
    }
    ~Opened() {
        if (data_) set(PROT_NONE);
    }
    Opened(const Opened&) = delete;
    Opened& operator=(const Opened&) = delete;

private:
    void set(int protection) const {
        const std::lock_guard<std::mutex> guard(mutex);
        TORCH_CHECK(mprotect(data_, blocks.at(data_), protection) == 0, "mprotect");
    }
    void* data_ = nullptr;
};

// The same memory as a tensor of the CPU.
at::Tensor on_host(const at::Tensor& tensor) {
    if (tensor.device().is_cpu()) return tensor;
    return at::from_blob(const_cast<void*>(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(),
                         tensor.options().device(at::kCPU));
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
    return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                     c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
    return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                             c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& target, bool) {
    if (!target.numel()) return target;
    const Opened source(self);
    // Of one storage, the first to close it would close it for the other, too.
    const bool same = self.device() == target.device() && self.storage().data() == target.storage().data();
    if (same) {
        on_host(target).copy_(on_host(self));
    } else {
        const Opened opened(target);
        on_host(target).copy_(on_host(self));
    }
    return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& target) {
    if (self.sizes() != target.sizes()) target.resize_(self.sizes());
    return copy_from(self, target, false);
}

at::Tensor as_strided(const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride,
                      std::optional<int64_t> offset) {
    return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

at::Tensor view(const at::Tensor& self, c10::IntArrayRef size) { return at::native::view(self, size); }

at::Tensor& set_source(at::Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size,
                       c10::IntArrayRef stride) {
    return at::native::set_storage_cpu_(self, source, offset, size, stride);
}

const at::Tensor& resize(const at::Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
    int64_t elements = 1;
    for (const int64_t n : size) elements *= n;
    auto* const impl = self.unsafeGetTensorImpl();
    if (static_cast<size_t>(elements) * self.element_size() > self.storage().nbytes())
        impl->set_storage_keep_dtype(at::empty({elements}, self.options()).storage());
    impl->set_sizes_contiguous(size);
    return self;
}

void by_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) { at::native::cpu_fallback(op, stack); }

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
    m.impl("empty.memory_format", &empty);
    m.impl("empty_strided", &empty_strided);
    m.impl("_copy_from", &copy_from);
    m.impl("_copy_from_and_resize", &copy_from_and_resize);
    m.impl("as_strided", &as_strided);
    m.impl("view", &view);
    m.impl("set_.source_Storage_storage_offset", &set_source);
    m.impl("resize_", &resize);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>()); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.def("live", [] {
        const std::lock_guard<std::mutex> guard(mutex);
        return blocks.size();
    });
}
