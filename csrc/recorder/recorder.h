// The fast path of fastinit.record: what runs for every tensor of a model, without a Python frame.
//
// Each function does the plain case alone. For anything else it leaves everything as it was and hands over to torch, or
// to the Python code of the same purpose, which handles every case, the plain one included: without the fast path
// (FASTINIT_FAST=0) every result is the same. Written against CPython's public C interface, since a call through
// pybind11 would cost about what is to be saved; torch is reached through its Python names, so that the module links
// against no particular version of it. The GIL is held throughout.
//
// State that both sides change lies in C structs, which Python sees as attributes of the base classes below: no
// attribute of a Python object is written by name here that Python code writes, too. The two exceptions are those that
// say what a placeholder stands for: its class must not add fields to Tensor's, since objects change their class.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>

#include "batch.h"

namespace fastinit::recorder {

namespace py = pybind11;

// --- objects ----------------------------------------------------------------------------------------------------------

// Bases of the Python classes of these names, which explain the fields. A field that is null reads as None.
struct Record {
    PyObject_HEAD
    PyObject *block, *shape, *dtype, *device, *recipe, *values, *memory, *owner, *tensors, *executed, *replaced;
    PyObject* weak;
    char recorded, deferred;
};

struct Block {
    PyObject_HEAD
    PyObject *device, *default_dtype, *records, *generator, *modules;
    // Of no meaning to Python: the weak reference to the module that was seen last, and what functions of torch.nn.init
    // have recorded, by what decides it.
    PyObject *last_seen, *initializations;
    Py_ssize_t dropped;
    char defers;  // its tensors may stay without memory when it has ended
};

struct Generator {
    PyObject_HEAD
    unsigned long long seed, streams;
};

struct Mode {
    PyObject_HEAD
    PyObject* block;
};

// What Python has connected, and what of torch is called. They live as long as the process.
#define FASTINIT_CONNECTED(X) \
    X(placeholder) X(record) X(write) X(current) X(lock) X(can_fill) X(dtypes) X(factories) X(initializers) \
    X(takes_over) X(passed) X(stand_for) X(swap_impl) X(mode) X(torch_function) \
    X(graph_of)
#define FASTINIT_OF_TORCH(X) \
    X(tensor) X(parameter) X(size) X(make) X(make_subclass) X(undispatched) X(enter_undispatched) X(refuse_address) X(empty) X(increment_version) X(modes_off) X(enter) X(exit) \
    X(function_modes) X(dispatch_modes) X(transform) X(inference_mode) X(grad_enabled) X(initial_seed) X(acquire) X(release) \
    X(backward_hooks) X(grad) X(grad_fn) X(is_leaf) X(post_hooks) X(requires_grad) \
    X(shape_getter) X(no_steps) X(zero) X(mode_at) X(pop_mode) X(push_mode) X(deterministic) X(init)
struct State {
#define X(name) PyObject* name;
    FASTINIT_CONNECTED(X)
    FASTINIT_OF_TORCH(X)
#undef X
    PyObject* turn;       // the generator whose block has torch's generators, or null
    bool in_use;          // whether the fast path is
    int functionalizing;  // how many threads functionalize what they do, and get functional tensors from factories
};
extern State state;

#define FASTINIT_NAMES(X) \
    X(_is_param) X(_record) X(_region) X(__class__) X(device) X(dtype) X(itemsize) X(tensor) X(generator) X(next_stream) X(detach) \
    X(requires_grad) X(requires_grad_) X(uniform_) X(normal_) X(fill_) X(zero_) X(shape) X(size) X(dim) X(numel) X(element_size) X(_use_count) X(data_ptr) X(needs_master) X(copy_values) X(_modules) X(_parameters) \
    X(calculate_gain) X(_calculate_correct_fan) X(_calculate_fan_in_and_fan_out) X(_no_grad_uniform_) X(_no_grad_normal_) X(_no_grad_fill_) X(_no_grad_zero_)
struct Names {
#define X(name) PyObject* const name = PyUnicode_InternFromString(#name);
    FASTINIT_NAMES(X)
#undef X
};
extern const Names* names;

// --- calls ------------------------------------------------------------------------------------------------------------

inline py::object steal(PyObject* object) { return py::reinterpret_steal<py::object>(object); }

inline py::object borrow(PyObject* object) { return py::reinterpret_borrow<py::object>(object); }

inline py::object checked(PyObject* result) {
    if (!result) throw py::error_already_set();
    return steal(result);
}

inline void check(int status) {
    if (status < 0) throw py::error_already_set();
}

inline bool is_none(PyObject* object) { return object == nullptr || object == Py_None; }

// Replaces an owned reference by a new one to the value.
inline void assign(PyObject*& field, PyObject* value) {
    PyObject* const before = field;
    Py_XINCREF(value);
    field = value;
    Py_XDECREF(before);
}

inline py::object call(PyObject* function, std::initializer_list<PyObject*> args = {}) {
    PyObject* buffer[6] = {nullptr};  // the first place is for the callee to use
    std::copy(args.begin(), args.end(), buffer + 1);
    return checked(PyObject_Vectorcall(function, buffer + 1, args.size() | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
}

inline py::object call_method(PyObject* name, std::initializer_list<PyObject*> self_and_args) {
    return checked(PyObject_VectorcallMethod(name, self_and_args.begin(), self_and_args.size(), nullptr));
}

inline bool truth(const py::object& value) {
    if (value.ptr() == Py_True || value.ptr() == Py_False) return value.ptr() == Py_True;
    const int status = PyObject_IsTrue(value.ptr());
    check(status);
    return status;
}

inline bool is_positive(const py::object& number) {
    const long value = PyLong_AsLong(number.ptr());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value > 0;
}

// The value under a key, borrowed; null if there is none.
inline PyObject* item(PyObject* dict, PyObject* key) {
    PyObject* const value = PyDict_GetItemWithError(dict, key);
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

// Runs a function that may throw as one that CPython calls.
template <class Result, class Function>
Result guarded(Result failed, Function&& function) {
    try {
        return function();
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return failed;
}

template <class Function>
PyObject* for_python(Function&& function) {
    return guarded<PyObject*>(nullptr, [&] { return function().release().ptr(); });
}

template <class Function>
PyCFunction as_c_function(Function* function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

// While it lives, torch tells neither modes nor subclasses what is called.
class ModesOff {
public:
    ModesOff() : guard_(call(state.modes_off)) { call(state.enter, {guard_.ptr()}); }
    ~ModesOff() {
        const py::error_scope error;  // one that is under way is not this one's to lose
        PyObject* const args[] = {guard_.ptr(), Py_None, Py_None, Py_None};
        Py_XDECREF(PyObject_Vectorcall(state.exit, args, 4, nullptr));
    }
    ModesOff(const ModesOff&) = delete;
    ModesOff& operator=(const ModesOff&) = delete;

private:
    py::object guard_;
};

// While it lives, torch does to placeholders what it does to tensors with memory. It ends with the guard of torch's.
class Undispatched {
public:
    Undispatched() : guard_(call(state.undispatched)) { call(state.enter_undispatched, {guard_.ptr()}); }

private:
    py::object guard_;
};

// The lock of all records: another thread may be in the middle of computing one, without the GIL.
class Locked {
public:
    Locked() { call(state.acquire); }
    ~Locked() {
        const py::error_scope error;
        Py_XDECREF(PyObject_CallNoArgs(state.release));
    }
    Locked(const Locked&) = delete;
    Locked& operator=(const Locked&) = delete;
};

inline bool is_placeholder(PyObject* object) {
    return reinterpret_cast<PyObject*>(Py_TYPE(object)) == state.placeholder;
}

inline Record* as_record(const py::object& object) { return reinterpret_cast<Record*>(object.ptr()); }

inline py::object attribute(PyObject* object, PyObject* name) { return checked(PyObject_GetAttr(object, name)); }

// An attribute of the instance itself, or nothing. Not by its dictionary, which Python makes when somebody asks for it.
inline py::object own_attribute(PyObject* object, PyObject* name) {
    PyObject* const value = PyObject_GenericGetAttr(object, name);
    if (!value) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
        PyErr_Clear();
    }
    return steal(value);
}

inline void set_attribute(PyObject* object, PyObject* name, PyObject* value) {
    check(PyObject_GenericSetAttr(object, name, value));
}

// What a tensor stands for; nothing, if it is no placeholder, or if another thread has made it real meanwhile.
struct Target {
    py::object record, region;

    explicit Target(PyObject* tensor) {
        if (!is_placeholder(tensor)) return;
        record = own_attribute(tensor, names->_record);
        region = own_attribute(tensor, names->_region);
    }
    bool whole() const { return record && region.is_none(); }
    Record* operator->() const { return as_record(record); }
};

// What a descriptor of torch's says of a tensor.
inline py::object get(PyObject* descriptor, PyObject* tensor) {
    return checked(Py_TYPE(descriptor)->tp_descr_get(descriptor, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor))));
}

// What a weak reference refers to, or None.
inline py::object alive(PyObject* ref) { return checked(PyObject_CallNoArgs(ref)); }

// The item size of a dtype that native fills reach, else 0; `code` gets the number that fills know it by.
inline size_t fillable(PyObject* dtype, Dtype& code) {
    PyObject* const found = item(state.dtypes, dtype);
    if (!found) return 0;
    code = make_dtype(PyLong_AsLong(found));
    return item_size(code);
}

uint64_t elements(PyObject* shape);
uint64_t nbytes(const Record* record);

// A tuple of a class that typing.NamedTuple has made, without the frame of its constructor. Its fields refer to nothing
// that may refer to it: the garbage collector, which looks at all that a block has made when it ends, need not know it.
py::object make_tuple_of(PyObject* kind, std::initializer_list<py::object> fields);

// The fill of a recipe that is one write of a whole tensor; false if it is not, or not so plain.
bool plain_fill(PyObject* recipe, Values& values, uint64_t& stream);

// What a record contains so far is about to be overwritten.
void set_aside(Record* record);

py::object new_placeholder(const py::object& record);
py::dict methods_of_placeholder();
py::object method_of_mode(PyObject* type);
py::object around_handle(const py::object& original);
py::object around_make_subclass(const py::object& wrapper);
py::object type_function();
py::object registration_hook();
void add_settling(py::module_& m);
void add_recorder(py::module_& m);

}  // namespace fastinit::recorder
