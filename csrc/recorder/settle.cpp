// How placeholders become real at the end of a block: all of the plain ones in a few loops.
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "cpu/float_environment.h"
#include "recorder/recorder.h"

namespace fastinit::recorder {
namespace {

// The placeholder that stands for a record, or null; `others` tells whether there are more.
py::object placeholder_of(const py::object& record, bool& others) {
    py::object found;
    others = false;
    PyObject* const tensors = as_record(record)->tensors;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors); ++i) {
        py::object tensor = alive(PyList_GET_ITEM(tensors, i));
        if (tensor.ptr() == found.ptr() || !is_placeholder(tensor.ptr())) continue;
        if (own_attribute(tensor.ptr(), names->_record).ptr() != record.ptr()) continue;
        others = others || found;
        found = std::move(tensor);
    }
    return found;
}

// waiting(block) -> the records that placeholders still stand for, in the order of their creation; dead ones go.
py::list waiting(const py::object& object) {
    auto* const block = reinterpret_cast<Block*>(object.ptr());
    py::list waiting, refs;
    const py::object all = borrow(block->records);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(all.ptr()); ++i) {
        PyObject* const ref = PyList_GET_ITEM(all.ptr(), i);
        const py::object record = alive(ref);
        if (record.is_none()) continue;
        check(PyList_Append(refs.ptr(), ref));
        bool others;
        if (placeholder_of(record, others)) check(PyList_Append(waiting.ptr(), record.ptr()));
    }
    assign(block->records, refs.ptr());
    return waiting;
}

// give_memory(segment, start, given, batch, seed, largest, limit):
// Gives the records of a segment, all of one device, their memory, beginning with number start, and adds their fills to
// a batch or copies their values, until one is not plain or larger than `largest` bytes, or fills of `limit` bytes are
// reached. Returns the number of the next record, and how many bytes and fills there were; `given` gets each record,
// and behind it its memory.
py::tuple give_memory(const py::list& segment, Py_ssize_t start, const py::list& given, Batch& batch, uint64_t seed,
                      uint64_t largest, uint64_t limit) {
    const FloatEnvironment environment;  // parameters are rounded to float32 here
    uint64_t bytes = 0, fills = 0;
    Py_ssize_t at = start;
    // With sizes one by one, its arguments take torch half the time of those of empty.
    std::unordered_map<PyObject*, py::object> new_empty;
    const bool usual = !is_positive(call(state.dispatch_modes)) && !truth(call(state.inference_mode));
    for (; usual && at < PyList_GET_SIZE(segment.ptr()) && bytes < limit; ++at) {
        PyObject* const object = PyList_GET_ITEM(segment.ptr(), at);
        const auto* const record = reinterpret_cast<Record*>(object);
        Values values{};
        values.seed = seed;
        uint64_t stream = 0;
        const bool computed = !is_none(record->values);
        if (record->deferred || !is_none(record->memory)) break;
        if (computed ? !truth(attribute(object, names->needs_master))
                     : !fillable(record->dtype, values.dtype) || !plain_fill(record->recipe, values, stream))
            break;
        const uint64_t size = nbytes(record);
        if (size == 0 || size > largest) break;
        py::object& make = new_empty[record->dtype];
        if (!make)
            make = borrow(state.empty)(0, py::arg("dtype") = borrow(record->dtype),
                                       py::arg("device") = borrow(record->device))
                       .attr("new_empty");
        const py::object memory =
            steal(PyTuple_GET_SIZE(record->shape) ? PyObject_CallObject(make.ptr(), record->shape)
                                                  : PyObject_CallOneArg(make.ptr(), record->shape));
        if (!memory) {  // the Python side tries again, and says what there is no memory for
            PyErr_Clear();
            break;
        }
        if (computed) {
            call_method(names->copy_values, {object, memory.ptr()});
        } else {
            void* const data = PyLong_AsVoidPtr(call_method(names->data_ptr, {memory.ptr()}).ptr());
            batch.append(data, values, stream, whole_tensor(elements(record->shape)));
            bytes += size;
            ++fills;
        }
        check(PyList_Append(given.ptr(), object));
        check(PyList_Append(given.ptr(), memory.ptr()));
    }
    return py::make_tuple(at, bytes, fills);
}

// Lets the only placeholder of a record have its memory; false, and nothing done, if a graph has saved it, or autograd
// knows more of it than that it requires a gradient. What fastinit.record.tensors.swap_in does.
bool swap_plain(const py::object& record, const py::object& tensor, const py::object& memory) {
    const Target target(tensor.ptr());
    if (!target.whole()) return false;
    if (PyLong_AsLong(call_method(names->_use_count, {tensor.ptr()}).ptr()) > 1) return false;
    const bool requires_grad = truth(get(state.requires_grad, tensor.ptr()));
    if (requires_grad) {
        if (!truth(get(state.is_leaf, tensor.ptr()))) return false;
        for (PyObject* const descriptor : {state.backward_hooks, state.post_hooks, state.grad})
            if (!get(descriptor, tensor.ptr()).is_none()) return false;
        check(Py_TYPE(state.requires_grad)->tp_descr_set(state.requires_grad, memory.ptr(), Py_True));
    }
    const bool is_parameter = truth(own_attribute(tensor.ptr(), names->_is_param));
    PyObject* const type = is_parameter ? state.parameter : state.tensor;
    set_attribute(tensor.ptr(), names->_record, nullptr);
    set_attribute(tensor.ptr(), names->_region, nullptr);
    if (is_parameter) set_attribute(tensor.ptr(), names->_is_param, nullptr);
    check(PyObject_SetAttr(tensor.ptr(), names->__class__, type));  // first, since torch looks longer at a subclass
    call(state.swap_impl, {tensor.ptr(), memory.ptr()});
    assign(as_record(record)->memory, tensor.ptr());
    return true;
}

// swap_in(given) -> the records of which placeholders are left, because they are not plain.
// Lets the placeholders of records have the memory that give_memory has made for them: nobody else knows those objects,
// so that they may become the placeholders' own. From here on nothing fails.
py::list swap_in(const py::list& given) {
    py::list left;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(given.ptr()); i += 2) {
        const py::object record = borrow(PyList_GET_ITEM(given.ptr(), i));
        const py::object memory = borrow(PyList_GET_ITEM(given.ptr(), i + 1));
        assign(as_record(record)->memory, memory.ptr());
        assign(as_record(record)->recipe, nullptr);
        assign(as_record(record)->values, nullptr);
        bool others;
        const py::object tensor = placeholder_of(record, others);
        if (tensor && (others || !swap_plain(record, tensor, memory))) check(PyList_Append(left.ptr(), record.ptr()));
    }
    return left;
}

// tally(block) -> the number of elements and the bytes of the parameters of the modules that a block has seen, and of
// those below them, each counted once.
py::tuple tally(const py::object& block) {
    uint64_t count = 0, bytes = 0;
    std::unordered_set<PyObject*> seen;
    std::vector<py::object> modules;
    const auto each = [&](const py::object& dict, auto&& found) {
        const auto look = [&](PyObject* value) {
            if (value != Py_None && seen.insert(value).second) found(value);
        };
        PyObject *key, *value;
        if (PyDict_Check(dict.ptr())) {
            for (Py_ssize_t at = 0; PyDict_Next(dict.ptr(), &at, &key, &value);) look(value);
        } else {  // TorchScript's
            for (const py::handle each : dict.attr("values")()) look(each.ptr());
        }
    };
    const auto add = [&](PyObject* module) { modules.push_back(borrow(module)); };
    each(borrow(reinterpret_cast<Block*>(block.ptr())->modules), [&](PyObject* ref) {
        const py::object module = alive(ref);
        if (!module.is_none() && seen.insert(module.ptr()).second) add(module.ptr());
    });
    const auto number = [](const py::object& value) { return PyLong_AsUnsignedLongLong(value.ptr()); };
    while (!modules.empty()) {
        const py::object module = std::move(modules.back());
        modules.pop_back();
        each(attribute(module.ptr(), names->_modules), add);
        each(attribute(module.ptr(), names->_parameters), [&](PyObject* tensor) {
            if (const Target target(tensor); target.whole()) {
                count += elements(target->shape), bytes += nbytes(target.operator->());
                return;
            }
            const uint64_t n = number(call_method(names->numel, {tensor}));
            count += n;
            bytes += n * number(call_method(names->element_size, {tensor}));
        });
    }
    if (PyErr_Occurred()) throw py::error_already_set();
    return py::make_tuple(count, bytes);
}

}  // namespace

void add_settling(py::module_& m) {
    m.def("waiting", &waiting);
    m.def("give_memory", &give_memory);
    m.def("swap_in", &swap_in);
    m.def("tally", &tally);
}

}  // namespace fastinit::recorder
