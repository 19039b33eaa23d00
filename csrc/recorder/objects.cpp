// The bases of Record, Block, Generator and Mode, and what connects them to Python and torch.
#include "recorder/recorder.h"

#include <structmember.h>

#include <type_traits>

namespace fastinit::recorder {

State state;
const Names* names;

uint64_t elements(PyObject* shape) {
    uint64_t n = 1;
    for (Py_ssize_t d = 0; d < PyTuple_GET_SIZE(shape); ++d) n *= PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(shape, d));
    if (PyErr_Occurred()) throw py::error_already_set();
    return n;
}

uint64_t nbytes(const Record* record) {
    Dtype code;
    const size_t known = fillable(record->dtype, code);
    if (known) return elements(record->shape) * known;
    return elements(record->shape) * PyLong_AsUnsignedLongLong(attribute(record->dtype, names->itemsize).ptr());
}

py::object make_tuple_of(PyObject* kind, std::initializer_list<py::object> fields) {
    auto* const type = reinterpret_cast<PyTypeObject*>(kind);
    py::object made = checked(type->tp_alloc(type, static_cast<Py_ssize_t>(fields.size())));
    Py_ssize_t at = 0;
    for (const py::object& field : fields) PyTuple_SET_ITEM(made.ptr(), at++, field.inc_ref().ptr());
    PyObject_GC_UnTrack(made.ptr());
    return made;
}

bool plain_fill(PyObject* recipe, Values& values, uint64_t& stream) {
    if (is_none(recipe) || PyTuple_GET_SIZE(recipe) != 1) return false;
    PyObject* const write = PyTuple_GET_ITEM(recipe, 0);
    const auto field = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(write, i); };
    if (PyTuple_GET_SIZE(field(3)) || field(4) != Py_None) return false;
    const long kind = PyLong_AsLong(field(0));
    if (kind < 0 || kind > static_cast<long>(Kind::normal)) return false;
    std::vector<double> numbers;
    numbers.reserve(2);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(field(1)); ++i)
        numbers.push_back(PyFloat_AsDouble(PyTuple_GET_ITEM(field(1), i)));
    stream = PyLong_AsUnsignedLongLong(field(2));
    if (field(5) != Py_None) values.seed = PyLong_AsUnsignedLongLong(field(5));
    if (PyErr_Occurred()) throw py::error_already_set();
    values.distribution = make_distribution(kind, numbers);
    return true;
}

// A tensor that is filled in a loop is not to remember all of it.
constexpr Py_ssize_t most_replaced = 16;

void set_aside(Record* record) {
    for (PyObject* const each : {record->executed, record->recipe}) {
        if (is_none(each) || PyTuple_GET_SIZE(each) == 0) continue;
        if (is_none(record->replaced)) {
            assign(record->replaced, each);
        } else if (PyTuple_GET_SIZE(record->replaced) < most_replaced) {
            assign(record->replaced, checked(PySequence_Concat(record->replaced, each)).ptr());
        }
    }
    assign(record->executed, nullptr);
}

namespace {

// The fields of each type that refer to objects.
constexpr PyObject* Record::* record_fields[] = {&Record::block,   &Record::shape,    &Record::dtype,   &Record::device,
                                                 &Record::recipe,  &Record::values,   &Record::memory,  &Record::owner,
                                                 &Record::tensors, &Record::executed, &Record::replaced};
constexpr PyObject* Block::* block_fields[] = {&Block::device,         &Block::default_dtype, &Block::records,
                                               &Block::generator,      &Block::modules,       &Block::last_seen,
                                               &Block::initializations};
constexpr PyObject* Mode::* mode_fields[] = {&Mode::block};

template <class T, const auto& fields>
int traverse(PyObject* self, visitproc visit, void* arg) {
    for (const auto field : fields) Py_VISIT(reinterpret_cast<T*>(self)->*field);
    Py_VISIT(Py_TYPE(self));
    return 0;
}

template <class T, const auto& fields>
int clear(PyObject* self) {
    for (const auto field : fields) Py_CLEAR(reinterpret_cast<T*>(self)->*field);
    return 0;
}

template <class T, const auto& fields>
void deallocate(PyObject* self) {
    PyTypeObject* const type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if constexpr (std::is_same_v<T, Record>) {
        if (reinterpret_cast<Record*>(self)->weak) PyObject_ClearWeakRefs(self);
    }
    clear<T, fields>(self);
    type->tp_free(self);
    Py_DECREF(type);
}

PyObject* get_nbytes(PyObject* self, void*) {
    return for_python([&] { return checked(PyLong_FromUnsignedLongLong(nbytes(reinterpret_cast<Record*>(self)))); });
}

PyObject* set_record_aside(PyObject* self, PyObject*) {
    return for_python([&] {
        set_aside(reinterpret_cast<Record*>(self));
        return py::none();
    });
}

PyMemberDef record_members[] = {{"block", T_OBJECT, offsetof(Record, block), 0, nullptr},
                                {"shape", T_OBJECT, offsetof(Record, shape), 0, nullptr},
                                {"dtype", T_OBJECT, offsetof(Record, dtype), 0, nullptr},
                                {"device", T_OBJECT, offsetof(Record, device), 0, nullptr},
                                {"recipe", T_OBJECT, offsetof(Record, recipe), 0, nullptr},
                                {"values", T_OBJECT, offsetof(Record, values), 0, nullptr},
                                {"memory", T_OBJECT, offsetof(Record, memory), 0, nullptr},
                                {"owner", T_OBJECT, offsetof(Record, owner), 0, nullptr},
                                {"tensors", T_OBJECT, offsetof(Record, tensors), 0, nullptr},
                                {"executed", T_OBJECT, offsetof(Record, executed), 0, nullptr},
                                {"replaced", T_OBJECT, offsetof(Record, replaced), 0, nullptr},
                                {"recorded", T_BOOL, offsetof(Record, recorded), 0, nullptr},
                                {"deferred", T_BOOL, offsetof(Record, deferred), 0, nullptr},
                                {"__weaklistoffset__", T_PYSSIZET, offsetof(Record, weak), READONLY, nullptr},
                                {nullptr, 0, 0, 0, nullptr}};
PyGetSetDef record_getters[] = {{"nbytes", get_nbytes, nullptr, nullptr, nullptr},
                                {nullptr, nullptr, nullptr, nullptr, nullptr}};
PyMethodDef record_methods[] = {{"set_aside", set_record_aside, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
PyMemberDef block_members[] = {{"device", T_OBJECT, offsetof(Block, device), 0, nullptr},
                               {"default_dtype", T_OBJECT, offsetof(Block, default_dtype), 0, nullptr},
                               {"records", T_OBJECT, offsetof(Block, records), 0, nullptr},
                               {"generator", T_OBJECT, offsetof(Block, generator), 0, nullptr},
                               {"modules", T_OBJECT, offsetof(Block, modules), 0, nullptr},
                               {"dropped", T_PYSSIZET, offsetof(Block, dropped), 0, nullptr},
                               {"defers", T_BOOL, offsetof(Block, defers), 0, nullptr},
                               {nullptr, 0, 0, 0, nullptr}};
PyMemberDef generator_members[] = {{"_seed", T_ULONGLONG, offsetof(Generator, seed), 0, nullptr},
                                   {"streams", T_ULONGLONG, offsetof(Generator, streams), 0, nullptr},
                                   {nullptr, 0, 0, 0, nullptr}};
PyMemberDef mode_members[] = {{"block", T_OBJECT, offsetof(Mode, block), 0, nullptr}, {nullptr, 0, 0, 0, nullptr}};

#define FASTINIT_SLOTS(T, fields, members)                                      \
    {Py_tp_members, members}, {Py_tp_traverse, (void*)(traverse<T, fields>)},   \
        {Py_tp_clear, (void*)(clear<T, fields>)}, {Py_tp_dealloc, (void*)(deallocate<T, fields>)}

PyType_Slot record_slots[] = {FASTINIT_SLOTS(Record, record_fields, record_members),
                              {Py_tp_getset, record_getters},
                              {Py_tp_methods, record_methods},
                              {0, nullptr}};
PyType_Slot block_slots[] = {FASTINIT_SLOTS(Block, block_fields, block_members), {0, nullptr}};
PyType_Slot mode_slots[] = {FASTINIT_SLOTS(Mode, mode_fields, mode_members), {0, nullptr}};
PyType_Slot generator_slots[] = {{Py_tp_members, generator_members}, {0, nullptr}};

constexpr unsigned flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE;
PyType_Spec record_spec = {"fastinit._native.Record", sizeof(Record), 0, flags | Py_TPFLAGS_HAVE_GC, record_slots};
PyType_Spec block_spec = {"fastinit._native.Block", sizeof(Block), 0, flags | Py_TPFLAGS_HAVE_GC, block_slots};
PyType_Spec mode_spec = {"fastinit._native.Mode", sizeof(Mode), 0, flags | Py_TPFLAGS_HAVE_GC, mode_slots};
PyType_Spec generator_spec = {"fastinit._native.Generator", sizeof(Generator), 0, flags, generator_slots};

// connect(**connected) -> (methods of Placeholder by name, Mode.__torch_function__, the hook of registrations)
py::tuple connect(const py::kwargs& connected) {
    const auto keep = [](py::object object) { return object.release().ptr(); };
#define X(name) state.name = keep(connected[#name]);
    FASTINIT_CONNECTED(X)
#undef X
    const py::module_ torch = py::module_::import("torch");
    const py::object low = torch.attr("_C"), tensor = torch.attr("Tensor"), lock = borrow(state.lock);
    state.tensor = keep(tensor);
    state.parameter = keep(torch.attr("nn").attr("Parameter"));
    state.size = keep(torch.attr("Size"));
    state.make = keep(tensor.attr("_make_wrapper_subclass"));
    state.make_subclass = keep(low.attr("TensorBase").attr("_make_subclass"));
    state.undispatched = keep(low.attr("_DisableTorchDispatch"));
    state.enter_undispatched = keep(low.attr("_DisableTorchDispatch").attr("__enter__"));
    state.refuse_address = keep(low.attr("_set_throw_on_mutable_data_ptr"));
    state.empty = keep(torch.attr("empty"));
    state.increment_version = keep(low.attr("_increment_version"));
    state.modes_off = keep(low.attr("DisableTorchFunction"));
    state.enter = keep(low.attr("DisableTorchFunction").attr("__enter__"));
    state.exit = keep(low.attr("DisableTorchFunction").attr("__exit__"));
    state.function_modes = keep(low.attr("_len_torch_function_stack"));
    state.dispatch_modes = keep(low.attr("_len_torch_dispatch_stack"));
    state.transform = keep(low.attr("_functorch").attr("peek_interpreter_stack"));
    state.inference_mode = keep(low.attr("is_inference_mode_enabled"));
    state.deterministic = keep(low.attr("_get_deterministic_algorithms"));
    state.grad_enabled = keep(low.attr("is_grad_enabled"));
    state.initial_seed = keep(torch.attr("default_generator").attr("initial_seed"));
    state.acquire = keep(lock.attr("acquire"));
    state.release = keep(lock.attr("release"));
    state.backward_hooks = keep(tensor.attr("_backward_hooks"));
    state.grad = keep(low.attr("TensorBase").attr("grad"));
    state.grad_fn = keep(tensor.attr("grad_fn"));
    state.is_leaf = keep(tensor.attr("is_leaf"));
    state.post_hooks = keep(tensor.attr("_post_accumulate_grad_hooks"));
    state.requires_grad = keep(tensor.attr("requires_grad"));
    state.shape_getter = keep(tensor.attr("shape").attr("__get__"));
    state.no_steps = keep(py::tuple());
    state.zero = keep(py::int_(0));
    state.init = keep(torch.attr("nn").attr("init").attr("__dict__"));
    state.mode_at = keep(low.attr("_get_function_stack_at"));
    state.pop_mode = keep(low.attr("_pop_torch_function_stack"));
    state.push_mode = keep(low.attr("_push_on_torch_function_stack"));
    return py::make_tuple(methods_of_placeholder(), method_of_mode(state.mode), registration_hook());
}

}  // namespace

void add_recorder(py::module_& m) {
    names = new Names;
    m.add_object("Record", checked(PyType_FromSpec(&record_spec)));
    m.add_object("Block", checked(PyType_FromSpec(&block_spec)));
    m.add_object("Generator", checked(PyType_FromSpec(&generator_spec)));
    m.add_object("Mode", checked(PyType_FromSpec(&mode_spec)));
    m.def("connect", &connect);
    m.def("turn", [] { return state.turn ? borrow(state.turn) : py::object(py::none()); });
    m.def("give_turn",
          [](const py::object& generator) { assign(state.turn, generator.is_none() ? nullptr : generator.ptr()); });
    m.def("use", [](bool fast) { state.in_use = fast; });
    m.def("count_functionalizing", [](int more) { state.functionalizing += more; });
    m.def("new_placeholder", [](const py::object& record) { return new_placeholder(record); });
    m.def("around_handle", &around_handle);
    m.def("around_make_subclass", &around_make_subclass);
    m.add_object("type_of", type_function());
    add_settling(m);
}

}  // namespace fastinit::recorder
