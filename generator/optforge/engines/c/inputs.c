/* inputs.c: looks at the arrays that the Optimizer is given for a step, all in one call: whether each is what it
 * has to be, and where its elements are. Python compiles it for itself; nothing of it is emitted.
 *
 * An array of NumPy is read as its C API lays it out. A tensor of PyTorch is asked through the table of functions
 * that DLPack defines for this. Whatever is not as it should be, or of another library, is left to Python, which
 * looks closer, and knows what to say. The caller holds the interpreter's lock.
 *
 * What is looked at was last used a step ago, and is in no cache near by: thousands of small objects, each found
 * through others. So all of it is fetched ahead, a few objects before it is needed.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* A tensor as DLPack describes it. */
typedef struct DLTensor {
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;
enum { CPU = 1 };

/* An array of NumPy, behind the head that all objects have. */
typedef struct Array {
    char *data;
    int nd;
    ptrdiff_t *shape, *strides;
    void *base, *dtype;
    int flags;
} Array;
enum { CONTIGUOUS = 0x1, ALIGNED = 0x100, WRITEABLE = 0x400 };

/* What an array has to be. */
typedef struct Form {
    const int64_t *shape, *strides; /* the latter in elements, as DLPack has them */
    uint64_t bytes;                 /* of all elements */
    int32_t ndim;
    int32_t code, bits; /* of one element: what DLPack calls its type, FLOAT or BFLOAT, and its size */
} Form;
enum { FLOAT = 2, BFLOAT = 4 };

typedef struct Inputs {
    /* Python: the bytes of an object's head, which ends with its type; functions of its C API */
    size_t head;
    const void *none;
    void *(*item)(void *list, ptrdiff_t k);            /* PyList_GetItem */
    int (*set)(void *list, ptrdiff_t k, void *object); /* PyList_SetItem */
    void *(*attribute)(void *object, void *name);      /* PyObject_GetAttr */
    void (*clear)(void);                               /* PyErr_Clear */
    const void *ndarray, *float32, *float64; /* NumPy: the type of arrays, and two dtypes */
    const void *tensor, *parameter;          /* PyTorch: the types of tensors, and what describes one */
    int (*describe)(void *tensor, DLTensor *description);
    /* Where the first word behind the head of a tensor points to, so many bytes behind, are pointers to its storage,
     * its version, its object, and to what has its gradient, so many bytes behind there; 0 where that is not known */
    size_t storage, version, object, meta, gradient;
    size_t keys;       /* where it keeps what views it is of, as bits; 0 where that is not known */
    uint64_t negative; /* the bit of a view whose elements have the other sign than in memory */

    size_t count;
    const Form *forms;          /* of each parameter and its gradient */
    int32_t zero_grads;         /* gradients are written to as well */
    const uintptr_t *homes;     /* where each parameter was */
    unsigned char *parameters;  /* filled in, of each: 1 where Python has to look at it */
    unsigned char *gradients;   /* filled in, of each: ABSENT … */
    uintptr_t *addresses;       /* filled in: where each gradient is; before, where it was at the last call */
    size_t ranges;              /* the memory that steps write to: parameters and state, in ascending order */
    const uintptr_t *starts, *ends;
} Inputs;

enum { ABSENT, FOUND, UNSIGNED, OTHER }; /* a gradient; of a tensor that is UNSIGNED, Python asks for the sign */
enum { PARAMETERS = 1, CHANGED = 2, ASKED = 4, MOVED = 8 }; /* what there is to do: bits of the result */

static const char *pointer_at(const char *at, size_t offset)
{
    const char *pointer;

    memcpy(&pointer, at + offset, sizeof pointer);
    return pointer;
}

static const void *type_of(const Inputs *in, const void *object)
{
    const void *type;

    memcpy(&type, (const char *)object + in->head - sizeof type, sizeof type);
    return type;
}

static int look_at_array(const Inputs *in, const void *object, const Form *form, int writes, uintptr_t *address)
{
    const Array *array = (const Array *)((const char *)object + in->head);
    const int wanted = CONTIGUOUS | ALIGNED | (writes ? WRITEABLE : 0);

    if (form->bits < 32 || array->dtype != (form->bits == 32 ? in->float32 : in->float64) ||
        array->nd != form->ndim || (array->flags & wanted) != wanted)
        return OTHER;
    for (int d = 0; d < form->ndim; d++)
        if (array->shape[d] != form->shape[d])
            return OTHER;
    *address = (uintptr_t)array->data;
    return FOUND;
}

static int look_at_tensor(const Inputs *in, void *object, const Form *form, uintptr_t *address)
{
    DLTensor tensor;
    uint64_t keys = 0;

    if (in->describe(object, &tensor) != 0) {
        in->clear();
        return OTHER;
    }
    if (tensor.device_type != CPU || tensor.code != form->code || tensor.bits != form->bits || tensor.lanes != 1 ||
        tensor.ndim != form->ndim)
        return OTHER;
    for (int d = 0; d < form->ndim; d++)
        if (tensor.shape[d] != form->shape[d] ||
            (tensor.shape[d] != 1 && tensor.strides[d] != form->strides[d] && form->bytes != 0))
            return OTHER;
    *address = (uintptr_t)tensor.data + (uintptr_t)tensor.byte_offset;
    if (*address % (uintptr_t)(form->bits / 8) != 0)
        return OTHER;
    if (in->keys == 0)
        return UNSIGNED;
    memcpy(&keys, pointer_at(object, in->head) + in->keys, sizeof keys);
    return keys & in->negative ? OTHER : FOUND;
}

/* What an array is, and its address: 0 where it has no elements. */
static int look(const Inputs *in, void *object, const Form *form, int writes, uintptr_t *address)
{
    const void *type = type_of(in, object);
    int kind = OTHER;

    *address = 0;
    if (object == in->none)
        return ABSENT;
    if (type == in->ndarray)
        kind = look_at_array(in, object, form, writes, address);
    else if (in->describe != NULL && (type == in->tensor || type == in->parameter))
        kind = look_at_tensor(in, object, form, address);
    if (form->bytes == 0)
        *address = 0;
    else if (*address == 0)
        return OTHER;
    return kind;
}

/* The first of the ranges that ends behind an address. `near` is that of another one, from which it is often not far:
 * gradients of one step lie where memory was free, one behind the other. */
static size_t behind(const Inputs *in, uintptr_t address, size_t near)
{
    size_t low = 0, high = in->ranges;

    if ((near == 0 || in->ends[near - 1] <= address) && (near == high || in->ends[near] > address))
        return near;
    while (low < high) {
        const size_t middle = low + (high - low) / 2;

        if (in->ends[middle] <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Whether bytes from an address on are in memory that steps write to. */
static int overlaps(const Inputs *in, uintptr_t address, uint64_t bytes, size_t *near)
{
    *near = behind(in, address, *near);
    return bytes != 0 && *near < in->ranges && in->starts[*near] < address + bytes;
}

/* What PyTorch keeps of object k of a list of so many, and of the tensor that is its gradient; NULL where there is none. */
static const char *kept(const Inputs *in, void *list, size_t count, ptrdiff_t k)
{
    const void *object;

    if (k < 0 || (size_t)k >= count || in->storage == 0)
        return NULL;
    object = in->item(list, k);
    if (type_of(in, object) != in->tensor && type_of(in, object) != in->parameter)
        return NULL;
    return pointer_at(object, in->head);
}
static const char *kept_of_gradient(const Inputs *in, void *list, ptrdiff_t k)
{
    const char *tensor = kept(in, list, in->count, k);
    const char *meta = tensor != NULL ? pointer_at(tensor, in->meta) : NULL;

    return meta != NULL ? pointer_at(meta, in->gradient) : NULL;
}

enum { LINE = 64, LINES = 4, AHEAD = 16 };

static void fetch_lines(const char *at)
{
    for (int line = 0; line < LINES; line++)
        __builtin_prefetch(at + LINE * line);
}

/* Fetches what is needed of objects from k on, each step in time for the next one. */
static void fetch_ahead(const Inputs *in, void *list, ptrdiff_t k, int gradients)
{
    const char *at;

    if (k + AHEAD < (ptrdiff_t)in->count)
        __builtin_prefetch(in->item(list, k + AHEAD));
    if ((at = kept(in, list, in->count, k + 12)) != NULL)
        fetch_lines(at);
    if ((at = kept(in, list, in->count, k + 8)) != NULL) {
        __builtin_prefetch(pointer_at(at, in->storage));
        __builtin_prefetch(pointer_at(at, in->meta) + in->gradient);
    }
    if (!gradients)
        return;
    if ((at = kept_of_gradient(in, list, k + 5)) != NULL)
        fetch_lines(at);
    if ((at = kept_of_gradient(in, list, k + 2)) != NULL) {
        __builtin_prefetch(pointer_at(at, in->storage));
        __builtin_prefetch(pointer_at(at, in->object));
    }
}

/* Looks at all arrays. Where `name` is no None, gradients are read from the parameters under it, into the list. The
 * result is negative where Python has an error for that. */
int optforge_inputs(Inputs *in, void *parameters, void *gradients, void *name)
{
    const int reads = name != in->none;
    int result = 0;
    size_t near = 0;

    for (ptrdiff_t ahead = -AHEAD; ahead < (ptrdiff_t)in->count; ahead++) {
        fetch_ahead(in, parameters, ahead, reads);
        if (!reads)
            fetch_ahead(in, gradients, ahead, 0);
        if (ahead < 0)
            continue;

        const size_t k = (size_t)ahead;
        const Form *form = &in->forms[k];
        void *parameter = in->item(parameters, ahead);
        uintptr_t address;
        int kind = look(in, parameter, form, 1, &address);

        in->parameters[k] = kind == OTHER || (kind != ABSENT && form->bytes != 0 && address != in->homes[k]);
        result |= in->parameters[k] ? PARAMETERS : 0;
        if (reads) {
            void *gradient = in->attribute(parameter, name);

            if (gradient == NULL || in->set(gradients, ahead, gradient) != 0)
                return -1;
        }
        kind = look(in, in->item(gradients, ahead), form, in->zero_grads, &address);
        if ((address != in->addresses[k] || in->gradients[k] == OTHER) && overlaps(in, address, form->bytes, &near))
            kind = OTHER;
        if (kind == OTHER)
            address = 0;
        result |= kind >= UNSIGNED ? ASKED : 0;
        result |= address != in->addresses[k] ? MOVED : 0;
        result |= (kind == ABSENT) != (in->gradients[k] == ABSENT) ? CHANGED : 0; /* other tensors have one */
        in->gradients[k] = (unsigned char)kind;
        in->addresses[k] = address;
    }
    return result;
}

/* Whether two lists have the same objects, of which none is touched. */
int optforge_same(const Inputs *in, void *one, void *other, size_t count)
{
    for (size_t k = 0; k < count; k++)
        if (in->item(one, (ptrdiff_t)k) != in->item(other, (ptrdiff_t)k))
            return 0;
    return 1;
}

/* Fetches the versions of all tensors of a list, which are counted up next. */
void optforge_fetch_versions(const Inputs *in, void *list, size_t count)
{
    for (ptrdiff_t k = -AHEAD; k < (ptrdiff_t)count; k++) {
        const char *at = kept(in, list, count, k);

        if (k + AHEAD < (ptrdiff_t)count)
            __builtin_prefetch(in->item(list, k + AHEAD));
        if (at != NULL)
            __builtin_prefetch(pointer_at(at, in->version), 1);
        if ((at = kept(in, list, count, k + AHEAD / 2)) != NULL)
            fetch_lines(at);
    }
}
