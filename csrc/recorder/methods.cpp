// Methods of placeholders, the mode's front, and the hook of registrations.
#include <cmath>
#include <vector>

#include "recorder/recorder.h"

namespace fastinit::recorder {
// A tensor of the placeholder class as one that stands for a record, or for a region of it.
py::object standing(py::object tensor, PyObject* record, PyObject* region) {
    set_attribute(tensor.ptr(), names->_record, record);
    set_attribute(tensor.ptr(), names->_region, region);
    const py::object ref = checked(PyWeakref_NewRef(tensor.ptr(), nullptr));
    check(PyList_Append(reinterpret_cast<Record*>(record)->tensors, ref.ptr()));
    return tensor;
}

// A new placeholder for the whole of a record: what fastinit.record.tensors.stand_for does; outside of inference mode.
py::object new_placeholder(const py::object& object) {
    Record* const record = as_record(object);
    // The options of the last call are those of this one, mostly.
    static PyObject *dtype = nullptr, *device = nullptr, *options = nullptr;
    if (record->dtype != dtype || record->device != device) {
        const py::object fresh = py::dict();
        check(PyDict_SetItem(fresh.ptr(), names->dtype, record->dtype));
        check(PyDict_SetItem(fresh.ptr(), names->device, record->device));
        assign(dtype, record->dtype);
        assign(device, record->device);
        assign(options, fresh.ptr());
    }
    const py::object args = checked(PyTuple_Pack(2, state.placeholder, record->shape));
    py::object tensor = checked(PyObject_Call(state.make, args.ptr(), borrow(options).ptr()));
    call(state.refuse_address, {tensor.ptr()});
    return standing(std::move(tensor), object.ptr(), Py_None);
}

namespace {

// --- placeholders -----------------------------------------------------------------------------------------------------

// The sizes of a tensor as torch.Size, or null.
py::object size_of(const Target& target) {
    if (!target.record) return {};
    PyObject* const sizes = target.whole() ? target->shape : PyTuple_GET_ITEM(target.region.ptr(), 1);
    const Py_ssize_t dims = PyTuple_GET_SIZE(sizes);
    auto* const type = reinterpret_cast<PyTypeObject*>(state.size);
    py::object size = checked(type->tp_alloc(type, dims));  // a tuple that checks its items, which these need not
    for (Py_ssize_t d = 0; d < dims; ++d) {
        PyObject* const value = PyTuple_GET_ITEM(sizes, d);
        Py_INCREF(value);
        PyTuple_SET_ITEM(size.ptr(), d, value);
    }
    return size;
}

py::object stand_for(const py::object& record) {
    return truth(call(state.inference_mode)) ? call(state.stand_for, {record.ptr()}) : new_placeholder(record);
}

// What fastinit.record.tensors.alias_of does; null in inference mode, or if a transform of functions is to see it.
py::object alias_of(PyObject* tensor, const Target& target, PyObject* requires_grad) {
    if (truth(call(state.inference_mode)) || !call(state.transform).is_none()) return {};
    py::object alias;
    {
        const Undispatched below;
        alias = call(state.make_subclass, {state.placeholder, tensor, requires_grad});
    }
    return standing(std::move(alias), target.record.ptr(), target.region.ptr());
}

// torch's own method of a name.
py::object by_torch(PyObject* name, PyObject* self, PyObject* const* given = nullptr, Py_ssize_t count = 0,
                    PyObject* kwnames = nullptr) {
    std::vector<PyObject*> all{self};
    all.insert(all.end(), given, given + count + (kwnames ? PyTuple_GET_SIZE(kwnames) : 0));
    return checked(PyObject_Vectorcall(attribute(state.tensor, name).ptr(), all.data(), count + 1, kwnames));
}

PyObject* grad_fn(PyObject* self, void*) {
    return for_python([&] {
        py::object node;
        {
            const ModesOff off;
            node = get(state.grad_fn, self);
        }
        return node.is_none() ? node : call(state.graph_of, {self});
    });
}

PyObject* shape(PyObject* self, void*) {
    return for_python([&] {
        py::object size = size_of(Target(self));
        return size ? size : attribute(self, names->shape);
    });
}

// size(dim=None)
PyObject* size(PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* kwnames) {
    return for_python([&]() -> py::object {
        const bool all = count == 0 || (count == 1 && given[0] == Py_None);
        if (kwnames || !(all || (count == 1 && PyLong_CheckExact(given[0]))))
            return by_torch(names->size, self, given, count, kwnames);
        const py::object sizes = size_of(Target(self));
        if (!sizes) return by_torch(names->size, self, given, count);
        if (all) return sizes;
        const Py_ssize_t dims = PyTuple_GET_SIZE(sizes.ptr());
        int overflow;
        long long dim = PyLong_AsLongLongAndOverflow(given[0], &overflow);
        if (overflow || dim < -dims || dim >= dims) return by_torch(names->size, self, given, count);
        return borrow(PyTuple_GET_ITEM(sizes.ptr(), dim < 0 ? dim + dims : dim));
    });
}

PyObject* dim(PyObject* self, PyObject*) {
    return for_python([&]() -> py::object {
        const Target target(self);
        if (!target.record) return by_torch(names->dim, self);
        PyObject* const sizes = target.whole() ? target->shape : PyTuple_GET_ITEM(target.region.ptr(), 1);
        return checked(PyLong_FromSsize_t(PyTuple_GET_SIZE(sizes)));
    });
}

PyObject* detach(PyObject* self, PyObject*) {
    return for_python([&]() -> py::object {
        const Locked locked;
        if (const Target target(self); target.record) {
            if (py::object alias = alias_of(self, target, Py_False)) return alias;
        }
        return by_torch(names->detach, self);
    });
}

// requires_grad_(requires_grad=True): torch's, without the way through the modes.
PyObject* requires_grad_(PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* kwnames) {
    return for_python([&] {
        const ModesOff off;
        return by_torch(names->requires_grad_, self, given, count, kwnames);
    });
}

// --- fills ------------------------------------------------------------------------------------------------------------

// The stream of the next fill, and its key or None.
void next_stream(PyObject* object, py::object& stream, py::object& key) {
    if (object == state.turn) {
        auto* const generator = reinterpret_cast<Generator*>(object);
        const py::object seed = call(state.initial_seed);
        if (PyLong_AsUnsignedLongLong(seed.ptr()) == generator->seed && !PyErr_Occurred()) {
            stream = checked(PyLong_FromUnsignedLongLong(generator->streams++));
            key = py::none();
            return;
        }
        PyErr_Clear();
    }
    const py::object pair = call_method(names->next_stream, {object});
    stream = borrow(PyTuple_GET_ITEM(pair.ptr(), 0));
    key = borrow(PyTuple_GET_ITEM(pair.ptr(), 1));
}

// Write(kind, parameters, ...) for a whole tensor.
py::object make_write(PyObject* generator, Kind kind, const py::object& parameters) {
    py::object stream = borrow(state.zero), key = py::none();
    if (kind != Kind::constant) next_stream(generator, stream, key);
    return make_tuple_of(state.write, {checked(PyLong_FromLong(static_cast<long>(kind))), parameters, stream,
                                       borrow(state.no_steps), py::none(), key});
}

py::object recipe_of(py::object write) {
    py::object recipe = checked(PyTuple_New(1));
    PyTuple_SET_ITEM(recipe.ptr(), 0, write.release().ptr());
    PyObject_GC_UnTrack(recipe.ptr());  // as in make_tuple_of
    return recipe;
}

// Whether native fills reach a record's memory.
bool is_native(const Record* record) {
    static PyObject *dtype = nullptr, *device = nullptr;
    static bool answer = false;
    if (record->dtype != dtype || record->device != device) {
        answer = truth(call(state.can_fill, {record->dtype, record->device}));
        assign(dtype, record->dtype);
        assign(device, record->device);
    }
    return answer;
}

// The mode that is asked first, or null.
py::object top_mode() {
    const py::object modes = call(state.function_modes);
    const long count = PyLong_AsLong(modes.ptr());
    if (count == 0) return {};
    const py::object top = checked(PyLong_FromLong(count - 1));
    return call(state.mode_at, {top.ptr()});
}

bool is_mode(const py::object& mode) { return reinterpret_cast<PyObject*>(Py_TYPE(mode.ptr())) == state.mode; }

// Whether nobody else's mode, nor a transform of functions, would see a call.
bool is_mine() {
    const py::object mode = top_mode();
    return (!mode || is_mode(mode)) && call(state.transform).is_none();
}

// Records a fill of the whole of a pending tensor; false, and nothing done, if it is not so plain.
bool record_fill(PyObject* self, Kind kind, const py::object& parameters) {
    if (!is_mine()) return false;
    const Locked locked;
    const Target target(self);
    if (!target.whole() || is_none(target->recipe) || !is_native(target.operator->())) return false;
    auto* const block = reinterpret_cast<Block*>(target->block);
    const py::object recipe = recipe_of(make_write(block->generator, kind, parameters));
    block->dropped += PyTuple_GET_SIZE(target->recipe);
    set_aside(target.operator->());
    assign(target->recipe, recipe.ptr());
    assign(target->values, nullptr);
    target->recorded = 1;
    const py::object tensors = checked(PyTuple_Pack(1, self));
    call(state.increment_version, {tensors.ptr()});
    return true;
}

bool fill(PyObject* self, Kind kind, std::initializer_list<double> numbers) {
    if (truth(call(state.grad_enabled))) {
        const ModesOff off;
        if (truth(get(state.requires_grad, self))) return false;  // torch's to refuse
    }
    const py::object parameters = checked(PyTuple_New(static_cast<Py_ssize_t>(numbers.size())));
    Py_ssize_t at = 0;
    for (const double number : numbers)
        PyTuple_SET_ITEM(parameters.ptr(), at++, checked(PyFloat_FromDouble(number)).release().ptr());
    return record_fill(self, kind, parameters);
}

bool is_number(PyObject* object, double& number) {
    if (!PyFloat_CheckExact(object) && !PyLong_CheckExact(object)) return false;
    number = PyFloat_AsDouble(object);
    if (number == -1.0 && PyErr_Occurred()) {
        PyErr_Clear();
        return false;
    }
    return std::isfinite(number);
}

// What every dtype of native fills holds: torch may refuse larger numbers.
constexpr double largest = 65504.0;

// Whether there are no keyword arguments but generator=None, which torch.nn.init passes.
bool no_options(PyObject* const* values, PyObject* kwnames) {
    if (!kwnames || PyTuple_GET_SIZE(kwnames) == 0) return true;
    return PyTuple_GET_SIZE(kwnames) == 1 && values[0] == Py_None &&
           PyUnicode_Compare(PyTuple_GET_ITEM(kwnames, 0), names->generator) == 0;
}

// The two numbers that are given, or the defaults.
bool pair(PyObject* const* given, Py_ssize_t count, PyObject* kwnames, double& a, double& b) {
    return no_options(given + count, kwnames) &&
           (count == 0 || (count == 2 && is_number(given[0], a) && is_number(given[1], b)));
}

PyObject* uniform_(PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* kwnames) {
    return for_python([&] {
        double low = 0.0, high = 1.0;
        const bool plain = pair(given, count, kwnames, low, high) && low <= high && std::abs(low) <= largest &&
                           std::abs(high) <= largest && high - low <= largest;
        if (plain && fill(self, Kind::uniform, {low, high})) return borrow(self);
        return by_torch(names->uniform_, self, given, count, kwnames);
    });
}

PyObject* normal_(PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* kwnames) {
    return for_python([&] {
        double mean = 0.0, std = 1.0;
        const bool plain = pair(given, count, kwnames, mean, std) && std >= 0;
        if (plain && fill(self, Kind::normal, {mean, std})) return borrow(self);
        return by_torch(names->normal_, self, given, count, kwnames);
    });
}

PyObject* fill_(PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* kwnames) {
    return for_python([&] {
        double value;
        const bool plain = count == 1 && !kwnames && is_number(given[0], value) && std::abs(value) <= largest;
        if (plain && fill(self, Kind::constant, {value})) return borrow(self);
        return by_torch(names->fill_, self, given, count, kwnames);
    });
}

PyObject* zero_(PyObject* self, PyObject*) {
    return for_python([&] { return fill(self, Kind::constant, {0.0}) ? borrow(self) : by_torch(names->zero_, self); });
}

// --- the mode ---------------------------------------------------------------------------------------------------------

// The block of the running thread or coroutine, or None.
py::object current() {
    PyObject* block = nullptr;
    check(PyContextVar_Get(state.current, Py_None, &block));
    return steal(block);
}

// Whether a block is that of the running thread or coroutine, and torch's generators are in its state.
bool has_turn(PyObject* block) {
    return current().ptr() == block && reinterpret_cast<Block*>(block)->generator == state.turn;
}

// While it lives, torch asks all modes but the topmost.
class ModePopped {
public:
    ModePopped() : mode_(call(state.pop_mode)) {}
    ~ModePopped() {
        const py::error_scope error;
        Py_XDECREF(PyObject_CallOneArg(state.push_mode, mode_.ptr()));
    }
    ModePopped(const ModePopped&) = delete;
    ModePopped& operator=(const ModePopped&) = delete;

private:
    py::object mode_;
};

// The sizes in the arguments of a factory as a tuple; null if they are not plain positive integers.
py::object plain_size(PyObject* args) {
    PyObject* size = args;
    if (PyTuple_GET_SIZE(args) == 1) {
        PyObject* const only = PyTuple_GET_ITEM(args, 0);
        if (PyTuple_Check(only) || PyList_CheckExact(only)) size = only;
    }
    if (!PyTuple_CheckExact(size) && !PyList_CheckExact(size) && !Py_IS_TYPE(size, (PyTypeObject*)state.size))
        return {};
    const py::object tuple = PyTuple_CheckExact(size) ? borrow(size) : checked(PySequence_Tuple(size));
    const Py_ssize_t dims = PyTuple_GET_SIZE(tuple.ptr());
    uint64_t elements = 1;
    for (Py_ssize_t d = 0; d < dims; ++d) {
        PyObject* const value = PyTuple_GET_ITEM(tuple.ptr(), d);
        if (!PyLong_CheckExact(value)) return {};
        int overflow;
        const long long n = PyLong_AsLongLongAndOverflow(value, &overflow);
        if (n <= 0 || overflow || static_cast<uint64_t>(n) > (uint64_t{1} << 40) / elements) return {};
        elements *= static_cast<uint64_t>(n);
    }
    return tuple;
}

// What a factory that fills, or fills not, returns in a block; null if the call is not plain.
py::object create(Block* block, PyObject* filling, PyObject* args, PyObject* kwargs) {
    PyObject *dtype = block->default_dtype, *device = Py_None;
    if (kwargs) {
        PyObject *key, *value;
        for (Py_ssize_t at = 0; PyDict_Next(kwargs, &at, &key, &value);) {
            if (PyUnicode_Compare(key, names->device) == 0) {
                device = value;
            } else if (PyUnicode_Compare(key, names->dtype)) {
                return {};
            } else if (value != Py_None) {
                dtype = value;
            }
        }
    }
    Dtype code;
    if (!fillable(dtype, code) || state.functionalizing || is_positive(call(state.dispatch_modes))) return {};
    if (!call(state.transform).is_none()) return {};
    if (device == Py_None) {
        if (is_positive(call(state.function_modes))) return {};  // a torch.device context may be among them
    } else if (device != block->device) {
        if (Py_TYPE(device) != Py_TYPE(block->device)) return {};
        const int same = PyObject_RichCompareBool(device, block->device, Py_EQ);
        check(same);
        if (!same) return {};
    }
    const py::object size = plain_size(args);
    if (!size || (filling == Py_None && truth(call(state.deterministic)))) return {};
    py::object recipe = borrow(state.no_steps);
    if (filling != Py_None) {
        const long kind = PyLong_AsLong(PyTuple_GET_ITEM(filling, 0));
        recipe = recipe_of(make_write(block->generator, static_cast<Kind>(kind), borrow(PyTuple_GET_ITEM(filling, 1))));
    }
    auto* const type = reinterpret_cast<PyTypeObject*>(state.record);
    const py::object object = checked(type->tp_alloc(type, 0));
    Record* const record = as_record(object);
    assign(record->block, reinterpret_cast<PyObject*>(block));
    assign(record->shape, size.ptr());
    assign(record->dtype, dtype);
    assign(record->device, block->device);
    assign(record->recipe, recipe.ptr());
    record->tensors = checked(PyList_New(0)).release().ptr();
    record->recorded = 1;
    const py::object ref = checked(PyWeakref_NewRef(object.ptr(), nullptr));
    check(PyList_Append(block->records, ref.ptr()));
    return stand_for(object);
}

bool contains(PyObject* set, PyObject* value) {
    const int status = PySet_Contains(set, value);
    check(status);
    return status;
}

// Whether a call is a function of torch.nn.init for a placeholder. They are called with `tensor` by name, and a library
// may have replaced the function itself for a while.
bool initializes(PyObject* func, PyObject* args, PyObject* kwargs) {
    PyObject* tensor = kwargs ? item(kwargs, names->tensor) : nullptr;
    if (tensor ? !PyFunction_Check(func) : !contains(state.initializers, func)) return false;
    if (PyTuple_GET_SIZE(args)) tensor = PyTuple_GET_ITEM(args, 0);
    return tensor && is_placeholder(tensor);
}

// Mode.__torch_function__(func, types, args=(), kwargs=None)
PyObject* torch_function(PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* kwnames) {
    return for_python([&]() -> py::object {
        PyObject* const in_block = reinterpret_cast<Mode*>(self)->block;
        if (!kwnames && count >= 3 && count <= 4 && PyTuple_CheckExact(given[2]) && current().ptr() == in_block) {
            PyObject *const func = given[0], *const args = given[2];
            PyObject* const kwargs = count == 4 && PyDict_CheckExact(given[3]) ? given[3] : nullptr;
            if (count == 3 || kwargs || given[3] == Py_None) {
                auto* const block = reinterpret_cast<Block*>(in_block);
                if (Py_TYPE(func) == Py_TYPE(state.shape_getter)) {
                    if (!contains(state.takes_over, func)) return checked(PyObject_Call(func, args, kwargs));
                } else if (PyObject* const filling = item(state.factories, func)) {
                    if (py::object tensor = create(block, filling, args, kwargs)) return tensor;
                } else if (block->generator == state.turn &&
                           (contains(state.passed, func) || initializes(func, args, kwargs))) {
                    return checked(PyObject_Call(func, args, kwargs));
                }
            }
        }
        std::vector<PyObject*> all{self};
        all.insert(all.end(), given, given + count + (kwnames ? PyTuple_GET_SIZE(kwnames) : 0));
        return checked(PyObject_Vectorcall(state.torch_function, all.data(), count + 1, kwnames));
    });
}

// A function of torch.nn.init itself that is called with `tensor` by name, and then values. What it records follows
// from these and from the tensor's shape and dtype: a layer that is like an earlier one is filled without asking in
// Python again.
class Initialization {
public:
    Initialization(Block* block, PyObject* function, PyObject* const* given, PyObject* kwnames)
        : block_(block), tensor_(given[0]) {
        const Target target(tensor_);
        if (!target.whole() || is_none(target->recipe) || PyFunction_GetGlobals(function) != state.init) return;
        const Py_ssize_t values = PyTuple_GET_SIZE(kwnames) - 1;
        for (Py_ssize_t i = 1; i <= values; ++i)
            if (!is_plain(given[i])) return;
        // What they call of their module, which others may have replaced since.
        PyObject* const helpers[] = {
            names->calculate_gain,    names->_calculate_correct_fan, names->_calculate_fan_in_and_fan_out,
            names->_no_grad_uniform_, names->_no_grad_normal_,       names->_no_grad_fill_,
            names->_no_grad_zero_};
        key_ = checked(PyTuple_New(4 + static_cast<Py_ssize_t>(std::size(helpers)) + values));
        Py_ssize_t at = 0;
        const auto add = [&](PyObject* part) { PyTuple_SET_ITEM(key_.ptr(), at++, borrow(part).release().ptr()); };
        for (PyObject* const part : {function, kwnames, target->shape, target->dtype}) add(part);
        for (PyObject* const name : helpers) {
            PyObject* const helper = item(state.init, name);
            add(helper ? helper : Py_None);
        }
        for (Py_ssize_t i = 1; i <= values; ++i) add(given[i]);
        recipe_ = borrow(target->recipe);
        dropped_ = block->dropped + PyTuple_GET_SIZE(target->recipe);
        streams_ = generator()->streams;
    }
    // Whether it was known what is to be recorded, and is.
    bool repeat() const {
        PyObject* const known = key_ && block_->initializations ? item(block_->initializations, key_.ptr()) : nullptr;
        return known && record_fill(tensor_, static_cast<Kind>(PyLong_AsLong(PyTuple_GET_ITEM(known, 0))),
                                    borrow(PyTuple_GET_ITEM(known, 1)));
    }
    // Remembers what has been recorded, if that is one fill and all that happened.
    void remember() const {
        const Target target(tensor_);
        if (!key_ || !target.whole() || is_none(target->recipe) || target->recipe == recipe_.ptr()) return;
        Values values;
        uint64_t stream;
        if (!plain_fill(target->recipe, values, stream) || block_->dropped != dropped_) return;
        PyObject* const write = PyTuple_GET_ITEM(target->recipe, 0);
        const bool random = PyLong_AsLong(PyTuple_GET_ITEM(write, 0)) != static_cast<long>(Kind::constant);
        if (PyTuple_GET_ITEM(write, 5) != Py_None || generator()->streams != streams_ + random) return;
        if (!block_->initializations) block_->initializations = checked(PyDict_New()).release().ptr();
        check(PyDict_SetItem(block_->initializations, key_.ptr(), write));
    }

private:
    // Nothing that is mutable; nor what is equal to something else: a zero with a sign, True, which torch takes for no
    // number.
    static bool is_plain(PyObject* value) {
        if (PyFloat_CheckExact(value))
            return PyFloat_AS_DOUBLE(value) != 0.0 || !std::signbit(PyFloat_AS_DOUBLE(value));
        return value == Py_None || PyLong_CheckExact(value) || PyUnicode_CheckExact(value);
    }
    Generator* generator() const { return reinterpret_cast<Generator*>(block_->generator); }

    Block* block_;
    PyObject* tensor_;
    py::object key_, recipe_;
    Py_ssize_t dropped_ = 0;
    unsigned long long streams_ = 0;
};

// torch.overrides.handle_torch_function(function, tensors, *args, **kwargs), with torch's own one as self: asks the
// mode, as torch.nn.init does in each of its fills. For a placeholder that is told no more than to call the function.
PyObject* handle_torch_function(PyObject* original, PyObject* const* given, Py_ssize_t count, PyObject* kwnames) {
    return for_python([&] {
        if (count == 2 && kwnames && PyTuple_GET_ITEM(kwnames, 0) == names->tensor && is_placeholder(given[2]) &&
            PyFunction_Check(given[0])) {
            const py::object mode = top_mode();
            if (mode && is_mode(mode) && has_turn(reinterpret_cast<Mode*>(mode.ptr())->block)) {
                const ModePopped popped;
                const Initialization made(reinterpret_cast<Block*>(reinterpret_cast<Mode*>(mode.ptr())->block),
                                          given[0], given + 2, kwnames);
                if (made.repeat()) return borrow(given[2]);
                py::object result = checked(PyObject_Vectorcall(given[0], given + 2, 0, kwnames));
                if (result.ptr() == given[2]) made.remember();
                return result;
            }
        }
        return checked(PyObject_Vectorcall(original, given, count, kwnames));
    });
}

// torch.Tensor._make_subclass(cls, data, requires_grad=False), with the wrapper in fastinit.record.guest as self.
PyObject* make_subclass(PyObject* wrapper, PyObject* const* given, Py_ssize_t count, PyObject* kwnames) {
    return for_python([&] {
        if (state.in_use && !kwnames && count == 3 && given[0] == state.parameter && PyBool_Check(given[2]) &&
            is_placeholder(given[1])) {
            const Locked locked;
            if (const Target target(given[1]); target.record) {
                if (const py::object parameter = alias_of(given[1], target, given[2])) {
                    set_attribute(parameter.ptr(), names->_is_param, Py_True);
                    return parameter;
                }
            }
        }
        return checked(PyObject_Vectorcall(wrapper, given, count, kwnames));
    });
}

// What `type` is in torch.nn.parameter: a placeholder is a tensor there; see fastinit.record.guest.
PyObject* type_of(PyObject*, PyObject* value) {
    PyObject* const type = is_placeholder(value) ? state.tensor : reinterpret_cast<PyObject*>(Py_TYPE(value));
    Py_INCREF(type);
    return type;
}

// --- modules ----------------------------------------------------------------------------------------------------------

// The hook of registrations: (module, name, value). The block keeps the modules in the order of their first one.
PyObject* registered(PyObject*, PyObject* const* given, Py_ssize_t count) {
    return for_python([&]() -> py::object {
        if (count != 3) {
            PyErr_SetString(PyExc_TypeError, "a hook of registrations takes module, name and value");
            throw py::error_already_set();
        }
        PyObject *const module = given[0], *const name = given[1], *const value = given[2];
        const py::object object = current();
        if (object.is_none()) return py::none();
        auto* const block = reinterpret_cast<Block*>(object.ptr());
        const py::object ref = checked(PyWeakref_NewRef(module, nullptr));  // the same one as long as that one lives
        if (block->last_seen != ref.ptr()) {
            const py::object key = checked(PyLong_FromVoidPtr(module));
            PyObject* const known = item(block->modules, key.ptr());
            if (known != ref.ptr()) {
                // An id that a dead module had must not put this one in its place in the order.
                if (known) check(PyDict_DelItem(block->modules, key.ptr()));
                check(PyDict_SetItem(block->modules, key.ptr(), ref.ptr()));
            }
            assign(block->last_seen, ref.ptr());
        }
        if (const Target target(value); target.record) {
            const py::object owner = checked(PyTuple_Pack(2, reinterpret_cast<PyObject*>(Py_TYPE(module)), name));
            assign(target->owner, owner.ptr());
        }
        return py::none();
    });
}

PyMethodDef methods[] = {
    {"detach", detach, METH_NOARGS, nullptr},
    {"dim", dim, METH_NOARGS, nullptr},
    {"fill_", as_c_function(fill_), METH_FASTCALL | METH_KEYWORDS, nullptr},
    {"normal_", as_c_function(normal_), METH_FASTCALL | METH_KEYWORDS, nullptr},
    {"requires_grad_", as_c_function(requires_grad_), METH_FASTCALL | METH_KEYWORDS, nullptr},
    {"size", as_c_function(size), METH_FASTCALL | METH_KEYWORDS, nullptr},
    {"uniform_", as_c_function(uniform_), METH_FASTCALL | METH_KEYWORDS, nullptr},
    {"zero_", zero_, METH_NOARGS, nullptr},
};
PyGetSetDef getters[] = {
    {"grad_fn", grad_fn, nullptr, nullptr, nullptr},
    {"shape", shape, nullptr, nullptr, nullptr},
};
PyMethodDef torch_function_def = {"__torch_function__", as_c_function(torch_function), METH_FASTCALL | METH_KEYWORDS,
                                  nullptr};
PyMethodDef handle_def = {"handle_torch_function", as_c_function(handle_torch_function), METH_FASTCALL | METH_KEYWORDS,
                          nullptr};
PyMethodDef make_subclass_def = {"_make_subclass", as_c_function(make_subclass), METH_FASTCALL | METH_KEYWORDS,
                                 nullptr};
PyMethodDef type_of_def = {"type", type_of, METH_O, nullptr};
PyMethodDef registered_def = {"registered", as_c_function(registered), METH_FASTCALL, nullptr};

}  // namespace

py::dict methods_of_placeholder() {
    auto* const type = reinterpret_cast<PyTypeObject*>(state.placeholder);
    py::dict found;
    for (PyMethodDef& each : methods) found[each.ml_name] = checked(PyDescr_NewMethod(type, &each));
    for (PyGetSetDef& each : getters) found[each.name] = checked(PyDescr_NewGetSet(type, &each));
    return found;
}

py::object method_of_mode(PyObject* type) {
    return checked(PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type), &torch_function_def));
}

// torch.overrides.handle_torch_function for the time of a block.
py::object around_handle(const py::object& original) { return checked(PyCFunction_New(&handle_def, original.ptr())); }

// torch.Tensor._make_subclass, around its wrapper.
py::object around_make_subclass(const py::object& wrapper) {
    return checked(PyCFunction_New(&make_subclass_def, wrapper.ptr()));
}

py::object type_function() { return checked(PyCFunction_New(&type_of_def, nullptr)); }

py::object registration_hook() { return checked(PyCFunction_New(&registered_def, nullptr)); }

}  // namespace fastinit::recorder
