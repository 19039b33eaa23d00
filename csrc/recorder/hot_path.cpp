// The part of the recorder (fastinit/recorder.py) that runs for every tensor of a model, without a Python frame: the
// dispatch of the mode, placeholders, Parameter's constructor, the assignment of attributes to modules, whole fills,
// and giving tensors their memory in the end.
//
// Each function does the plain case alone. For anything else it leaves everything as it was and hands over to the
// Python code of the same purpose, which handles every case, the plain one included. Written against CPython's public
// C interface, since a call through pybind11 would cost about what is to be saved; torch is reached through its Python
// names, so that the module links against no particular version of it. The GIL is held throughout.
#include "recorder/hot_path.h"

#include <structmember.h>

#include <algorithm>
#include <cstdint>
#include <unordered_set>
#include <vector>

#include "batch.h"
#include "cpu/float_environment.h"

namespace py = pybind11;

namespace fastinit {
namespace {

// --- objects --------------------------------------------------------------------------------------------------------

// fastinit.recorder.Entry adds properties to it and explains the fields. Not tracked by the garbage collector, which
// would look at each of them again and again while a model is made: an entry is never part of a cycle.
struct Entry {
    PyObject_HEAD
    PyObject* shape;
    PyObject* dtype;
    PyObject* device;
    PyObject* recipe;
    PyObject* refs;
    PyObject* shadow;
    PyObject* storage_key;
    PyObject* storage_weak;
    PyObject* name;
    unsigned long long nbytes;
    unsigned long long data_ptr;
    char again, resident, filled, deferred;
};

PyMemberDef entry_members[] = {
    {"shape", T_OBJECT, offsetof(Entry, shape), 0, nullptr},
    {"dtype", T_OBJECT, offsetof(Entry, dtype), 0, nullptr},
    {"device", T_OBJECT, offsetof(Entry, device), 0, nullptr},
    {"recipe", T_OBJECT, offsetof(Entry, recipe), 0, nullptr},
    {"refs", T_OBJECT, offsetof(Entry, refs), 0, nullptr},
    {"shadow", T_OBJECT, offsetof(Entry, shadow), 0, nullptr},
    {"storage_key", T_OBJECT, offsetof(Entry, storage_key), 0, nullptr},
    {"storage_weak", T_OBJECT, offsetof(Entry, storage_weak), 0, nullptr},
    {"name", T_OBJECT, offsetof(Entry, name), 0, nullptr},
    {"nbytes", T_ULONGLONG, offsetof(Entry, nbytes), READONLY, nullptr},
    {"data_ptr", T_ULONGLONG, offsetof(Entry, data_ptr), 0, nullptr},
    {"again", T_BOOL, offsetof(Entry, again), 0, nullptr},
    {"resident", T_BOOL, offsetof(Entry, resident), 0, nullptr},
    {"filled", T_BOOL, offsetof(Entry, filled), 0, nullptr},
    {"deferred", T_BOOL, offsetof(Entry, deferred), 0, nullptr},
    {nullptr, 0, 0, 0, nullptr}};

Entry* as_entry(PyObject* object) { return reinterpret_cast<Entry*>(object); }

// Replaces an owned reference by a new one to the value.
void assign(PyObject*& field, PyObject* value) {
    PyObject* const before = field;
    Py_XINCREF(value);
    field = value;
    Py_XDECREF(before);
}

// Sets what an entry begins with; -1 with a Python error if it cannot.
int begin(Entry* entry, PyObject* shape, PyObject* dtype, PyObject* device, PyObject* recipe) {
    PyObject* const itemsize = PyObject_GetAttrString(dtype, "itemsize");
    if (!itemsize) return -1;
    unsigned long long nbytes = PyLong_AsUnsignedLongLong(itemsize);
    Py_DECREF(itemsize);
    for (Py_ssize_t d = 0; d < PyTuple_GET_SIZE(shape); ++d)
        nbytes *= PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(shape, d));
    if (PyErr_Occurred()) return -1;
    PyObject* const refs = PyList_New(0);
    if (!refs) return -1;
    assign(entry->shape, shape);
    assign(entry->dtype, dtype);
    assign(entry->device, device);
    assign(entry->recipe, recipe);
    assign(entry->refs, refs);
    entry->nbytes = nbytes;
    Py_DECREF(refs);
    return 0;
}

int entry_init(PyObject* self, PyObject* args, PyObject*) {
    PyObject *shape, *dtype, *device, *recipe;
    if (!PyArg_ParseTuple(args, "O!OOO:Entry", &PyTuple_Type, &shape, &dtype, &device, &recipe)) return -1;
    return begin(as_entry(self), shape, dtype, device, recipe);
}

void entry_dealloc(PyObject* self) {
    Entry* const entry = as_entry(self);
    for (PyObject** field : {&entry->shape, &entry->dtype, &entry->device, &entry->recipe, &entry->refs, &entry->shadow,
                             &entry->storage_key, &entry->storage_weak, &entry->name})
        Py_CLEAR(*field);
    PyTypeObject* const type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

PyType_Slot entry_slots[] = {{Py_tp_members, entry_members},
                             {Py_tp_init, reinterpret_cast<void*>(entry_init)},
                             {Py_tp_dealloc, reinterpret_cast<void*>(entry_dealloc)},
                             {Py_tp_doc, const_cast<char*>("Fields of fastinit.recorder.Entry.")},
                             {0, nullptr}};
PyType_Spec entry_spec = {"fastinit._native.Entry", sizeof(Entry), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
                          entry_slots};

bool is_none(PyObject* object) { return object == nullptr || object == Py_None; }

py::object steal(PyObject* object) { return py::reinterpret_steal<py::object>(object); }

// What the Python side connects, and the names that are looked up. They live as long as the process.
struct {
    PyObject *thread, *entry, *handlers, *pass, *write, *plain_class;
    PyObject *tensor, *parameter, *module, *empty, *function_modes, *dispatch_modes, *inference_mode;
    PyObject *make_subclass, *parameter_new, *module_setattr, *module_getattr, *module_init;
    std::vector<std::pair<PyObject*, PyObject*>> fresh;  // attributes of a new module
    PyObject *parameter_hooks, *module_hooks;
    PyObject *plain_types;  // of attributes that are neither tensors nor modules
    PyObject* classes;      // class of modules -> (tag, None or a dict: name -> whether the class has none of that name)
    PyObject* zero_strides[9];
} state;

struct Names {
#define NAME(name) PyObject* const name = PyUnicode_InternFromString(#name)
    NAME(_by_id);
    NAME(_dispatch);
    NAME(_fill_ready);
    NAME(_ready);
    NAME(_ready_bytes);
    NAME(_ready_limit);
    NAME(_overlap);
    NAME(_prototypes);
    NAME(_purge);
    NAME(_purge_at);
    NAME(_suspended);
    NAME(default_dtype);
    NAME(defers);
    NAME(dropped);
    NAME(module_parameters);
    NAME(recorder);
    NAME(run_in_torch);
    NAME(saw);
    NAME(streams);
    NAME(device);
    NAME(dtype);
    NAME(data);
    NAME(data_ptr);
    NAME(nbytes);
    NAME(numel);
    NAME(call_super_init);
    NAME(new_empty);
    NAME(new_empty_strided);
    NAME(_parameters);
    NAME(_buffers);
    NAME(_modules);
    NAME(_non_persistent_buffers_set);
#undef NAME
};
const Names* names;

// The recorder of the calling thread, or None.
py::object active_recorder() {
    PyObject* const recorder = PyObject_GetAttr(state.thread, names->recorder);
    if (!recorder) throw py::error_already_set();
    return steal(recorder);
}

py::object attribute(PyObject* object, PyObject* name) {
    PyObject* const value = PyObject_GetAttr(object, name);
    if (!value) throw py::error_already_set();
    return steal(value);
}

py::object checked(PyObject* result) {
    if (!result) throw py::error_already_set();
    return steal(result);
}

void check(int status) {
    if (status < 0) throw py::error_already_set();
}

bool truth(const py::object& value) {
    const int status = PyObject_IsTrue(value.ptr());
    check(status);
    return status;
}

int64_t integer(const py::object& value) {
    const long long x = PyLong_AsLongLong(value.ptr());
    if (x == -1 && PyErr_Occurred()) throw py::error_already_set();
    return x;
}

void add_to(PyObject* object, PyObject* name, int64_t n) {
    const py::object sum = checked(PyLong_FromLongLong(integer(attribute(object, name)) + n));
    check(PyObject_SetAttr(object, name, sum.ptr()));
}

// The value under a key, borrowed; null if there is none.
PyObject* item(PyObject* dict, PyObject* key) {
    PyObject* const value = PyDict_GetItemWithError(dict, key);
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

py::object call(PyObject* function, std::initializer_list<PyObject*> args) {
    PyObject* buffer[8] = {nullptr};  // the first place is for the callee to use
    std::copy(args.begin(), args.end(), buffer + 1);
    return checked(PyObject_Vectorcall(function, buffer + 1, args.size() | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
}

py::object call_method(PyObject* name, std::initializer_list<PyObject*> self_and_args) {
    return checked(PyObject_VectorcallMethod(name, self_and_args.begin(), self_and_args.size(), nullptr));
}

// Runs a function that may throw as one that CPython calls.
template <class Function>
PyObject* for_python(Function&& function) {
    try {
        return function().release().ptr();
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

// --- tensors without memory -----------------------------------------------------------------------------------------

// (weak reference, entry, region) of a tensor that is found by its identity, borrowed; null if it is not.
PyObject* known(PyObject* by_id, PyObject* tensor) {
    const py::object key = checked(PyLong_FromVoidPtr(tensor));
    PyObject* const found = item(by_id, key.ptr());
    if (!found) return nullptr;
    const py::object alive = checked(PyObject_CallNoArgs(PyTuple_GET_ITEM(found, 0)));
    return alive.ptr() == tensor ? found : nullptr;
}

Entry* entry_of(PyObject* found) { return as_entry(PyTuple_GET_ITEM(found, 1)); }

PyObject* region_of(PyObject* found) { return PyTuple_GET_ITEM(found, 2); }

void stand_for(PyObject* by_id, PyObject* tensor, PyObject* entry, PyObject* region) {
    const py::object ref = checked(PyWeakref_NewRef(tensor, nullptr));
    const py::object known = checked(PyTuple_Pack(3, ref.ptr(), entry, region));
    const py::object key = checked(PyLong_FromVoidPtr(tensor));
    check(PyDict_SetItem(by_id, key.ptr(), known.ptr()));
    check(PyList_Append(as_entry(entry)->refs, ref.ptr()));
}

// The sizes in the arguments of torch.empty, as a tuple; null if they are not plain positive integers.
py::object plain_size(PyObject* args) {
    PyObject* size = args;
    if (PyTuple_GET_SIZE(args) == 1) {
        PyObject* const only = PyTuple_GET_ITEM(args, 0);
        if (PyTuple_Check(only) || PyList_CheckExact(only)) size = only;
    }
    const py::object tuple = checked(PySequence_Tuple(size));
    const Py_ssize_t dims = PyTuple_GET_SIZE(tuple.ptr());
    if (dims == 0 || dims > 8) return {};
    for (Py_ssize_t d = 0; d < dims; ++d) {
        PyObject* const value = PyTuple_GET_ITEM(tuple.ptr(), d);
        if (!PyLong_CheckExact(value)) return {};
        int overflow;
        if (PyLong_AsLongLongAndOverflow(value, &overflow) <= 0 || overflow) return {};
    }
    return tuple;
}

// What torch.empty returns inside the context; null if the call is not plain.
py::object placeholder(PyObject* recorder, PyObject* args, PyObject* kwargs) {
    py::object dtype;
    if (kwargs) {
        PyObject *key, *value;
        for (Py_ssize_t at = 0; PyDict_Next(kwargs, &at, &key, &value);) {
            if (value == Py_None) {
                if (PyUnicode_Compare(key, names->device) && PyUnicode_Compare(key, names->dtype)) return {};
            } else if (PyUnicode_Compare(key, names->dtype) == 0) {
                dtype = py::reinterpret_borrow<py::object>(value);
            } else {
                return {};
            }
        }
    }
    if (integer(checked(PyObject_CallNoArgs(state.dispatch_modes)))) return {};
    if (checked(PyObject_CallNoArgs(state.inference_mode)).ptr() == Py_True) return {};
    const py::object size = plain_size(args);
    if (!size) return {};
    if (!dtype) dtype = attribute(recorder, names->default_dtype);
    PyObject* const prototype = item(attribute(recorder, names->_prototypes).ptr(), dtype.ptr());
    if (!prototype) return {};
    py::object tensor = call_method(names->new_empty_strided,
                                    {prototype, size.ptr(), state.zero_strides[PyTuple_GET_SIZE(size.ptr())]});
    PyTypeObject* const type = reinterpret_cast<PyTypeObject*>(state.entry);
    const py::object entry = checked(type->tp_alloc(type, 0));
    check(begin(as_entry(entry.ptr()), size.ptr(), dtype.ptr(), attribute(recorder, names->device).ptr(),
                py::tuple().ptr()));
    const py::object by_id = attribute(recorder, names->_by_id);
    stand_for(by_id.ptr(), tensor.ptr(), entry.ptr(), Py_None);
    if (PyDict_GET_SIZE(by_id.ptr()) > integer(attribute(recorder, names->_purge_at)))
        call_method(names->_purge, {recorder});
    return tensor;
}

// --- the mode -------------------------------------------------------------------------------------------------------

// Whether nothing but this recorder looks at what torch functions are called on these types: then handlers may call
// torch as they are, for torch takes a mode off its stack while it is asked.
bool quiet(PyObject* types) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(types); ++i) {
        PyObject* const type = PyTuple_GET_ITEM(types, i);
        if (type != state.tensor && type != state.parameter) return false;
    }
    return integer(checked(PyObject_CallNoArgs(state.function_modes))) == 0;
}

// Recorder.__torch_function__(func, types, args=(), kwargs=None)
PyObject* torch_function(PyObject* self, PyObject* const* given, Py_ssize_t count) {
    return for_python([&]() -> py::object {
        if (count < 2 || count > 4) {
            PyErr_SetString(PyExc_TypeError, "__torch_function__ takes func, types, args and kwargs");
            throw py::error_already_set();
        }
        PyObject *const func = given[0], *const types = given[1];
        const py::object args = count > 2 ? checked(PySequence_Tuple(given[2])) : py::tuple();
        PyObject* const kwargs = count > 3 && given[3] != Py_None ? given[3] : nullptr;
        PyObject* const handler = item(state.handlers, func);
        if (handler && PyTuple_Check(types) && quiet(types) && !truth(attribute(self, names->_suspended))) {
            if (handler == state.pass) return checked(PyObject_Call(func, args.ptr(), kwargs));
            if (func == state.empty) {
                if (py::object tensor = placeholder(self, args.ptr(), kwargs)) return tensor;
            }
            const Py_ssize_t n = PyTuple_GET_SIZE(args.ptr());
            const py::object all = checked(PyTuple_New(n + 2));
            Py_INCREF(self);
            PyTuple_SET_ITEM(all.ptr(), 0, self);
            Py_INCREF(func);
            PyTuple_SET_ITEM(all.ptr(), 1, func);
            for (Py_ssize_t i = 0; i < n; ++i) {
                PyObject* const value = PyTuple_GET_ITEM(args.ptr(), i);
                Py_INCREF(value);
                PyTuple_SET_ITEM(all.ptr(), i + 2, value);
            }
            py::object result = checked(PyObject_Call(handler, all.ptr(), kwargs));
            if (result.ptr() != Py_NotImplemented) return result;
            const py::object options = kwargs ? py::reinterpret_borrow<py::object>(kwargs) : py::dict();
            return call_method(names->run_in_torch, {self, func, args.ptr(), options.ptr()});
        }
        const py::object options = kwargs ? py::reinterpret_borrow<py::object>(kwargs) : py::dict();
        return call_method(names->_dispatch, {self, func, types, args.ptr(), options.ptr()});
    });
}

// --- parameters and modules -----------------------------------------------------------------------------------------

// new_parameter(original, cls, data=None, requires_grad=True): what `original`, Parameter.__new__, does. The result stands
// for the entry of a placeholder.
PyObject* new_parameter(PyObject*, PyObject* args, PyObject* kwargs) {
    return for_python([&]() -> py::object {
        PyObject *original, *cls, *data = Py_None, *requires_grad = Py_True;
        static const char* keywords[] = {"", "cls", "data", "requires_grad", nullptr};
        if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|OO:Parameter", const_cast<char**>(keywords), &original, &cls,
                                         &data, &requires_grad))
            throw py::error_already_set();
        const bool plain = original == state.parameter_new && cls == state.parameter &&
                           reinterpret_cast<PyObject*>(Py_TYPE(data)) == state.tensor && PyBool_Check(requires_grad);
        const py::object parameter = plain ? call(state.make_subclass, {cls, data, requires_grad})
                                           : call(original, {cls, data, requires_grad});
        const py::object recorder = active_recorder();
        if (!recorder.is_none() && data != Py_None) {
            const py::object by_id = attribute(recorder.ptr(), names->_by_id);
            if (PyObject* const found = known(by_id.ptr(), data)) {
                const py::object kept = py::reinterpret_borrow<py::object>(found);
                stand_for(by_id.ptr(), parameter.ptr(), PyTuple_GET_ITEM(found, 1), region_of(found));
            }
        }
        return parameter;
    });
}

// Whether torch's Module.__setattr__ does nothing to a class of modules beyond what set_attribute does, and the class
// has no attribute of this name (not asked if name is null).
bool plain_class(PyObject* type, PyObject* name) {
    // CPython changes the tag of a class when the class, or one that it inherits from, is changed.
    const unsigned tag = reinterpret_cast<PyTypeObject*>(type)->tp_version_tag;
    PyObject* cached = item(state.classes, type);
    if (!cached || !tag || PyLong_AsUnsignedLong(PyTuple_GET_ITEM(cached, 0)) != tag) {
        const bool plain = truth(call(state.plain_class, {type}));
        const unsigned current = reinterpret_cast<PyTypeObject*>(type)->tp_version_tag;  // looking may have assigned it
        const py::object value =
            py::make_tuple(current, plain ? py::object(py::dict()) : py::object(py::none()));
        check(PyDict_SetItem(state.classes, type, value.ptr()));
        cached = item(state.classes, type);
    }
    PyObject* const free = PyTuple_GET_ITEM(cached, 1);
    if (free == Py_None) return false;
    if (!name) return true;
    PyObject* answer = item(free, name);
    if (!answer) {
        const Py_ssize_t length = PyUnicode_GetLength(name);
        const bool valid = length > 0 && PyUnicode_FindChar(name, '.', 0, length, 1) == -1;
        answer = valid && !PyObject_HasAttr(type, name) ? Py_True : Py_False;
        check(PyDict_SetItem(free, name, answer));
    }
    return answer == Py_True;
}

bool contains(PyObject* dict_or_set, PyObject* name) {
    const int status = PySequence_Contains(dict_or_set, name);
    check(status);
    return status;
}

enum class Attribute { other, plain, parameter, module };

Attribute kind_of(PyObject* value) {
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(value));
    if (type == state.parameter) return Attribute::parameter;
    if (contains(state.plain_types, type)) return Attribute::plain;
    if (PyType_IsSubtype(Py_TYPE(value), reinterpret_cast<PyTypeObject*>(state.module))) return Attribute::module;
    return Attribute::other;
}

// Sets an attribute as torch's Module.__setattr__ would, or does nothing and returns false.
bool set_plain(PyObject* self, PyObject* name, PyObject* value) {
    const Attribute kind = kind_of(value);
    if (kind == Attribute::other || !PyUnicode_CheckExact(name)) return false;
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(self));
    if (!plain_class(type, kind == Attribute::parameter ? name : nullptr)) return false;
    const py::object dict = checked(PyObject_GenericGetDict(self, nullptr));
    PyObject* const parameters = item(dict.ptr(), names->_parameters);
    PyObject* const buffers = item(dict.ptr(), names->_buffers);
    PyObject* const modules = item(dict.ptr(), names->_modules);
    PyObject* const transient = item(dict.ptr(), names->_non_persistent_buffers_set);
    if (!parameters || !buffers || !modules || !transient || !PyDict_CheckExact(parameters) ||
        !PyDict_CheckExact(buffers) || !PyDict_CheckExact(modules) || !PyAnySet_Check(transient))
        return false;
    if (contains(buffers, name)) return false;
    if (kind == Attribute::plain) {
        if (contains(parameters, name) || contains(modules, name)) return false;
        check(PyObject_GenericSetAttr(self, name, value));
        return true;
    }
    const py::object recorder = active_recorder();
    if (recorder.is_none() || contains(dict.ptr(), name) || contains(transient, name)) return false;
    // The one hook that is registered is ours, as long as a context is active; its work is done below.
    PyObject* const hooks = kind == Attribute::parameter ? state.parameter_hooks : state.module_hooks;
    if (PyDict_Size(hooks) != 1) return false;
    const bool defers = truth(attribute(recorder.ptr(), names->defers));
    if (kind == Attribute::module) {
        if (contains(parameters, name)) return false;
        if (defers) call_method(names->saw, {recorder.ptr(), self});
        check(PyDict_SetItem(modules, name, value));
        return true;
    }
    if (contains(modules, name)) return false;
    PyObject* const found = known(attribute(recorder.ptr(), names->_by_id).ptr(), value);
    if (!found) return false;
    const py::object kept = py::reinterpret_borrow<py::object>(found);
    check(PyList_Append(attribute(recorder.ptr(), names->module_parameters).ptr(), PyTuple_GET_ITEM(found, 0)));
    if (defers) call_method(names->saw, {recorder.ptr(), self});
    const py::object owner = checked(PyTuple_Pack(2, type, name));
    assign(entry_of(found)->name, owner.ptr());
    check(PyDict_SetItem(parameters, name, value));
    return true;
}

// Module.__setattr__(name, value)
PyObject* set_attribute(PyObject* self, PyObject* const* given, Py_ssize_t count) {
    return for_python([&]() -> py::object {
        if (count != 2) {
            PyErr_SetString(PyExc_TypeError, "__setattr__ takes name and value");
            throw py::error_already_set();
        }
        if (set_plain(self, given[0], given[1])) return py::none();
        return call(state.module_setattr, {self, given[0], given[1]});
    });
}

// Module.__getattr__(name): a parameter, buffer or child.
PyObject* get_attribute(PyObject* self, PyObject* name) {
    return for_python([&]() -> py::object {
        const py::object dict = checked(PyObject_GenericGetDict(self, nullptr));
        for (PyObject* kind : {names->_parameters, names->_buffers, names->_modules}) {
            PyObject* const members = item(dict.ptr(), kind);
            if (!members || !PyDict_CheckExact(members)) break;
            if (PyObject* const value = item(members, name)) return py::reinterpret_borrow<py::object>(value);
        }
        return call(state.module_getattr, {self, name});
    });
}

// Module.__init__(*args, **kwargs)
PyObject* initialise_module(PyObject* self, PyObject* args, PyObject* kwargs) {
    return for_python([&]() -> py::object {
        PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(self));
        const bool bare = PyTuple_GET_SIZE(args) == 0 && (!kwargs || PyDict_GET_SIZE(kwargs) == 0);
        if (!bare || !plain_class(type, nullptr) || attribute(type, names->call_super_init).ptr() != Py_False) {
            const py::object bound = checked(PyMethod_New(state.module_init, self));
            return checked(PyObject_Call(bound.ptr(), args, kwargs));
        }
        for (const auto& [name, value] : state.fresh) {
            py::object own;
            if (PyODict_CheckExact(value))
                own = checked(PyODict_New());
            else if (PyDict_CheckExact(value))
                own = checked(PyDict_New());
            else if (PyAnySet_CheckExact(value))
                own = checked(PySet_New(nullptr));
            else
                own = py::reinterpret_borrow<py::object>(value);
            check(PyObject_GenericSetAttr(self, name, own.ptr()));
        }
        return py::none();
    });
}

// What torch's Module.__init__ gives every module, in its order; nothing if that is more than flags and containers.
std::vector<std::pair<PyObject*, PyObject*>> fresh_attributes(const py::object& module) {
    std::vector<std::pair<PyObject*, PyObject*>> fresh;
    const py::dict attributes = module().attr("__dict__");
    for (const auto& [name, value] : attributes) {
        const bool container = PyODict_CheckExact(value.ptr()) || PyDict_CheckExact(value.ptr()) ||
                               PySet_Check(value.ptr());
        if (container ? PyObject_Size(value.ptr()) != 0 : !value.is_none() && !PyBool_Check(value.ptr())) return {};
        fresh.emplace_back(name.inc_ref().ptr(), value.inc_ref().ptr());
    }
    return fresh;
}

// --- fills ----------------------------------------------------------------------------------------------------------

// The entry that a tensor, of which it is the whole, belongs to while it has no memory; null if there is none.
Entry* pending_whole(PyObject* recorder, PyObject* tensor) {
    if (recorder == Py_None) return nullptr;
    PyObject* const found = known(attribute(recorder, names->_by_id).ptr(), tensor);
    if (!found || region_of(found) != Py_None || !is_none(entry_of(found)->storage_key)) return nullptr;
    return entry_of(found);
}

// The entry's fills have to run: with those of the others, at the latest when the context ends. Enough of them begin at
// once.
void make_ready(PyObject* recorder, Entry* entry) {
    const int64_t limit = integer(attribute(recorder, names->_ready_limit));
    if (integer(attribute(recorder, names->_ready_bytes)) >= limit) call_method(names->_fill_ready, {recorder});
    if (entry->resident) return;
    check(PyList_Append(attribute(recorder, names->_ready).ptr(), reinterpret_cast<PyObject*>(entry)));
    add_to(recorder, names->_ready_bytes, static_cast<int64_t>(entry->nbytes));
}

// record(tensor, kind, *parameters): whether the fill of a tensor was recorded, being plain.
PyObject* record(PyObject*, PyObject* const* given, Py_ssize_t count) {
    return for_python([&]() -> py::object {
        if (count < 3) {
            PyErr_SetString(PyExc_TypeError, "record takes tensor, kind and parameters");
            throw py::error_already_set();
        }
        const py::object recorder = active_recorder();
        Entry* const entry = pending_whole(recorder.ptr(), given[0]);
        if (!entry || !is_none(entry->shadow) || !entry->recipe || !PyTuple_Check(entry->recipe)) return py::bool_(false);
        const py::object kept = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(entry));
        const py::object parameters = checked(PyTuple_New(count - 2));
        for (Py_ssize_t i = 2; i < count; ++i) {
            PyObject* const value = PyNumber_Float(given[i]);
            if (!value) throw py::error_already_set();
            PyTuple_SET_ITEM(parameters.ptr(), i - 2, value);
        }
        py::object stream = py::int_(0);
        if (integer(py::reinterpret_borrow<py::object>(given[1])) != static_cast<int64_t>(Kind::constant)) {
            stream = attribute(recorder.ptr(), names->streams);
            add_to(recorder.ptr(), names->streams, 1);
        }
        const py::object fields = checked(PyTuple_Pack(5, given[1], parameters.ptr(), stream.ptr(),
                                                       py::tuple().ptr(), Py_None));
        const py::object new_args = checked(PyTuple_Pack(1, fields.ptr()));
        // What Write(...) does, without the frame of its constructor.
        const py::object write = checked(
            PyTuple_Type.tp_new(reinterpret_cast<PyTypeObject*>(state.write), new_args.ptr(), nullptr));
        const Py_ssize_t before = PyTuple_GET_SIZE(entry->recipe);
        if (before) {
            entry->again = 1;
            if (!entry->filled) add_to(recorder.ptr(), names->dropped, before);
        }
        entry->filled = 0;
        assign(entry->recipe, checked(PyTuple_Pack(1, write.ptr())).ptr());
        if (!is_none(entry->name) && truth(attribute(recorder.ptr(), names->_overlap)))
            make_ready(recorder.ptr(), entry);
        return py::bool_(true);
    });
}

// pending_shape(tensor): its shape as a tuple if it has no memory yet, else None.
PyObject* pending_shape(PyObject*, PyObject* tensor) {
    return for_python([&]() -> py::object {
        const py::object recorder = active_recorder();
        const Entry* const entry = pending_whole(recorder.ptr(), tensor);
        return entry ? py::reinterpret_borrow<py::object>(entry->shape) : py::none();
    });
}

// --- memory ---------------------------------------------------------------------------------------------------------

// The fill of a recipe that is one write of a whole tensor without steps; false if it is not.
bool plain_fill(PyObject* recipe, Values& values, uint64_t& stream) {
    if (is_none(recipe) || PyTuple_GET_SIZE(recipe) != 1) return false;
    PyObject* const write = PyTuple_GET_ITEM(recipe, 0);
    PyObject *const parameters = PyTuple_GET_ITEM(write, 1), *const steps = PyTuple_GET_ITEM(write, 3);
    if (PyTuple_GET_ITEM(write, 4) != Py_None || PyTuple_GET_SIZE(steps)) return false;
    const long kind = PyLong_AsLong(PyTuple_GET_ITEM(write, 0));
    if (kind < 0 || kind > static_cast<long>(Kind::normal)) return false;
    std::vector<double> numbers;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(parameters); ++i)
        numbers.push_back(PyFloat_AsDouble(PyTuple_GET_ITEM(parameters, i)));
    stream = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(write, 2));
    if (PyErr_Occurred()) throw py::error_already_set();
    values.distribution = make_distribution(kind, numbers);
    return true;
}

// waiting(by_id) -> the entries that any living tensor stands for, in the order of creation,
// but that one whose tensor has the address of an earlier one that is dead stands in the place of that one.
py::list waiting(const py::dict& by_id) {
    py::list entries;
    std::unordered_set<PyObject*> seen;
    PyObject *key, *found;
    for (Py_ssize_t at = 0; PyDict_Next(by_id.ptr(), &at, &key, &found);) {
        PyObject* const entry = PyTuple_GET_ITEM(found, 1);
        if (seen.count(entry) || checked(PyObject_CallNoArgs(PyTuple_GET_ITEM(found, 0))).is_none()) continue;
        seen.insert(entry);
        check(PyList_Append(entries.ptr(), entry));
    }
    return entries;
}

// tally(refs) -> the number of elements and the bytes of the living tensors, each counted once.
py::tuple tally(const py::list& refs) {
    int64_t elements = 0, bytes = 0;
    std::unordered_set<PyObject*> seen;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(refs.ptr()); ++i) {
        const py::object tensor = checked(PyObject_CallNoArgs(PyList_GET_ITEM(refs.ptr(), i)));
        if (tensor.is_none() || !seen.insert(tensor.ptr()).second) continue;
        elements += integer(call_method(names->numel, {tensor.ptr()}));
        bytes += integer(attribute(tensor.ptr(), names->nbytes));
    }
    return py::make_tuple(elements, bytes);
}

// settle(segment, start, by_id, given, batch, seed, prototypes, dtypes, largest, limit):
// Gives the entries of a segment their memory and adds their fills to a batch, beginning with number start, until one
// is not plain or larger than `largest` bytes, or `limit` bytes are reached. `given` gets each entry before it has
// memory. Returns the number of the next entry, and how many bytes and fills there were.
py::tuple settle(const py::list& segment, Py_ssize_t start, const py::dict& by_id, const py::list& given, Batch& batch,
                 uint64_t seed, const py::dict& prototypes, const py::dict& dtypes, uint64_t largest, uint64_t limit) {
    const FloatEnvironment environment;  // parameters are rounded to float32 here
    const Py_ssize_t end = PyList_GET_SIZE(segment.ptr());
    uint64_t bytes = 0;
    Py_ssize_t at = start;
    std::vector<py::object> tensors;
    for (; at < end && bytes < limit; ++at) {
        PyObject* const object = PyList_GET_ITEM(segment.ptr(), at);
        Entry* const entry = as_entry(object);
        const uint64_t nbytes = entry->nbytes;
        Values values{};
        uint64_t stream = 0;
        PyObject *const prototype = item(prototypes.ptr(), entry->dtype), *const dtype = item(dtypes.ptr(), entry->dtype);
        if (nbytes > largest || !is_none(entry->shadow) || entry->deferred || !prototype || !dtype ||
            !plain_fill(entry->recipe, values, stream))
            break;
        tensors.clear();
        bool views = false;
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(entry->refs); ++i) {
            py::object tensor = checked(PyObject_CallNoArgs(PyList_GET_ITEM(entry->refs, i)));
            if (tensor.is_none()) continue;
            PyObject* const found = known(by_id.ptr(), tensor.ptr());
            views = views || !found || region_of(found) != Py_None;
            tensors.push_back(std::move(tensor));
        }
        if (views) break;
        check(PyList_Append(given.ptr(), object));
        PyObject* const arguments[] = {prototype, entry->shape};
        const py::object memory = steal(PyObject_VectorcallMethod(names->new_empty, arguments, 2, nullptr));
        if (!memory) {  // the Python side tries again, and says what there is no memory for
            PyErr_Clear();
            break;
        }
        for (const py::object& tensor : tensors) check(PyObject_SetAttr(tensor.ptr(), names->data, memory.ptr()));
        values.dtype = make_dtype(PyLong_AsLong(dtype));
        values.seed = seed;
        void* const data = PyLong_AsVoidPtr(call_method(names->data_ptr, {memory.ptr()}).ptr());
        batch.append(data, values, stream, whole_tensor(nbytes / item_size(values.dtype)));
        bytes += nbytes;
    }
    return py::make_tuple(at, bytes, at - start);
}

// --- what Python sees -----------------------------------------------------------------------------------------------

template <class Function>
PyCFunction as_c_function(Function* function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef torch_function_def = {"__torch_function__", as_c_function(torch_function), METH_FASTCALL,
                                  nullptr};
PyMethodDef set_attribute_def = {"__setattr__", as_c_function(set_attribute), METH_FASTCALL, nullptr};
PyMethodDef get_attribute_def = {"__getattr__", get_attribute, METH_O, nullptr};
PyMethodDef initialise_module_def = {"__init__", as_c_function(initialise_module), METH_VARARGS | METH_KEYWORDS,
                                     nullptr};
PyMethodDef new_parameter_def = {"new_parameter", as_c_function(new_parameter), METH_VARARGS | METH_KEYWORDS,
                                 nullptr};
PyMethodDef record_def = {"record", as_c_function(record), METH_FASTCALL, nullptr};
PyMethodDef pending_shape_def = {"pending_shape", pending_shape, METH_O, nullptr};

py::object function(PyMethodDef& definition) { return checked(PyCFunction_New(&definition, nullptr)); }

py::object method(PyObject* type, PyMethodDef& definition) {
    return checked(PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type), &definition));
}

// connect(...) -> (Recorder.__torch_function__, {name: method} of torch.nn.Module, new_parameter)
py::tuple connect(const py::object& recorder_class, const py::object& entry_class, const py::object& thread,
                  const py::dict& handlers, const py::object& pass, const py::object& write,
                  const py::object& plain_class, const py::set& plain_types) {
    const auto keep = [](py::object object) { return object.release().ptr(); };
    const py::module_ torch = py::module_::import("torch"), nn = py::module_::import("torch.nn.modules.module");
    const py::object low = torch.attr("_C");
    state.thread = keep(thread);
    state.entry = keep(entry_class);
    state.handlers = keep(handlers);
    state.pass = keep(pass);
    state.write = keep(write);
    state.plain_class = keep(plain_class);
    state.plain_types = keep(plain_types);
    state.tensor = keep(torch.attr("Tensor"));
    state.parameter = keep(torch.attr("nn").attr("Parameter"));
    state.module = keep(torch.attr("nn").attr("Module"));
    state.empty = keep(torch.attr("empty"));
    state.function_modes = keep(low.attr("_len_torch_function_stack"));
    state.dispatch_modes = keep(low.attr("_len_torch_dispatch_stack"));
    state.inference_mode = keep(low.attr("is_inference_mode_enabled"));
    state.make_subclass = keep(torch.attr("Tensor").attr("_make_subclass"));
    state.parameter_new = keep(torch.attr("nn").attr("Parameter").attr("__new__"));
    const py::object made_by = py::handle(state.parameter_new).attr("__module__");
    if (!made_by.equal(py::str("torch.nn.parameter"))) state.parameter_new = nullptr;  // another library's
    state.module_setattr = keep(torch.attr("nn").attr("Module").attr("__setattr__"));
    state.module_getattr = keep(torch.attr("nn").attr("Module").attr("__getattr__"));
    state.module_init = keep(torch.attr("nn").attr("Module").attr("__init__"));
    state.fresh = fresh_attributes(torch.attr("nn").attr("Module"));
    state.parameter_hooks = keep(nn.attr("_global_parameter_registration_hooks"));
    state.module_hooks = keep(nn.attr("_global_module_registration_hooks"));
    state.classes = keep(py::dict());
    for (size_t n = 0; n < std::size(state.zero_strides); ++n) {
        py::tuple zeros(n);
        for (size_t d = 0; d < n; ++d) zeros[d] = 0;
        state.zero_strides[n] = keep(zeros);
    }
    py::dict of_modules;
    of_modules["__setattr__"] = method(state.module, set_attribute_def);
    of_modules["__getattr__"] = method(state.module, get_attribute_def);
    if (!state.fresh.empty()) of_modules["__init__"] = method(state.module, initialise_module_def);
    return py::make_tuple(method(recorder_class.ptr(), torch_function_def), of_modules, function(new_parameter_def));
}

// What a slot of a class can call only by name, looking it up in the dictionaries of the class and its bases each time.
bool called_by_name(PyObject* method) { return PyFunction_Check(method) || Py_IS_TYPE(method, &PyMethodDescr_Type); }

// Sets a method of a class as setattr does. Where one method that is called by name takes the place of another, no slot
// changes, and this is spared what setattr does then: a search through the slots of every subclass, 0.17 ms for
// __setattr__ or __getattr__ of torch.nn.Module.
void set_method(const py::type& type, const py::str& name, const py::object& method) {
#ifndef Py_GIL_DISABLED
    auto* const cls = reinterpret_cast<PyTypeObject*>(type.ptr());
#if PY_VERSION_HEX >= 0x030C0000
    const py::object dict = checked(PyType_GetDict(cls));
#else
    const auto dict = py::reinterpret_borrow<py::object>(cls->tp_dict);
#endif
    PyObject* const before = PyDict_GetItemWithError(dict.ptr(), name.ptr());
    if (!before && PyErr_Occurred()) throw py::error_already_set();
    if (before && called_by_name(before) && called_by_name(method.ptr()) &&
        !PyType_HasFeature(cls, Py_TPFLAGS_IMMUTABLETYPE) && Py_IS_TYPE(type.ptr(), &PyType_Type)) {
        check(PyDict_SetItem(dict.ptr(), name.ptr(), method.ptr()));
        PyType_Modified(cls);
        return;
    }
#endif
    check(PyObject_SetAttr(type.ptr(), name.ptr(), method.ptr()));
}

}  // namespace

void add_hot_path(py::module_& m) {
    names = new Names;
    m.add_object("Entry", checked(PyType_FromSpec(&entry_spec)));
    m.def("connect", &connect);
    m.def("settle", &settle);
    m.def("tally", &tally);
    m.def("waiting", &waiting);
    m.def("forget_classes", [] { PyDict_Clear(state.classes); });
    m.def("set_method", &set_method);
    m.add_object("record", function(record_def));
    m.add_object("pending_shape", function(pending_shape_def));
}

}  // namespace fastinit
