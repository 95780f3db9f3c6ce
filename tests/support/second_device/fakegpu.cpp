// A pretended accelerator: tensors of device type PrivateUse1 ("fakegpu") whose bytes lie in host memory.
//
// Every operator without a kernel of its own falls back to the CPU's kernel on views of the same memory, after a check
// as strict as CUDA's: all tensors on one device, CPU tensors of no dimension only where CUDA takes them, CPU index
// tensors only in x[i], generators of the device, no matrix products of integers. Views stay views (they share the
// storage), copies between host and device and all that makes the host wait are reported to a callback.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <unordered_map>
#include <unordered_set>
#include <atomic>

namespace {

constexpr auto kDev = c10::DeviceType::PrivateUse1;
constexpr int kDevices = 2;
thread_local c10::DeviceIndex current = 0;

// ---------------------------------------------------------------- what is reported

using Callback = void (*)(const char* kind, const char* op, long long bytes);
std::atomic<Callback> callback{nullptr};
std::atomic<long long> launches{0}, live{0}, peak{0};
std::unordered_set<std::string> no_check;  // operators whose CUDA kernels check devices themselves (TensorIterator)
thread_local bool reporting = false;

void report(const char* kind, const std::string& op, long long bytes = 0) {
  Callback fn = callback.load();
  if (fn == nullptr || reporting) return;
  reporting = true;
  fn(kind, op.c_str(), bytes);
  reporting = false;
}

// ---------------------------------------------------------------- memory

struct Block { size_t n; };
void release(void* p) {
  if (p == nullptr) return;
  auto* head = reinterpret_cast<char*>(p) - 64;
  live -= static_cast<long long>(reinterpret_cast<Block*>(head)->n);
  std::free(head);
}

struct FakeAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    c10::Device device(kDev, current);
    if (n == 0) return {nullptr, nullptr, &release, device};
    void* raw = nullptr;
    if (posix_memalign(&raw, 64, n + 64) != 0) throw std::bad_alloc();
    reinterpret_cast<Block*>(raw)->n = n;
    void* p = reinterpret_cast<char*>(raw) + 64;
    long long now = (live += static_cast<long long>(n));
    long long before = peak.load();
    while (now > before && !peak.compare_exchange_weak(before, now)) {}
    return {p, p, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* dest, const void* src, std::size_t count) const override { std::memcpy(dest, src, count); }
};
FakeAllocator allocator;
REGISTER_ALLOCATOR(kDev, &allocator)

// ---------------------------------------------------------------- devices and streams (there is no concurrency)

struct FakeGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDev; }
  c10::Device exchangeDevice(c10::Device d) const override {
    c10::Device old(kDev, current);
    setDevice(d);
    return old;
  }
  c10::Device getDevice() const override { return {kDev, current}; }
  void setDevice(c10::Device d) const override { if (d.index() >= 0) current = d.index(); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { if (d.index() >= 0) current = d.index(); }
  c10::Stream getStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream getDefaultStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream getNewStream(c10::Device d, int) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return c10::Stream(c10::Stream::DEFAULT, s.device()); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, FakeGuard);

struct FakeGenerator final : c10::GeneratorImpl {  // the CPU's generator, said to be the device's
  at::Generator inner;
  explicit FakeGenerator(c10::DeviceIndex i, uint64_t seed = c10::default_rng_seed_val)
      : c10::GeneratorImpl(c10::Device(kDev, i), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        inner(at::detail::createCPUGenerator(seed)) {}
  void set_current_seed(uint64_t s) override { inner.set_current_seed(s); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& s) override { inner.unsafeGetGeneratorImpl()->set_state(s); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  FakeGenerator* clone_impl() const override {
    auto* made = new FakeGenerator(device().index());
    made->inner = inner.clone();
    return made;
  }
};

at::Generator& default_generator(c10::DeviceIndex i) {
  static at::Generator all[kDevices] = {at::make_generator<FakeGenerator>(0), at::make_generator<FakeGenerator>(1)};
  return all[i < 0 ? current : i];
}

struct FakeHooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  void setCurrentDevice(c10::DeviceIndex i) const override { current = i; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex i) const override { auto old = current; current = i; return old; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex i) const override { auto old = current; if (i >= 0) current = i; return old; }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Allocator* getPinnedMemoryAllocator() const override { return at::getCPUAllocator(); }
  at::Device getDeviceFromPtr(void*) const override { return {kDev, current}; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex i) const override { return default_generator(i); }
  at::Generator getNewGenerator(c10::DeviceIndex i) const override { return at::make_generator<FakeGenerator>(i < 0 ? current : i); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t n) const override {
    c10::DeviceGuard guard(storage.device());
    auto made = allocator.allocate(n);
    if (n && storage.nbytes()) std::memcpy(made.get(), storage.data(), std::min(n, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(made));
    storage.unsafeGetStorageImpl()->set_nbytes(n);
  }
};
struct RegisterHooks { RegisterHooks() { at::RegisterPrivateUse1HooksInterface(new FakeHooks()); } } register_hooks;

// ---------------------------------------------------------------- one call of a CPU kernel on device memory

struct Borrowed {  // device tensors of one call, seen as CPU tensors
  std::unordered_map<c10::StorageImpl*, c10::Storage> cpu_of;      // device storage -> CPU storage around its memory
  std::unordered_map<c10::StorageImpl*, c10::Storage> device_of;   // and back
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;            // (device tensor, its CPU view)
  std::unordered_map<c10::TensorImpl*, at::Tensor> original;       // CPU view -> device tensor

  at::Tensor borrow(const at::Tensor& t) {
    const auto& storage = t.storage();
    auto* key = storage.unsafeGetStorageImpl();
    auto it = cpu_of.find(key);
    if (it == cpu_of.end()) {
      auto* keep = new c10::Storage(storage);
      c10::DataPtr ptr(const_cast<void*>(storage.data()), keep, [](void* p) { delete static_cast<c10::Storage*>(p); }, c10::Device(c10::kCPU));
      c10::Storage cpu(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(ptr), at::getCPUAllocator(), true);
      it = cpu_of.emplace(key, cpu).first;
      device_of.emplace(cpu.unsafeGetStorageImpl(), storage);
    }
    auto out = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(it->second), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
    out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    if (t.is_conj()) out._set_conj(true);
    if (t.is_neg()) out._set_neg(true);
    pairs.emplace_back(t, out);
    original.emplace(out.unsafeGetTensorImpl(), t);
    return out;
  }

  void settle() {  // what a kernel resized
    for (auto& [dev, cpu] : pairs) {
      auto* key = dev.storage().unsafeGetStorageImpl();
      auto found = cpu_of.find(key);
      if (found != cpu_of.end() && (found->second.data() != dev.storage().data() || found->second.nbytes() != dev.storage().nbytes())) {
        c10::DeviceGuard guard(dev.device());
        auto made = allocator.allocate(found->second.nbytes());
        if (found->second.nbytes()) std::memcpy(made.get(), found->second.data(), found->second.nbytes());
        // the CPU storage may still point into the old memory's keeper: it is replaced, not reused
        key->set_data_ptr_noswap(std::move(made));
        key->set_nbytes(found->second.nbytes());
      }
      if (cpu.sizes() != dev.sizes() || cpu.strides() != dev.strides() || cpu.storage_offset() != dev.storage_offset())
        dev.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }

  at::Tensor give_back(const at::Tensor& t, c10::Device device) {
    if (!t.defined() || !t.is_cpu()) return t;
    auto same = original.find(t.unsafeGetTensorImpl());
    if (same != original.end()) return same->second;
    auto shared = device_of.find(t.storage().unsafeGetStorageImpl());
    c10::Storage storage;
    if (shared != device_of.end()) {
      // A view: with the keys of what it is a view of, as views of ordinary tensors are ordinary in inference mode too.
      const at::Tensor* base = &pairs.front().first;
      for (auto& [dev, cpu] : pairs)
        if (dev.storage().unsafeGetStorageImpl() == shared->second.unsafeGetStorageImpl()) { base = &dev; break; }
      auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(shared->second), base->key_set(), t.dtype());
      view.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
      if (t.is_conj() != view.is_conj()) view._set_conj(t.is_conj());
      if (t.is_neg() != view.is_neg()) view._set_neg(t.is_neg());
      return view;
    } else {
      c10::DeviceGuard guard(device);
      auto made = allocator.allocate(t.storage().nbytes());
      if (t.storage().nbytes()) std::memcpy(made.get(), t.storage().data(), t.storage().nbytes());
      storage = c10::Storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(made), &allocator, true);
    }
    auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), t.dtype());
    out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    if (t.is_conj()) out._set_conj(true);
    if (t.is_neg()) out._set_neg(true);
    return out;
  }
};

const std::unordered_set<std::string> takes_cpu_index = {
    "aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index",
    "aten::_unsafe_index_put", "aten::index_put.out", "aten::index.Tensor_out"};
const std::unordered_set<std::string> waits = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2", "aten::_unique",
    "aten::unique_dim", "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::is_nonzero",
    "aten::repeat_interleave", "aten::bincount", "aten::histc", "aten::_linalg_check_errors"};
const std::unordered_set<std::string> no_integers = {
    "aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::baddbmm_", "aten::mv", "aten::addmv",
    "aten::addmv_", "aten::dot", "aten::vdot"};

[[noreturn]] void refuse(const std::string& op, const std::string& why) {
  report("refused", op + ": " + why);
  TORCH_CHECK(false, why, " (", op, ")");
}

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = schema.name();
  const auto full = schema.overload_name().empty() ? name : name + "." + schema.overload_name();
  const auto n_args = schema.arguments().size();
  const auto begin = stack->size() - n_args;
  ++launches;

  // Where it runs.
  std::optional<c10::Device> device;
  auto see = [&](const at::Tensor& t) {
    if (!t.defined() || !t.is_privateuseone()) return;
    if (!device) device = t.device();
    else if (*device != t.device())
      refuse(full, c10::str("Expected all tensors to be on the same device, but found at least two devices, ", *device, " and ", t.device(), "!"));
  };
  std::vector<std::pair<at::Tensor, size_t>> on_cpu;
  auto visit = [&](const c10::IValue& v, size_t i, auto&& fn) {
    if (v.isTensor()) fn(v.toTensor(), i);
    else if (v.isTensorList()) for (const at::Tensor& t : v.toTensorVector()) fn(t, i);
    else if (v.isList() && schema.arguments()[i].type()->str().find("Tensor") != std::string::npos)
      for (const c10::IValue& e : v.toListRef()) { if (e.isTensor()) fn(e.toTensor(), i); }
  };
  for (size_t i = 0; i < n_args; ++i)
    visit((*stack)[begin + i], i, [&](const at::Tensor& t, size_t at) {
      see(t);
      if (t.defined() && t.is_cpu()) on_cpu.emplace_back(t, at);
    });
  for (size_t i = 0; i < n_args; ++i) {
    auto& v = (*stack)[begin + i];
    if (v.isDevice() && v.toDevice().type() == kDev) {
      auto d = v.toDevice();
      if (!device) device = d.has_index() ? d : c10::Device(kDev, current);
      v = c10::IValue(c10::Device(c10::kCPU));
    }
  }
  if (!device) device = c10::Device(kDev, current);

  // What CUDA refuses.
  const bool lenient = no_check.count(full) > 0;
  for (const auto& [t, i] : on_cpu) {
    const auto* alias = schema.arguments()[i].alias_info();
    const bool written = alias != nullptr && alias->isWrite();
    if (!written && takes_cpu_index.count(name) && i >= 1 && schema.arguments()[i].name() == "indices") {
      report("h2d", full, static_cast<long long>(t.numel() * t.element_size()));
      continue;
    }
    if (!written && lenient && t.dim() == 0) continue;
    refuse(full, c10::str("Expected all tensors to be on the same device, but found at least two devices, ", *device, " and cpu! (argument ", schema.arguments()[i].name(), " ", t.sizes(), ")"));
  }
  if (no_integers.count(name))
    for (size_t i = 0; i < n_args; ++i)
      visit((*stack)[begin + i], i, [&](const at::Tensor& t, size_t) {
        if (t.defined() && !t.is_floating_point() && !t.is_complex()) refuse(full, c10::str("\"", name, "_cuda\" not implemented for '", t.scalar_type(), "'"));
      });
  for (size_t i = 0; i < n_args; ++i) {
    auto& v = (*stack)[begin + i];
    if (schema.arguments()[i].type()->str().find("Generator") == std::string::npos) continue;
    auto generator = v.isNone() ? default_generator(device->index()) : v.toGenerator();
    if (generator.device().type() != kDev) refuse(full, c10::str("Expected a '", *device, "' device type for generator but found '", generator.device(), "'"));
    v = c10::IValue(static_cast<FakeGenerator*>(generator.unsafeGetGeneratorImpl())->inner);
  }
  if (waits.count(name)) report("sync", full);
  report("op", full);

  // The CPU's kernel on the same memory.
  Borrowed borrowed;
  for (size_t i = 0; i < n_args; ++i) {
    auto& v = (*stack)[begin + i];
    auto change = [&](const at::Tensor& t) { return t.defined() && t.is_privateuseone() ? borrowed.borrow(t) : t; };
    if (v.isTensor()) v = c10::IValue(change(v.toTensor()));
    else if (v.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : v.toTensorVector()) list.push_back(change(t));
      v = c10::IValue(list);
    } else if (v.isList() && schema.arguments()[i].type()->str().find("Tensor?") != std::string::npos) {
      c10::List<std::optional<at::Tensor>> list;
      for (const c10::IValue& e : v.toListRef())
        list.push_back(e.isNone() ? std::optional<at::Tensor>() : std::optional<at::Tensor>(change(e.toTensor())));
      v = c10::IValue(list);
    }
  }
  op.callBoxed(stack);
  borrowed.settle();
  const auto n_out = schema.returns().size();
  for (size_t i = stack->size() - n_out; i < stack->size(); ++i) {
    auto& v = (*stack)[i];
    if (v.isTensor()) v = c10::IValue(borrowed.give_back(v.toTensor(), *device));
    else if (v.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : v.toTensorVector()) list.push_back(borrowed.give_back(t, *device));
      v = c10::IValue(list);
    }
  }
}

// ---------------------------------------------------------------- the few operators with kernels of their own

c10::Device place(std::optional<c10::Device> device) {
  c10::Device d = device.value_or(c10::Device(kDev, current));
  if (!d.has_index()) d = c10::Device(kDev, current);
  TORCH_CHECK(d.index() < kDevices, "fakegpu: invalid device ordinal ", static_cast<int>(d.index()));
  return d;
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(place(device));
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(place(device));
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& src, bool) {
  ++launches;
  const char* kind = !src.is_privateuseone() ? "h2d" : !self.is_privateuseone() ? "d2h" : src.device() != self.device() ? "p2p" : "d2d";
  report(kind, "aten::copy_", static_cast<long long>(src.numel() * src.element_size()));
  Borrowed borrowed;
  auto to = self.is_privateuseone() ? borrowed.borrow(self) : self;
  auto from = src.is_privateuseone() ? borrowed.borrow(src) : src;
  to.copy_(from);
  return self;
}

at::Tensor copy_from(const at::Tensor& src, const at::Tensor& self, bool non_blocking) {
  auto to = self;
  return copy_(to, src, non_blocking);
}

at::Tensor& set_storage(at::Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  std::vector<int64_t> contiguous;
  if (stride.data() == nullptr) {
    contiguous.resize(size.size());
    int64_t step = 1;
    for (int64_t i = static_cast<int64_t>(size.size()) - 1; i >= 0; --i) { contiguous[i] = step; step *= std::max<int64_t>(size[i], 1); }
    stride = contiguous;
  }
  impl->set_sizes_and_strides(size, stride, offset);
  return self;
}

at::Tensor& set_source_storage(at::Tensor& self, c10::Storage source) {
  const int64_t n = static_cast<int64_t>(source.nbytes() / self.element_size());
  return set_storage(self, std::move(source), 0, {n}, {});
}

at::Tensor& set_source_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

// x.data = y across devices, as PyTorch does for CUDA and CPU but not for PrivateUse1: tied parameters stay tied, and an
// optimizer's parameters stay its own, when a module moves.
struct Metadata : c10::TensorImpl {
  static void copy(const c10::TensorImpl* from, c10::TensorImpl* to) {
    copy_tensor_metadata(from, to, to->version_counter(), to->allow_tensor_metadata_change());
  }
};
void set_data(const at::Tensor& self, const at::Tensor& source) {
  Metadata::copy(source.unsafeGetTensorImpl(), self.unsafeGetTensorImpl());
}
TORCH_LIBRARY(fakegpu, m) { m.def("set_data(Tensor self, Tensor source) -> ()", &set_data); }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_copy_from", &copy_from);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_source_storage);
  m.impl("set_.source_Tensor", &set_source_tensor);
}

// Operators that PyTorch makes of their out= variants for any backend: taken over, so that their refusals are reported.
std::vector<std::unique_ptr<torch::Library>> taken;
void take_over(const char* name) {
  taken.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__));
  taken.back()->impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

}  // namespace

extern "C" {
void fakegpu_take_over(const char* name) { take_over(name); }
void fakegpu_callback(Callback fn) { callback = fn; }
void fakegpu_no_check(const char* name) { no_check.insert(name); }
long long fakegpu_launches() { return launches; }
long long fakegpu_live() { return live; }
long long fakegpu_peak() { return peak; }
void fakegpu_reset_peak() { peak = live.load(); }
void fakegpu_seed(unsigned long long seed) { for (int i = 0; i < kDevices; ++i) default_generator(i).set_current_seed(seed); }
int fakegpu_current() { return current; }
void fakegpu_set_current(int i) { current = static_cast<c10::DeviceIndex>(i); }
}
