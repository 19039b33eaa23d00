// Which kernel fills what, in which pieces and tables.
#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <unordered_map>
#include <utility>
#include <vector>

namespace fastinit::cuda {
namespace {

Divider make_divider(uint64_t divisor) {
    uint32_t shift = 0;
    while (uint64_t{1} << shift < divisor) ++shift;
    const uint64_t magic = ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1;
    return Divider{static_cast<uint32_t>(divisor), static_cast<uint32_t>(magic), shift};
}

// What fills must have in common to share a launch. Zeroed before it is filled in, so that it compares bytewise.
struct Key {
    Form form;
    Dtype dtype;
    Path path;
    uint64_t seed;
    Distribution distribution;
    Steps steps;
    Origin origin;
    Geometry geometry;
};

struct KeyHash {
    size_t operator()(const Key& key) const {
        uint64_t parts[4];
        std::memcpy(parts, &key.distribution.location, 8);
        parts[1] = key.seed;
        parts[2] = (key.geometry.slots_per_run.divisor ^ key.geometry.index_stride[0] << 20) + key.origin.phase;
        parts[3] = static_cast<uint64_t>(key.form) << 16 | static_cast<uint64_t>(key.dtype) << 8 |
                   static_cast<uint64_t>(key.path) << 4 | static_cast<uint64_t>(key.steps.count);
        uint64_t hash = 0;
        for (uint64_t part : parts) hash = (hash ^ part ^ part >> 32) * 0x9E3779B97F4A7C15u;
        return static_cast<size_t>(hash >> 16);
    }
};

struct KeyEqual {
    bool operator()(const Key& a, const Key& b) const { return std::memcmp(&a, &b, sizeof(Key)) == 0; }
};

// A part of a fill that fits one table entry.
struct Piece {
    char* data;
    Box box;
};

uint64_t ceil_divide(uint64_t a, uint64_t b) { return a / b + (a % b != 0); }

// Whether all elements' block numbers have the same high word.
bool in_one_window(const Box& box) {
    uint64_t last = box.index_offset;
    for (int d = 0; d < box.dims; ++d) last += (box.size[d] - 1) * box.index_stride[d];
    return box.index_offset >> 34 == last >> 34;
}

// Whether fill_run, fill_rows or fill_any may fill the piece: all its runs begin on a Philox block and at a 16-byte
// boundary and, but for a single run's tail, end so, and the block numbers' high word is one and the same.
bool is_aligned(const Piece& piece, Dtype dtype) {
    const uint64_t item = item_size(dtype), lanes = 16 / item;
    const Box& box = piece.box;
    if (!box.contiguous_runs() || reinterpret_cast<uintptr_t>(piece.data) % 16 != 0 || box.index_offset % 4 != 0)
        return false;
    if (box.dims == 1 ? box.run() < lanes : box.run() % lanes != 0) return false;
    uint64_t span = 0;
    for (int d = 0; d < box.dims - 1; ++d) {
        if (box.index_stride[d] % 4 != 0 || box.memory_stride[d] * item % 16 != 0) return false;
        span += (box.size[d] - 1) * box.memory_stride[d] * item;
    }
    return span >> 35 == 0 && in_one_window(box);  // the kernel counts slots of memory in 32 bits
}

// A piece's slots and how they are arranged. Of a piece of more than kMaxSlots slots, the number alone holds.
struct Shape {
    Geometry geometry;
    uint64_t slots;
};

Shape shape_of(const Piece& piece, Dtype dtype, bool aligned) {
    const uint64_t item = item_size(dtype), lanes = 16 / item;
    const Box& box = piece.box;
    Shape shape;
    std::memset(&shape, 0, sizeof shape);
    Geometry& g = shape.geometry;
    g.scattered = !box.contiguous_runs();
    g.outer_dims = g.scattered ? box.dims : box.dims - 1;
    const uint64_t run = g.scattered ? 1 : box.run();

    uint64_t per_run = 1;
    if (aligned) {
        per_run = run / lanes;
    } else if (!g.scattered) {
        // Enough for a run that begins on a slot's last element, and one more, whose thread helps the one before it.
        per_run = ceil_divide(lanes - 1 + run, lanes) + 1;
    }
    uint64_t runs = 1;
    for (int d = 0; d < g.outer_dims; ++d) runs *= box.size[d];
    shape.slots = runs > kMaxSlots / per_run ? kMaxSlots + 1 : runs * per_run;
    if (shape.slots > kMaxSlots) return shape;
    if (g.outer_dims == 0) {
        g.slots_per_run = make_divider(uint64_t{1} << 31);  // beyond all slots: fill_rows finds every one in row 0
        return shape;
    }
    g.slots = static_cast<uint32_t>(shape.slots);
    g.slots_per_run = make_divider(per_run);
    g.run = run;
    for (int d = 0; d < g.outer_dims; ++d) {
        g.size[d] = make_divider(box.size[d]);
        g.index_stride[d] = box.index_stride[d];
        g.block_stride[d] = static_cast<uint32_t>(box.index_stride[d] >> 2);
        g.memory_stride[d] = box.memory_stride[d] * item;
        g.slot_stride[d] = static_cast<uint32_t>(g.memory_stride[d] / 16);
    }
    return shape;
}

// Halves a piece across its first dimension. A run is cut where a slot and a Philox block end.
void split(const Piece& piece, Dtype dtype, std::vector<Piece>& pieces) {
    Piece low = piece, high = piece;
    uint64_t cut = piece.box.size[0] / 2;
    if (piece.box.contiguous()) cut = cut / 16 * 16;
    low.box.size[0] = cut;
    high.box.size[0] -= cut;
    high.box.index_offset += cut * piece.box.index_stride[0];
    high.data += cut * piece.box.memory_stride[0] * item_size(dtype);
    // A dimension of size 1 is harmless to the kernel; the next call may need to halve the one after it.
    for (Piece* part : {&low, &high}) {
        Box& box = part->box;
        if (box.dims > 1 && box.size[0] == 1) {
            for (int d = 1; d < box.dims; ++d) {
                box.size[d - 1] = box.size[d];
                box.index_stride[d - 1] = box.index_stride[d];
                box.memory_stride[d - 1] = box.memory_stride[d];
            }
            --box.dims;
        }
    }
    pieces.push_back(high);
    pieces.push_back(low);
}

// Whether both sides are without a lower limit, and their f in [2, 2^32), for icdf's centred form.
bool is_lopsided(const Distribution& d) {
    const double below = 0x1p31 + d.threshold, above = 0x1p31 - d.threshold;  // the largest g of each side, or more
    for (const auto& [tail, most] : {std::pair{d.negative, below}, {d.positive, above}}) {
        if (!std::isinf(tail.low) || tail.low > 0 || tail.high <= 0) return false;
        if (tail.offset < 2.0f || tail.scale < 0.0f || tail.scale * most + tail.offset > 0x1.8p31) return false;
    }
    return true;
}

Form form_of(const Distribution& d) {
    switch (d.kind) {
        case Kind::constant: return Form::constant;
        case Kind::uniform: return Form::uniform;
        case Kind::normal: return Form::normal;
        default: break;
    }
    const TailMap& tail = d.positive;
    if (!d.symmetric) return is_lopsided(d) ? Form::lopsided : Form::truncated;
    if (!std::isinf(tail.low) || tail.low > 0) return Form::truncated;
    // f has to be in [2, 2^32) for icdf's centred form, but in a normal.
    if (tail.offset < 2.0f || tail.scale < 0.0f || tail.scale * 0x1p31f + tail.offset > 0x1.8p31f) {
        // Bounds that no z reaches: the same words give a normal's bits.
        const bool normal = tail.scale == 1.0f && tail.offset == 0.0f && tail.high >= 7.0f;
        return normal ? Form::normal : Form::truncated;
    }
    return tail.high > 0 ? Form::symmetric : Form::truncated;
}

// The steps as an Affine, if they are one. Only exact rewritings: a division by a power of two is a multiplication.
bool make_affine(const Steps& steps, Affine& affine) {
    affine = Affine{1.0f, -0.0f};
    for (int i = 0; i < steps.count; ++i) {
        const Step& step = steps.items[i];
        const bool last = i + 1 == steps.count;
        if (i == 0 && step.op == StepOp::multiply) {
            affine.multiply = step.a;
        } else if (i == 0 && step.op == StepOp::divide) {
            const uint32_t exponent = bits_of(step.a) >> 23 & 255;
            if ((bits_of(step.a) & 0x007FFFFFu) != 0 || exponent < 1 || exponent > 252) return false;
            affine.multiply = float_of((bits_of(step.a) & sign_bit) | (254 - exponent) << 23);
        } else if (last && step.op == StepOp::add) {
            affine.add = step.a;
        } else {
            return false;
        }
    }
    return true;
}

// What the values of an interval are after a step, in double precision and a little wider, since the step rounds.
struct Interval {
    double low, high;
};

Interval after(const Step& step, Interval x) {
    const double a = step.a, b = step.b;
    switch (step.op) {
        case StepOp::multiply: x = {x.low * a, x.high * a}; break;
        case StepOp::add: x = {x.low + a, x.high + a}; break;
        case StepOp::divide:
            if (a == 0) return {-INFINITY, INFINITY};
            x = {x.low / a, x.high / a};
            break;
        case StepOp::erfinv:
            // The largest erfinv(x) of a float32 below 1 is 3.84.
            return x.low > -1 && x.high < 1 ? Interval{-4, 4} : Interval{-INFINITY, INFINITY};
        default: return {std::min(std::max(x.low, a), b), std::min(std::max(x.high, a), b)};
    }
    const double error = std::max(std::fabs(x.low), std::fabs(x.high)) * 0x1p-23;
    return {std::min(x.low, x.high) - error, std::max(x.low, x.high) + error};
}

// Whether every value is finite after the distribution and after each step: no NaN then.
bool stays_finite(const Values& fill) {
    const Distribution& d = fill.distribution;
    Interval x{0, 1};
    if (d.kind != Kind::uniform) {
        x.high = 7;
        if (d.kind == Kind::truncated_normal) {
            for (const TailMap* side : {&d.negative, &d.positive})
                x.high = std::max({x.high, static_cast<double>(side->low), -static_cast<double>(side->high)});
        }
        x.low = -x.high;
    }
    // False for a NaN, too, which an infinite operand may make.
    const auto finite = [&x] { return std::fabs(x.low) < 1e38 && std::fabs(x.high) < 1e38; };
    x = after(Step{StepOp::add, d.location, 0}, after(Step{StepOp::multiply, d.scale, 0}, x));
    for (int i = 0; i < fill.steps.count && finite(); ++i) x = after(fill.steps.items[i], x);
    return finite();
}

// What follows from a fill's distribution and steps.
struct Style {
    Form form;
    bool plain;           // kernels that rest on what `value` says of kPlain may be used
    bool affine;          // the steps are an Affine
    bool erfinv;          // one of them is erfinv
    Distribution scaled;  // the distribution as those kernels want it
};

Style style_of(const Values& fill) {
    Affine affine;
    const Step* const end = fill.steps.items + fill.steps.count;
    const bool erfinv = std::any_of(fill.steps.items, end, [](const Step& step) { return step.op == StepOp::erfinv; });
    Style style{form_of(fill.distribution), true, make_affine(fill.steps, affine), erfinv, fill.distribution};
    if (style.form == Form::constant) return style;
    style.plain = stays_finite(fill);
    if (style.form == Form::truncated || style.form == Form::lopsided)
        style.plain = style.plain && fill.distribution.negative.high != 0 && fill.distribution.positive.high != 0;
    if (style.form == Form::uniform) {
        // The scale times 2^-24, exact unless it is tiny; in integers, since the caller may flush subnormals.
        const uint32_t bits = bits_of(style.scaled.scale), magnitude = bits & ~sign_bit;
        if (magnitude == 0) return style;
        style.plain = style.plain && magnitude >> 23 > 24;
        style.scaled.scale = float_of(bits - (24u << 23));
    }
    return style;
}

// Collects table entries by key and launches them, each table when it is full: the device begins while the host goes
// on.
class Planner {
public:
    explicit Planner(Device& device) : device_(device), multiprocessors_(device.multiprocessors()) {
        std::memset(&key_, 0, sizeof key_);  // cppcheck-suppress memsetClassFloat; keys are compared as bytes
    }

    // Most fills of a model are whole tensors that differ from an earlier one in address and stream alone. The device
    // should not wait for the host: these are an entry of a table with hardly a look at them.
    void add(const Fill& fill) {
        for (const Whole& whole : whole_) {
            if (whole.box != fill.box || whole.values != fill.values) continue;
            if (reinterpret_cast<uintptr_t>(fill.data) % 16 != 0 || fill.stream >> 32 != whole.stream_high) break;
            push(*whole.group, fill, static_cast<char*>(fill.data), whole.extent);
            return;
        }
        if (fill.box->dims == 0) return;
        Known& known = known_as(fill.values);
        if (!add_like_others(fill, known)) add_pieces(fill, known);
    }

    void launch() {
        for (auto& group : groups_) launch_group(group);
    }

private:
    struct Entry {
        char* data;
        uint32_t stream;
        uint32_t extent;  // which of its group's
    };

    // Fills that wait for their launch.
    struct Group {
        std::vector<Entry> entries;
        std::vector<Extent> extents;  // at most kSections; also those of earlier launches
    };
    using KeyedGroup = std::pair<const Key, Group>;

    // Values and a box whose aligned fills are an entry of this extent each, in that group.
    struct Whole {
        const Values* values;
        const Box* box;
        KeyedGroup* group;
        uint32_t stream_high;
        uint32_t extent;
    };

    void remember(const Fill& fill, KeyedGroup& group, uint32_t extent) {
        oldest_whole_ = (oldest_whole_ + 1) % std::size(whole_);
        whole_[oldest_whole_] = Whole{fill.values, fill.box, &group, static_cast<uint32_t>(fill.stream >> 32), extent};
    }

    // Values met before, what follows from them, and the group that their whole tensors are in, if any.
    struct Known {
        const Values* values;
        Style style;
        KeyedGroup* run;
    };

    Known& known_as(const Values* values) {
        for (Known& known : known_)
            if (known.values == values) return known;
        oldest_known_ = (oldest_known_ + 1) % std::size(known_);
        return known_[oldest_known_] = Known{values, style_of(*values), nullptr};
    }

    // Whole tensors of known values, of another size: is_aligned and add_piece, less what is known of them.
    bool add_like_others(const Fill& fill, const Known& known) {
        if (known.run == nullptr) return false;
        const Box& box = *fill.box;
        const Origin& origin = known.run->first.origin;
        const uint64_t index = box.index_offset, run = box.run();
        const int lanes_log2 = known.run->first.dtype == Dtype::float32 ? 2 : 3;
        const uint64_t slots = run >> lanes_log2;
        if (!box.contiguous() || slots << lanes_log2 != run || slots > kMaxSlots ||
            reinterpret_cast<uintptr_t>(fill.data) % 16 != 0 || index % 4 != 0 || index >> 34 != origin.block_high ||
            (index + run - 1) >> 34 != origin.block_high || fill.stream >> 32 != origin.stream_high)
            return false;
        const uint32_t extent = extent_in(*known.run, index, slots, slots);
        remember(fill, *known.run, extent);
        push(*known.run, fill, static_cast<char*>(fill.data), extent);
        return true;
    }

    // The number of an extent among the group's: see Extent for its size. May launch what the group has.
    uint32_t extent_in(KeyedGroup& keyed, uint64_t index, uint64_t slots, uint64_t size) {
        const Extent extent{static_cast<uint32_t>(index >> 2), static_cast<uint32_t>(slots),
                            static_cast<uint32_t>(size)};
        std::vector<Extent>& extents = keyed.second.extents;
        for (uint32_t i = 0; i < extents.size(); ++i)
            if (std::memcmp(&extents[i], &extent, sizeof extent) == 0) return i;
        if (extents.size() == kSections) {
            launch_group(keyed);
            extents.clear();
            for (Whole& whole : whole_)
                if (whole.group == &keyed) whole = Whole{};
        }
        extents.push_back(extent);
        return static_cast<uint32_t>(extents.size() - 1);
    }

    // Apart from add, which would set up a large frame for every fill.
    [[gnu::noinline]] void add_pieces(const Fill& fill, Known& known) {
        const Style& style = known.style;
        const Dtype dtype = fill.values->dtype;
        std::vector<Piece>& pieces = pieces_;
        pieces.assign(1, Piece{static_cast<char*>(fill.data), *fill.box});
        while (!pieces.empty()) {
            const Piece piece = pieces.back();
            pieces.pop_back();
            const bool aligned =
                style.plain && is_aligned(piece, dtype) && (style.form != Form::constant || piece.box.dims == 1);
            const Shape shape = shape_of(piece, dtype, aligned);
            if (shape.slots > kMaxSlots) {
                split(piece, dtype, pieces);
            } else {
                add_piece(fill, known, piece, shape, aligned);
            }
        }
    }

    void add_piece(const Fill& fill, Known& known, const Piece& piece, const Shape& shape, bool aligned) {
        const Style& style = known.style;
        const Values& values = *fill.values;
        const uint64_t item = item_size(values.dtype), lanes = 16 / item;
        const Box& box = piece.box;
        const uint64_t index = box.index_offset;
        const bool plain = style.plain && style.affine && in_one_window(box) &&
                           (style.form == Form::uniform || style.form == Form::normal);
        const Path unaligned = plain ? Path::plain : style.erfinv ? Path::general_erfinv : Path::general;
        if (!aligned) {
            const uint64_t slots = shape.geometry.outer_dims != 0 ? shape.slots : unaligned_slots(box.run(), lanes);
            KeyedGroup& group = group_for(fill, style, unaligned, shape, index);
            push(group, fill, piece.data, extent_in(group, index, slots, box.run()));
            return;
        }
        // Only fill_run knows the symmetric and the lopsided form, and only it does not know the general truncated one.
        const bool bare =
            box.dims == 1 && (values.steps.count == 0 || style.form == Form::constant) && style.form != Form::truncated;
        const bool stepless = values.steps.count == 0;
        const Path path = bare                            ? Path::run
                          : style.erfinv                  ? Path::any_erfinv
                          : box.dims > 3 || !style.affine ? Path::any
                          : box.dims == 3                 ? (stepless ? Path::planes : Path::affine_planes)
                          : stepless                      ? Path::rows
                                                          : Path::affine_rows;
        const uint64_t body = box.dims == 1 ? box.run() / lanes * lanes : box.run();
        KeyedGroup& group = group_for(fill, style, path, shape, index);
        const uint32_t extent = extent_in(group, index, shape.slots, shape.slots);
        if (bare && values.steps.count == 0) known.run = &group;
        if (shape.slots * lanes == fill.elements()) remember(fill, group, extent);
        push(group, fill, piece.data, extent);
        const uint64_t tail = box.run() - body;
        if (tail == 0) return;
        KeyedGroup& tails = group_for(fill, style, unaligned, shape, index + body);
        push(tails, fill, piece.data + body * item, extent_in(tails, index + body, unaligned_slots(tail, lanes), tail));
    }

    // Of a run that fill_general fills; the kernel knows this, too.
    static uint64_t unaligned_slots(uint64_t run, uint64_t lanes) { return run / lanes + 2; }

    KeyedGroup& group_for(const Fill& fill, const Style& style, Path path, const Shape& shape, uint64_t index) {
        const Values& values = *fill.values;
        const bool truncated = path != Path::run && (style.form == Form::symmetric || style.form == Form::lopsided);
        key_.form = truncated ? Form::truncated : style.form;
        key_.dtype = values.dtype;
        key_.path = path;
        key_.seed = style.form == Form::constant ? 0 : values.seed;
        key_.distribution = is_general(path) ? values.distribution : style.scaled;
        key_.steps = values.steps;
        key_.origin = Origin{static_cast<uint32_t>(index >> 34), static_cast<uint32_t>(fill.stream >> 32),
                             static_cast<uint32_t>(index & 3)};
        key_.geometry = shape.geometry;
        if (last_ == nullptr || !KeyEqual{}(last_->first, key_)) last_ = &*groups_.try_emplace(key_).first;
        return *last_;
    }

    static bool is_general(Path path) { return path == Path::general || path == Path::general_erfinv; }
    static bool is_unaligned(Path path) { return path == Path::plain || is_general(path); }

    void push(KeyedGroup& keyed, const Fill& fill, char* data, uint32_t extent) {
        std::vector<Entry>& entries = keyed.second.entries;
        if (entries.size() == 64) entries.reserve(kEntries);  // many: their growth would be copies, and new memory
        entries.emplace_back();                               // and not push_back: see docs/performance.md
        entries.back() = Entry{data, static_cast<uint32_t>(fill.stream), extent};
        if (entries.size() == kEntries) launch_group(keyed);
    }

    // Launches the group's entries, at most kEntries, and leaves none.
    void launch_group(KeyedGroup& keyed) {
        const Key& key = keyed.first;
        std::vector<Entry>& entries = keyed.second.entries;
        const std::vector<Extent>& extents = keyed.second.extents;
        if (entries.empty()) return;
        uint32_t counts[kSections] = {};
        if (extents.size() == 1) {
            counts[0] = static_cast<uint32_t>(entries.size());
        } else {
            for (const Entry& entry : entries) ++counts[entry.extent];
        }
        uint64_t slots = 0;
        uint32_t largest = 0;
        for (size_t i = 0; i < extents.size(); ++i) {
            if (counts[i] == 0) continue;
            slots += uint64_t{counts[i]} * extents[i].slots;
            largest = std::max(largest, extents[i].slots);
        }
        Launch& launch = launch_;
        Shared& shared = launch.shared;
        for (uint32_t round = 0; round < Philox::rounds; ++round) {
            shared.key0[round] = static_cast<uint32_t>(key.seed) + round * Philox::key_step0;
            shared.key1[round] = static_cast<uint32_t>(key.seed >> 32) + round * Philox::key_step1;
        }
        shared.centre = kCentre;
        shared.distribution = key.distribution;
        shared.steps = key.steps;
        make_affine(key.steps, shared.affine);
        shared.origin = key.origin;
        shared.geometry = key.geometry;

        const KernelId kernel{key.form, key.dtype, key.path};
        const uint32_t threads = block_threads(device_.max_threads(kernel), largest);
        const uint32_t resident = multiprocessors_ * std::max(device_.blocks_per_multiprocessor(kernel, threads), 1u);

        // Tiles of whole passes of a block; eight or more for every resident block where there is work enough, so that
        // blocks end together.
        const uint32_t pass = is_unaligned(key.path) ? threads / kWarp * (kWarp - 1) : threads;
        const uint64_t passes = slots / (uint64_t{8} * resident) / pass;
        launch.tile_slots = pass * static_cast<uint32_t>(std::min<uint64_t>(std::max<uint64_t>(passes, 1), kMaxTile));
        launch.group_log2 = 0;
        if (key.path != Path::run && !is_unaligned(key.path))
            set_row_step(key.geometry, key.dtype, slots / entries.size(), threads);
        const uint32_t group_slots = launch.tile_slots << launch.group_log2;
        launch.tiles = 0;
        uint32_t next[kSections] = {};  // the place of the section's next entry
        uint32_t first_entry = 0;
        Section* section = launch.sections;
        for (size_t i = 0; i < extents.size(); ++i) {
            if (counts[i] == 0) continue;
            const uint32_t tiles = ((extents[i].slots + group_slots - 1) / group_slots) << launch.group_log2;
            *section++ = Section{extents[i], make_divider(tiles), first_entry, launch.tiles};
            next[i] = first_entry;
            first_entry += counts[i];
            launch.tiles += counts[i] * tiles;
        }
        section->first_tile = launch.tiles;
        if (extents.size() == 1) {
            for (size_t i = 0; i < entries.size(); ++i) {
                launch.data[i] = entries[i].data;
                launch.stream[i] = entries[i].stream;
            }
        } else {
            // Most entries are of the extent of the one before: its next place stays in a register.
            uint32_t extent = entries[0].extent, at = next[extent];
            for (const Entry& entry : entries) {
                if (entry.extent != extent) {
                    next[extent] = at;
                    extent = entry.extent;
                    at = next[extent];
                }
                launch.data[at] = entry.data;
                launch.stream[at++] = entry.stream;
            }
        }
        // As many blocks as run at a time, where each has a table to load. Without one, a block for each tile: the
        // device then hands them out as multiprocessors become free, and these do not all write equally fast.
        const bool tabulated = key.form != Form::constant && key.form != Form::uniform;
        const uint32_t blocks = tabulated ? std::min(launch.tiles, resident) : launch.tiles;
        device_.start(kernel, launch, blocks, threads);
        entries.clear();
    }

    // Of a launch of fill_rows or fill_any, with entries of `slots` slots on average: group_log2 and RowStep.
    void set_row_step(const Geometry& g, Dtype dtype, uint64_t slots, uint32_t threads) {
        while (2u << launch_.group_log2 <= kGroup && uint64_t{launch_.tile_slots} << (launch_.group_log2 + 2) <= slots)
            ++launch_.group_log2;
        RowStep& step = launch_.step;
        const bool boxes = g.outer_dims == 2;
        const uint32_t per_run = g.slots_per_run.divisor, per_plane = g.size[1].divisor;
        step.stride = threads << launch_.group_log2;
        step.at = step.stride % per_run;
        step.rows = step.stride / per_run;
        const uint32_t over = boxes ? step.rows / per_plane : 0;
        step.rows -= over * per_plane;
        const auto distance = [&](uint32_t at, uint32_t rows, uint32_t planes) {
            const int row = boxes ? 1 : 0;                                    // the dimension
            const auto blocks = static_cast<uint32_t>(4 / item_size(dtype));  // of a slot
            return Spot{at * blocks + rows * g.block_stride[row] + planes * g.block_stride[0],
                        at + rows * g.slot_stride[row] + planes * g.slot_stride[0]};
        };
        step.distance = distance(step.at, step.rows, over);
        step.next_row = distance(0 - per_run, 1, 0);
        step.next_plane = distance(0, 0 - per_plane, 1);
    }

    // The threads of a block for entries of at most `largest` slots: as many as the kernel was compiled for, but no
    // more than an entry gives work to.
    static uint32_t block_threads(uint32_t threads, uint32_t largest) {
        if (threads > kThreads && largest <= threads) threads = kThreads;
        while (threads > 256 && largest <= threads / 2) threads /= 2;
        return threads;
    }

    Device& device_;
    uint32_t multiprocessors_;
    Key key_;
    std::unordered_map<Key, Group, KeyHash, KeyEqual> groups_;
    Whole whole_[4] = {};
    size_t oldest_whole_ = 0;
    Known known_[4] = {};
    size_t oldest_known_ = 0;
    KeyedGroup* last_ = nullptr;
    std::vector<Piece> pieces_;
    Launch launch_{};
};

}  // namespace

void plan(const Fill* fills, size_t count, Device& device) {
    Planner planner(device);
    for (size_t i = 0; i < count; ++i) planner.add(fills[i]);
    planner.launch();
}

}  // namespace fastinit::cuda
